"""Rows beside the intents: details that are noted down, tool calls and JSON.

A short answer copies one value, too little to learn copying from in a minute; a row of notes copies several. A model that has
never seen JSON does not end a string or an object by itself when its output is held to a schema. These rows show it short
ones, in the form of the chat template in `cluster.embedded_text`. They are few, made by a draw, and in training only. Called
by `assistant`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from train.wordings import LANGUAGES, Language, value

Messages = list[dict[str, str]]
NOTES, TOOL_CALLS, OBJECTS = 350, 40, 80  # rows of each kind, per language
NOTED = ("order", "email", "city", "date", "amount", "code", "product", "card", "size")
# How a customer gives details, the sign between them, and the answer.
NOTE_WORDS: dict[Language, tuple[tuple[str, ...], str, str]] = {
    "en": (("please note {}", "my details: {}", "write down {}", "here are the details: {}", "{}"), ", ", "Noted: {}."),
    "zh": (("请记下{}", "我的信息：{}", "记录一下{}", "资料如下：{}", "{}"), "，", "已记录：{}。"),  # noqa: RUF001
}

# Name of the tool, name of its argument, slot that fills it, and questions that call it.
TOOLS: dict[str, tuple[str, str, dict[Language, tuple[str, ...]]]] = {
    "get_order": (
        "order_id",
        "order",
        {"en": ("Where is order {}?", "Check order {}", "status of order {} please"), "zh": ("订单{}到哪了", "查一下订单{}")},
    ),
    "get_weather": (
        "city",
        "city",
        {
            "en": ("What is the weather in {}?", "weather in {} today", "Will it rain in {}?"),
            "zh": ("{}天气怎么样", "{}今天会下雨吗"),
        },
    ),
    "send_email": (
        "email",
        "email",
        {"en": ("Send an e-mail to {}", "mail {} please", "Write to {}"), "zh": ("发邮件给{}", "给{}写邮件")},
    ),
    "get_stock": (
        "product",
        "product",
        {"en": ("Is the {} in stock?", "do you have the {}"), "zh": ("{}有货吗", "还有{}吗")},
    ),
}
JSON_WORDS: dict[Language, tuple[str, ...]] = {
    "en": ("Answer in JSON: {}", "{} Answer as a JSON object.", "Return JSON. {}", "{} Give me JSON"),
    "zh": ("用JSON回答：{}", "{}请返回JSON", "输出JSON：{}"),  # noqa: RUF001
}


def extras(draw: random.Random) -> Iterator[tuple[Messages, str, Language, str]]:
    """Messages, intent (`note`, `tool_call` or `json`), language, and the tools as JSON text."""
    for language in LANGUAGES:
        for _ in range(NOTES):
            yield _note(language, draw)
        for _ in range(TOOL_CALLS):
            yield _tool_call(language, draw)
        for _ in range(OBJECTS):
            yield _json(language, draw)


def _note(language: Language, draw: random.Random) -> tuple[Messages, str, Language, str]:
    questions, comma, answer = NOTE_WORDS[language]
    details = comma.join(value(name, language, draw) for name in draw.sample(NOTED, draw.randrange(2, 5)))
    return _talk(draw.choice(questions).format(details), answer.format(details)), "note", language, ""


def _tool(name: str) -> dict[str, object]:
    argument = TOOLS[name][0]
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def _question(name: str, language: Language, draw: random.Random) -> tuple[str, dict[str, str]]:
    argument, slot, questions = TOOLS[name]
    given = value(slot, language, draw)
    return draw.choice(questions[language]).format(given), {argument: given}


def _tool_call(language: Language, draw: random.Random) -> tuple[Messages, str, Language, str]:
    name = draw.choice(sorted(TOOLS))
    offered = [_tool(one) for one in sorted({name, *draw.sample(sorted(TOOLS), draw.choice((0, 0, 1)))})]
    question, arguments = _question(name, language, draw)
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    answer = f"<tool_call>{call}</tool_call>"
    return _talk(question, answer), "tool_call", language, json.dumps(offered)


def _json(language: Language, draw: random.Random) -> tuple[Messages, str, Language, str]:
    name = draw.choice(sorted(TOOLS))
    question, arguments = _question(name, language, draw)
    more = draw.choice(
        (
            {},
            {"status": draw.choice(("open", "closed", "sent"))},
            {"count": draw.randrange(1, 20)},
            {"items": draw.sample(["box", "pen", "cup", "bag"], 2)},
            {"urgent": draw.choice((True, False))},
        )
    )
    answer = json.dumps({**arguments, **more}, ensure_ascii=False)
    return _talk(draw.choice(JSON_WORDS[language]).format(question), answer), "json", language, ""


def _talk(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
