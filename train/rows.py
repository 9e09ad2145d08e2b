"""What one row must look like, and its one form inside: the three kinds of rows that training reads.

- sft: `{"messages": [{"role", "content", "tool_calls"?, "weight"?}, ...], "tools"?}`, OpenAI's format for fine-tuning.
- dpo: `{"prompt" or "messages": [...] or text, "chosen": [...] or a message or text, "rejected": the same, "tools"?}`.
- pretrain: `{"text": ...}`.

`parse` checks a row and says what is wrong with it; it does not know where the row stands (`train.sources` does) and does no
tokenising. Content in parts is joined as vLLM joins it, and arguments of tool calls become objects as vLLM makes them, so that
a model is trained on the prompts it will be served with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cluster.train_config import Objective

ROLES = ("system", "developer", "user", "assistant", "tool")
COLUMNS: dict[Objective, tuple[str, ...]] = {
    "sft": ("messages", "tools"),
    "dpo": ("chosen", "rejected", "prompt", "messages", "tools"),
    "pretrain": ("text",),
}

Message = dict[str, Any]


class RowError(ValueError):
    """What is wrong with a row and what to do; the place is added by the reader."""


@dataclass(frozen=True)
class Dialogue:
    """Messages in the form a chat template takes, and which of them loss falls on."""

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] = ()


# A text, one dialogue, or the chosen and the rejected one.
Row = str | tuple[Dialogue, ...]


def parse(raw: bytes | dict[str, Any], objective: Objective) -> Row:
    """Check a row.

    Args:
        raw: A line of JSONL, or a row of Parquet, whose nested columns may be JSON texts.
        objective: Which kind it must be.

    Raises:
        RowError: it is not.
    """
    row = _object(raw) if isinstance(raw, bytes) else raw
    if objective == "pretrain":
        text = _needed(row, "text")
        if not isinstance(text, str) or not text:
            raise RowError(f"'text' must be a text that is not empty, found {_kind(text)}")
        return text
    tools = _tools(row.get("tools"))
    if objective == "sft":
        dialogue = _dialogue(_messages(_needed(row, "messages"), "messages"), tools)
        if not any(message["role"] == "assistant" for message in dialogue.messages):
            raise RowError("no message with role assistant; there is nothing to learn from, add the answer")
        if not any(dialogue.trained):
            raise RowError("every assistant message has weight 0; give one weight 1 or take the row out")
        return (dialogue,)
    name = "prompt" if row.get("prompt") is not None else "messages"
    if row.get(name) is None:
        raise RowError(f"column 'prompt' is missing, found {', '.join(row) or 'none'}; rename or add it")
    prompt = _dialogue(_messages(row[name], name, alone="user"), tools)
    pair = [_dialogue(_messages(_needed(row, side), side, alone="assistant"), tools) for side in ("chosen", "rejected")]
    for side, answer in zip(("chosen", "rejected"), pair, strict=True):
        if not any(answer.trained):
            raise RowError(f"{side!r} has no message with role assistant; it must be the answer to the prompt")
    silent = (False,) * len(prompt.messages)
    return tuple(Dialogue(prompt.messages + one.messages, silent + one.trained, tools) for one in pair)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"byte {error.start + 1} of the line is not UTF-8; convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        said = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowError(f"is not JSON ({said}); write one object per line") from error
    if not isinstance(value, dict):
        raise RowError(f"must be a JSON object, found {_kind(value)}")
    return value


def _needed(row: dict[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise RowError(f"column {column!r} is missing, found {', '.join(row) or 'none'}; rename or add it")
    return row[column]


def _messages(value: Any, column: str, alone: str | None = None) -> list[Any]:
    """The list behind a column; with `alone`, a text or one message stands for a list with it."""
    if isinstance(value, str):
        try:
            nested = json.loads(value) if alone is None or value.lstrip()[:1] in ("[", "{") else None
        except ValueError as error:
            if alone is None:
                raise RowError(f"{column!r} is a text that is not JSON; write a list of messages") from error
            nested = None
        if alone is not None and not _looks_like_messages(nested):
            return [{"role": alone, "content": value}]
        value = nested
    if isinstance(value, dict) and alone is not None:
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(f"{column!r} must be a list of messages that is not empty, found {_kind(value)}")
    return value


def _looks_like_messages(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and "role" in item for item in items)


def _dialogue(values: list[Any], tools: tuple[dict[str, Any], ...]) -> Dialogue:
    messages, trained = [], []
    for number, value in enumerate(values, start=1):
        message, weight = _message(value, f"message {number}")
        messages.append(message)
        trained.append(message["role"] == "assistant" and weight)
    return Dialogue(tuple(messages), tuple(trained), tools)


def _message(value: Any, spot: str) -> tuple[Message, bool]:
    if not isinstance(value, dict):
        raise RowError(f"{spot} must be an object with role and content, found {_kind(value)}")
    message = {name: item for name, item in value.items() if item is not None}
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"{spot} has the unknown role {role!r}; use one of {', '.join(ROLES)}")
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise RowError(f"{spot} has weight {weight!r}; write 0 or 1")
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = _calls(calls, spot)
    elif calls is not None:
        del message["tool_calls"]
    if "content" not in message and not calls:
        raise RowError(f"{spot} ({role}) has no content")
    message["content"] = _content(message.get("content", ""), spot)
    if role == "assistant" and not message["content"] and not calls:
        raise RowError(f"{spot} (assistant) is empty; there is nothing to learn from, add the answer")
    return message, bool(weight)


def _content(value: Any, spot: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "\n".join(part["text"] for part in value)
    raise RowError(f"{spot}: content must be a text, or parts of type text, found {_kind(value)}")


def _calls(value: Any, spot: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = _nested(value, f"{spot}: tool_calls")
    calls = []
    for call in _without_nulls(value) if isinstance(value, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f'{spot}: tool_calls must be a list of {{"type": "function", "function": {{"name", "arguments"}}}}')
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _nested(arguments, f"{spot}: arguments of {function['name']}")
        if not isinstance(arguments, dict):
            raise RowError(f"{spot}: arguments of {function['name']} must be a JSON object, found {_kind(arguments)}")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        value = _nested(value, "'tools'") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"'tools' must be a list of tool definitions, found {_kind(value)}")
    return tuple(_without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """A struct column holds every field for every row; those that a row lacks are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _nested(text: str, spot: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(f"{spot}: is a text that is not JSON") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    if value in ("", [], {}):
        return f"an empty {names[type(value)].split()[-1]}"
    return names.get(type(value), "nothing" if value is None else type(value).__name__)
