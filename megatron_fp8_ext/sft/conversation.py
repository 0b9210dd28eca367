"""One record of a data set -> chat messages. Three schemas: OpenAI, ShareGPT, prompt and response."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_ROLES = ("system", "user", "assistant", "tool")
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
)


class InvalidRecord(Exception):
    """A record that cannot be trained on; the message says why, in a clause."""


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them.

    Attributes:
        messages: dicts with `role`, `content` and, for assistants, maybe `tool_calls`.
        supervised: for each message, whether its tokens count in the loss.
        tools: tool descriptions for the template, or None.
    """

    messages: list[dict[str, Any]]
    supervised: list[bool]
    tools: list[Any] | None = None


def parse(record: Any) -> Conversation:
    """Return the conversation of one record.

    `step_loss_mask: 0` (slime) or `weight: 0` (OpenAI) in an assistant message takes it out of the loss.

    Raises:
        InvalidRecord: unknown schema or role, an empty or missing assistant turn.
    """
    if not isinstance(record, dict):
        raise InvalidRecord(f"a record is a JSON object, and this is a {type(record).__name__}")
    raw = _messages(record)
    if not raw:
        raise InvalidRecord("it has no messages")
    messages = [_clean(number, message) for number, message in enumerate(raw, start=1)]
    supervised = [
        message["role"] == "assistant"
        and (1 if source.get("step_loss_mask") is None else source["step_loss_mask"]) == 1
        and source.get("weight") != 0
        for message, source in zip(messages, raw, strict=True)
    ]
    if not any(message["role"] == "assistant" for message in messages):
        raise InvalidRecord("it has no assistant turn, so nothing to learn")
    if not any(supervised):
        raise InvalidRecord("every assistant turn is taken out of the loss")
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if tools is not None and not isinstance(tools, list):
        raise InvalidRecord("'tools' is not a list")
    return Conversation(messages, supervised, tools or None)


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    for key in ("messages", "conversations"):
        found = record.get(key)
        if found is None:
            continue
        if isinstance(found, str):
            found = _json(found, key)
        if not isinstance(found, list) or not all(isinstance(m, dict) for m in found):
            raise InvalidRecord(f"'{key}' is not a list of objects")
        if any("from" in message for message in found):
            return [_from_sharegpt(n, message) for n, message in enumerate(found, start=1)]
        return found
    for prompt, response in _PAIRS:
        if prompt in record and response in record:
            return _from_pair(record, prompt, response)
    raise InvalidRecord(
        "it has neither 'messages', 'conversations' nor a prompt and response (its keys: "
        f"{', '.join(list(map(str, record))[:8]) or 'none'})"
    )


def _from_pair(record: dict[str, Any], prompt: str, response: str) -> list[dict[str, Any]]:
    question = record[prompt]
    if prompt == "instruction" and record.get("input"):
        question = f"{question}\n{record['input']}"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": record[response]},
    ]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return messages


def _from_sharegpt(number: int, message: dict[str, Any]) -> dict[str, Any]:
    source, value = message.get("from"), message.get("value")
    role = _SHAREGPT_ROLES.get(str(source))
    if role is None:
        raise InvalidRecord(
            f"message {number} is from '{source}', not one of {', '.join(_SHAREGPT_ROLES)}"
        )
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if source == "function_call":
        call = _json(value, f"function call of message {number}")
        calls = call if isinstance(call, list) else [call]
        return {**rest, "role": role, "content": "", "tool_calls": calls}
    return {**rest, "role": role, "content": value}


def _clean(number: int, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in _ROLES:
        raise InvalidRecord(f"message {number} has role '{role}', not one of {', '.join(_ROLES)}")
    content = _text(number, message.get("content"))
    # Parquet gives every struct every field; templates test for presence.
    kept = {
        key: value
        for key, value in message.items()
        if value is not None and key not in ("step_loss_mask", "weight")
    }
    kept |= {"role": role, "content": content}
    calls = kept.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, list):
            raise InvalidRecord(f"'tool_calls' of message {number} is not a list")
        kept["tool_calls"] = [_call(number, call) for call in calls]
    if role == "assistant" and not calls and not content.strip():
        raise InvalidRecord(f"message {number} is an empty assistant turn")
    return kept


def _call(number: int, call: Any) -> dict[str, Any]:
    """OpenAI writes `arguments` as a JSON string; templates expect the object itself."""
    if not isinstance(call, dict):
        raise InvalidRecord(f"a tool call of message {number} is not an object")
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not inner.get("name"):
        raise InvalidRecord(f"a tool call of message {number} has no name")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"tool call arguments of message {number}")
    return {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def _text(number: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    if not isinstance(content, str):
        raise InvalidRecord(f"the content of message {number} is not text")
    return content


def _json(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise InvalidRecord(f"the {what} is not valid JSON ({error})") from error
