"""How right answers are: compares what a model said to the held-out customer-service dialogues with what it should have said.

Three figures, from strict to lenient: `accuracy`, the whole answer is the expected one but for white space; `intent_accuracy`, it
is the answer of the right intent, whatever stands for the copied values; `slot_accuracy`, of the dialogues with such values,
all of them are in the answer. Pure; it asks nobody. Called by `evaluate` and by tests.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.errors import DataError

HELDOUT = Path(__file__).parent / "datasets" / "assistant" / "heldout.parquet"


@dataclass(frozen=True)
class Question:
    """A dialogue without its last answer, which is `expected`."""

    messages: tuple[dict[str, str], ...]
    intent: str
    language: str
    turns: int
    slots: dict[str, str]
    template: str
    expected: str

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The expected answer with anything in place of its values."""
        text = re.escape(tidy(self.expected))
        for value in sorted(self.slots.values(), key=len, reverse=True):
            text = text.replace(re.escape(tidy(value)), ".+")
        return re.compile(text)


@dataclass(frozen=True)
class Mark:
    """What one answer is worth."""

    question: Question
    exact: bool
    intent: bool
    slots: bool | None  # None where there is nothing to copy


def questions(path: Path = HELDOUT, limit: int | None = None) -> list[Question]:
    """The held-out dialogues; with a limit, that many, spread evenly over the file.

    Raises:
        DataError: the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error
    if limit is not None and limit < len(rows):
        rows = [rows[number * len(rows) // limit] for number in range(limit)]
    return [
        Question(
            messages=tuple(row["messages"][:-1]),
            intent=row["intent"],
            language=row["language"],
            turns=row["turns"],
            slots=json.loads(row["slots"]),
            template=row["template"],
            expected=row["expected"],
        )
        for row in rows
    ]


def tidy(text: str) -> str:
    """Runs of white space as one blank, none at the ends."""
    return " ".join(text.split())


def mark(question: Question, answer: str) -> Mark:
    """Compare one answer."""
    said = tidy(answer)
    exact = said == tidy(question.expected)
    values = question.slots.values()
    return Mark(
        question,
        exact,
        exact or question.pattern.fullmatch(said) is not None,
        all(tidy(value) in said for value in values) if values else None,
    )


def summary(marks: Sequence[Mark]) -> dict[str, Any]:
    """The figures of a whole run: parts of 1, rounded to 4 digits, and how many questions each stands for."""
    groups: dict[str, dict[str, list[bool]]] = {name: defaultdict(list) for name in ("languages", "turns", "intents")}
    for one in marks:
        groups["languages"][one.question.language].append(one.exact)
        groups["turns"][str(one.question.turns)].append(one.exact)
        groups["intents"][one.question.intent].append(one.exact)
    copied = [one.slots for one in marks if one.slots is not None]
    return {
        "accuracy": _part(one.exact for one in marks),
        "intent_accuracy": _part(one.intent for one in marks),
        "slot_accuracy": _part(copied),
        "questions": len(marks),
        "with_slots": len(copied),
        **{name: {key: _part(values) for key, values in sorted(group.items())} for name, group in groups.items()},
    }


def _part(values: Iterable[bool]) -> float:
    listed = list(values)
    return round(sum(listed) / len(listed), 4) if listed else 0.0
