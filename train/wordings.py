"""How the customer-service data set is worded: reads the YAML files of `datasets/assistant` and fills their patterns.

A pattern is a line of text with three signs: `(a|b)` is one of them, `[x]` is left out when the customer forgets the detail, and
`{order}` is a value which the answer repeats. Each line is a template with an id of its own; a line is used either for training
or for the held-out split, never for both. Plain text work; called by `assistant`, which decides how many of what.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

Language = Literal["en", "zh"]
Split = Literal["train", "heldout"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
FOLDER = Path(__file__).parent / "datasets" / "assistant"
OUT_OF_SCOPE = "out_of_scope"
_GROUP = re.compile(r"\(([^()]*)\)")
_NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """One wording. `id` is `intent/language/split/number`."""

    id: str
    text: str

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the values in it, in order."""
        return tuple(dict.fromkeys(_NAME.findall(self.text)))

    @property
    def forgettable(self) -> bool:
        """Whether the customer can leave the value out."""
        return "[" in self.text


@dataclass(frozen=True)
class Intent:
    """What a customer may want, in one language."""

    name: str
    language: Language
    answer: str
    train: tuple[Template, ...]
    heldout: tuple[Template, ...]

    def templates(self, split: Split) -> tuple[Template, ...]:
        """Those of one split."""
        return self.train if split == "train" else self.heldout


@cache
def talk(language: Language) -> dict[str, Any]:
    """What surrounds the wordings: openers, closers, values, requests for a detail."""
    value: dict[str, Any] = yaml.safe_load((FOLDER / f"talk-{language}.yaml").read_text())
    return value


@cache
def intents(language: Language) -> tuple[Intent, ...]:
    """All intents of a language in the order of the file; the last is `out_of_scope`."""
    raw = yaml.safe_load((FOLDER / f"intents-{language}.yaml").read_text())
    raw[OUT_OF_SCOPE] = talk(language)[OUT_OF_SCOPE]

    def templates(name: str, split: Split) -> tuple[Template, ...]:
        lines = [line.strip() for line in raw[name][split].splitlines() if line.strip()]
        return tuple(Template(f"{name}/{language}/{split}/{number:02}", line) for number, line in enumerate(lines))

    return tuple(
        Intent(name, language, raw[name]["answer"], templates(name, "train"), templates(name, "heldout")) for name in raw
    )


def spelled(text: str, draw: random.Random, *, bare: bool = False) -> str:
    """A pattern with its choices made; values stay as `{name}`.

    Args:
        bare: Leave out what is in square brackets.
    """
    text = re.sub(r"\[[^\[\]]*\]", "", text) if bare else text.replace("[", "").replace("]", "")
    while group := _GROUP.search(text):
        text = text[: group.start()] + draw.choice(group[1].split("|")) + text[group.end() :]
    return re.sub(r" +(?=[ ,.?!])", "", text).strip(" ")


def filled(text: str, values: dict[str, str]) -> str:
    """The text with each `{name}` replaced by its value."""
    return _NAME.sub(lambda name: values[name[1]], text)


def value(name: str, language: Language, draw: random.Random) -> str:
    """A value for a slot or an off-topic subject, as a customer of that language writes it."""
    lists = talk(language)["values"]
    number = draw.randrange
    match name:
        case "order":
            return str(number(1000, 10_000))
        case "card":
            return str(number(1000, 10_000))
        case "count":
            return str(draw.choice((number(10, 100), 10 * number(10, 60))))
        case "code":
            return f"{draw.choice(lists['code'])}{number(10, 100)}"
        case "email":
            digits = draw.choice(("", str(number(10, 100))))
            return f"{draw.choice(lists['name'])}{digits}@{draw.choice(lists['domain'])}"
        case "amount" if language == "en":
            return draw.choice((f"${number(10, 400)}", f"{number(10, 400)} dollars", f"{number(10, 400)} euros"))
        case "amount":
            return f"{number(10, 900)}{draw.choice(('元', '块'))}"
        case "phone" if language == "en":
            return draw.choice((f"0{number(150, 180)} {number(100_000, 10_000_000)}", f"555 {number(1000, 10_000)}"))
        case "phone":
            return f"1{number(30, 90)}{number(10_000_000, 100_000_000)}"
        case "date" if language == "en":
            day, month = number(1, 29), draw.choice(lists["month"])
            return draw.choice((f"{month} {day}", f"{day} {month}", f"next {draw.choice(lists['weekday'])}"))
        case "date":
            return draw.choice((f"{number(1, 13)}月{number(1, 29)}日", f"{number(1, 29)}号", draw.choice(lists["weekday"])))
        case _:
            topics = talk(language)[OUT_OF_SCOPE]["topics"]
            return str(draw.choice(lists[name] if name in lists else topics[name]))
