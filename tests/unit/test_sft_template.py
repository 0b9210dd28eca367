"""Chat template -> tokens and mask, to the token, against slime's rule message by message."""

from __future__ import annotations

import pytest
from chat import CALL, CASES, CHATML, MARKED, TOOLS, write_tokenizer

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.sft import conversation, template
from megatron_fp8_ext.sft.conversation import InvalidRecord

U, A = CASES["single"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat(folder):
    return template.load(folder)


def slime_rule(chat, messages, tools):
    """Each message rendered alone, the template's own system turn cut off, the prompt masked."""

    def ids(given, given_tools=None, prompt=False):
        text = chat._render(given, given_tools, prompt)
        return chat.tokenizer.encode(text, add_special_tokens=False).ids

    probe = {"role": "user", "content": "probe"}
    turn = len(ids([probe, probe])) - len(ids([probe]))
    system = len(ids([probe])) - turn
    prompt = len(ids([probe], prompt=True)) - len(ids([probe]))
    tokens, mask = [], []
    for number, message in enumerate(messages):
        piece = ids([message], tools if number == 0 else None)
        if number and message["role"] != "system":
            piece = piece[system:]
        on = message["role"] == "assistant" and message.get("step_loss_mask", 1) == 1
        tokens += piece
        mask += [i >= prompt and on for i in range(len(piece))]
    return tokens, mask


def one(chat, record):
    result = chat.encode([conversation.parse(record)])[0]
    if isinstance(result, InvalidRecord):
        raise result
    return result


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("case", CASES)
def test_same_tokens_and_mask_as_slimes_rule(chat, folder, case, tools):
    messages = CASES[case]
    split = case == "two tools"  # slime gives each tool result a turn of its own
    used = template.load(folder, split_tool_turns=True) if split else chat
    got = one(used, {"messages": messages, "tools": tools})
    tokens, mask = slime_rule(chat, messages, tools)
    assert got.tokens.tolist() == tokens
    assert got.mask.tolist() == mask


def test_two_tool_results_follow_the_template_by_default(chat, folder):
    record = {"messages": CASES["two tools"]}
    ours, split = one(chat, record), one(template.load(folder, split_tool_turns=True), record)
    assert len(ours.tokens) < len(split.tokens)
    # What is learnt is the same.
    assert ours.tokens[ours.mask].tolist() == split.tokens[split.mask].tolist()


def test_the_span_in_words(chat):
    got = one(chat, {"messages": CASES["multi"]})
    text = chat.tokenizer.decode(got.tokens[got.mask].tolist(), skip_special_tokens=False)
    assert text == "<think>\nx</think>4<|im_end|>\né\n\nok the end<|im_end|>\n"


def test_generation_blocks_say_the_span_themselves(tmp_path):
    chat = template.load(write_tokenizer(tmp_path, MARKED))
    got = one(chat, {"messages": CASES["step off"]})
    text = chat.tokenizer.decode(got.tokens[got.mask].tolist(), skip_special_tokens=False)
    assert text == A["content"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(tmp_path):
    forgetful = CHATML.replace(
        "'<|im_start|>' + m.role + '\\n' + m.content",
        "'<|im_start|>' + m.role + '\\n' + (m.content if loop.last else m.content[-1:])",
    )
    chat = template.load(write_tokenizer(tmp_path, forgetful))
    with pytest.raises(InvalidRecord, match="generation"):
        one(chat, {"messages": CASES["multi"]})


def test_templates_are_sandboxed(tmp_path):
    evil = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    chat = template.load(write_tokenizer(tmp_path, evil))
    with pytest.raises(InvalidRecord, match="refuses"):
        one(chat, {"messages": [U, A]})


def test_no_template_and_broken_template(tmp_path):
    with pytest.raises(UserError, match="has no chat template"):
        template.load(write_tokenizer(tmp_path / "none", None))
    with pytest.raises(UserError, match="not valid Jinja"):
        template.load(write_tokenizer(tmp_path / "broken", "{% if %}"))


PAIR = [U, A]


@pytest.mark.parametrize(
    "record",
    [
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": A["content"]},
            ]
        },
        {"prompt": "2+2?", "response": A["content"]},
        {"instruction": "2+2?", "input": "", "output": A["content"]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, A]},
        {"messages": [{**U, "tool_calls": None, "name": None}, A]},  # as parquet gives it
    ],
)
def test_every_schema_is_the_same_conversation(chat, record):
    got, want = one(chat, record), one(chat, {"messages": PAIR})
    assert got.tokens.tolist() == want.tokens.tolist() and got.mask.tolist() == want.mask.tolist()


def test_openai_arguments_are_decoded_once(chat):
    text = {**CALL, "function": {"name": "add", "arguments": '{"a": 1, "b": [2, "é"]}'}}
    tool = [CASES["tool"][0], {**CASES["tool"][1], "tool_calls": [text]}, *CASES["tool"][2:]]
    got, want = one(chat, {"messages": tool}), one(chat, {"messages": CASES["tool"]})
    assert got.tokens.tolist() == want.tokens.tolist()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"messages": [U, {"role": "assistant", "content": " "}]},
            "message 2 is an empty assistant",
        ),
        ({"messages": [U]}, "no assistant turn"),
        ({"messages": [U, {"role": "robot", "content": "x"}]}, "role 'robot'"),
        ({"messages": [U, {**A, "step_loss_mask": 0}]}, "taken out of the loss"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien'"),
        ({"text": "x"}, "its keys: text"),
        ({"messages": "nonsense"}, "not valid JSON"),
        ({"messages": [U, {**A, "content": 4}]}, "not text"),
        ([1], "is a list"),
    ],
)
def test_what_cannot_be_trained_on_says_why(record, reason):
    with pytest.raises(InvalidRecord, match=reason):
        conversation.parse(record)
