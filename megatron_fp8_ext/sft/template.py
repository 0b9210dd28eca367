r"""Chat messages -> tokens and loss mask, by the chat template of the tokenizer.

The span. Of each supervised assistant turn, the tokens in the loss are those after the generation prompt
up to and including the end of the turn: for Qwen2.5, after `<|im_start|>assistant\n`, through
`<|im_end|>` and the newline that follows it. A token that straddles the border (an answer that begins with a
newline) belongs to the prompt. These are the spans of slime's MultiTurnLossMaskGenerator
(`--loss-mask-type qwen`).

A template with `{% generation %}` blocks says its spans itself. Any other is rendered up to each assistant
turn, with and without the turn, and both renderings must be prefixes of the whole; a template that
rewrites earlier turns (Qwen3 drops their thinking) fails that check and is refused by name.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer, processors

from megatron_fp8_ext import tokenizer as tokenizers
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.sft.conversation import Conversation, InvalidRecord
from megatron_fp8_ext.sft.inputs import HALF_PAIR
from megatron_fp8_ext.sft.shards import Sample

Span = tuple[int, int]


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's protocol

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        mark = self.environment.globals["generation_mark"]
        return f"{mark}{caller()}{mark}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


class ChatTemplate:
    """A chat template bound to its tokenizer.

    Args:
        source: the Jinja template.
        tokenizer: of the same model.
        special: `bos_token`, `eos_token` and so on, for the template.
        split_tool_turns: give each of several tool results in a row a turn of its own, as slime's
            generator does; by default the template decides (Qwen2.5 puts them into one turn).
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        special: dict[str, str] | None = None,
        split_tool_turns: bool = False,
    ) -> None:
        self.source, self.tokenizer, self.special = source, tokenizer, special or {}
        self.split_tool_turns = split_tool_turns
        # Trimmed offsets would hide which token a border falls into.
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        self._mark = f"\x00{secrets.token_hex(16)}\x00"
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
            "generation_mark": self._mark,
            **self.special,
        }
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is not valid Jinja: {error}") from error
        self.marks_generation = "generation" in source and "endgeneration" in source
        if split_tool_turns and self.marks_generation:
            raise UserError("--split-tool-turns works with templates without generation blocks")

    def fingerprint(self) -> str:
        """Return a digest of everything that decides tokens and masks."""
        digest = hashlib.sha256(tokenizers.fingerprint(self.tokenizer).encode())
        digest.update(self.source.encode())
        digest.update(b"split" if self.split_tool_turns else b"")
        return digest.hexdigest()

    def encode(self, conversations: Sequence[Conversation]) -> list[Sample | InvalidRecord]:
        """Return tokens and mask of each conversation, or why it has none."""
        rendered: list[tuple[str, list[Span]] | InvalidRecord] = []
        for conversation in conversations:
            try:
                text, spans = self.render(conversation)
                text.encode()
                rendered.append((text, spans))
            except InvalidRecord as error:
                rendered.append(error)
            except UnicodeEncodeError as error:  # JSON may hold one: "\\ud800"
                rendered.append(InvalidRecord(f"{HALF_PAIR} ({error.object[error.start]!a})"))
        texts = [each[0] for each in rendered if not isinstance(each, InvalidRecord)]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        return [
            each if isinstance(each, InvalidRecord) else _mask(next(encodings), *each)
            for each in rendered
        ]

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the text and the character spans `[start, end)` of its supervised turns.

        Raises:
            InvalidRecord: the template refuses the conversation, or its spans cannot be told.
        """
        if self.marks_generation:
            return self._render_marked(conversation)
        messages, tools = conversation.messages, conversation.tools
        if self.split_tool_turns:
            return self._render_split(conversation)
        whole = self._render(messages, tools)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or not conversation.supervised[turn]:
                continue
            before = self._render(messages[:turn], tools, prompt=True) if turn else ""
            through = self._render(messages[: turn + 1], tools)
            if turn == 0 or not whole.startswith(before) or not whole.startswith(through):
                raise InvalidRecord(
                    f"the chat template shows message {turn + 1} differently once later messages "
                    "follow (or it has no generation prompt), so its span cannot be told; give a "
                    "--chat-template with {% generation %} blocks, or single-turn samples"
                )
            spans.append((len(before), len(through)))
        return whole, spans

    def _render_split(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Render message by message, without the system turn that the template adds to each."""
        probe = [{"role": "user", "content": "x"}]
        turn_length = len(self._render(probe * 2, None)) - len(self._render(probe, None))
        added = len(self._render(probe, None)) - turn_length
        prompt = len(self._render(probe, None, prompt=True)) - len(self._render(probe, None))
        text, spans = "", []
        for turn, message in enumerate(conversation.messages):
            piece = self._render([message], conversation.tools if turn == 0 else None)
            if turn and message["role"] != "system":
                piece = piece[added:]
            if conversation.supervised[turn]:
                spans.append((len(text) + prompt, len(text) + len(piece)))
            text += piece
        return text, spans

    def _render_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        parts = self._render(conversation.messages, conversation.tools).split(self._mark)
        spans: list[Span] = []
        at = 0
        for index, part in enumerate(parts):
            if index % 2:
                spans.append((at, at + len(part)))
            at += len(part)
        roles = [message["role"] for message in conversation.messages]
        wanted = [
            on
            for on, role in zip(conversation.supervised, roles, strict=True)
            if role == "assistant"
        ]
        if len(spans) != len(wanted):
            raise InvalidRecord(
                f"the chat template marks {len(spans)} generation blocks for {len(wanted)} "
                "assistant turns; mend the template"
            )
        return "".join(parts), [span for span, on in zip(spans, wanted, strict=True) if on]

    def _render(self, messages: Any, tools: Any, prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=prompt, documents=None
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise InvalidRecord(f"the chat template refuses it: {error}") from error


def _mask(encoding: Any, text: str, spans: Sequence[Span]) -> Sample:
    """Mark the tokens that begin inside a span."""
    tokens = np.asarray(encoding.ids, dtype=np.int64)
    mask = np.zeros(len(tokens), dtype=np.bool_)
    for start, end in spans:
        mask[_first_from(encoding, start, text) : _first_from(encoding, end, text)] = True
    return Sample(tokens, mask)


def _first_from(encoding: Any, position: int, text: str) -> int:
    """Return the first token that begins at or after a character."""
    count = len(encoding.ids)
    while position < len(text):
        token = encoding.char_to_token(position)
        if token is None:  # a character that a normalizer took away
            position += 1
            continue
        while token < count and encoding.offsets[token][0] < position:
            token += 1
        # Several tokens may share one character (bytes of an emoji): the first of them counts.
        return int(token)
    return count


def load(
    tokenizer_path: str | Path,
    template_path: str | Path | None = None,
    split_tool_turns: bool = False,
) -> ChatTemplate:
    """Return the tokenizer's chat template, or the one in `template_path`.

    Args:
        tokenizer_path: see `megatron_fp8_ext.tokenizer.load`.
        template_path: a Jinja file that replaces the tokenizer's own.
        split_tool_turns: see ChatTemplate.

    Raises:
        UserError: no tokenizer, or no template.
    """
    tokenizer, _ = tokenizers.load(tokenizer_path)
    path = Path(tokenizer_path)
    source, special = _stored_template(path if path.is_dir() else path.parent, path)
    if template_path is not None:
        try:
            source = Path(template_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template {template_path}: cannot be read: {error}") from error
    if source is None:
        raise UserError(
            f"--tokenizer {tokenizer_path} has no chat template (neither chat_template.jinja nor one "
            "in tokenizer_config.json); give a Jinja file with --chat-template"
        )
    return ChatTemplate(source, tokenizer, special, split_tool_turns)


def _stored_template(folder: Path, path: Path) -> tuple[str | None, dict[str, str]]:
    if path.suffix == ".gguf":
        return tokenizers.gguf_chat_template(path)
    special: dict[str, str] = {}
    source = None
    config = folder / "tokenizer_config.json"
    if config.is_file():
        try:
            stored = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{config} is not valid JSON: {error}") from error
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = stored.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[name] = value
        source = stored.get("chat_template")
        if isinstance(source, list):  # named templates
            named = {each.get("name"): each.get("template") for each in source}
            source = named.get("default")
    file = folder / "chat_template.jinja"
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    return source, special
