"""A few rows of a data set as token ids: to calibrate a compression with, and to see what it cost.

`read_samples` draws rows with a fixed seed and splits each into prompt and last answer. Training's own way (all rows, packed, in
order) is `train.data`; this one is for a hundred rows in one process. Called by `compress`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from train.dialogues import load_tokenizer
from train.rows import Dialogue, Row, RowError, parse
from train.sources import find, groups, read, where

COLUMNS = ("messages", "tools", "text", "expected")
LOOKED_AT = 20_000  # rows from the start of the data that the sample is drawn from


@dataclass(frozen=True)
class Sample:
    """One row: token ids of the prompt (of plain text: one token) and of what follows it, and the row's `expected`."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    expected: str | None

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt + self.answer


def read_samples(addresses: Sequence[str], model: Path, rows: int, max_length: int) -> list[Sample]:
    """At most `rows` samples of at most `max_length` tokens; longer ones are cut, and left out where no answer remains.

    Args:
        addresses: As in `train.data`: files, folders, globs, `dataset:NAME/SPLIT`; rows with `messages` or `text`.
        model: Folder with the tokenizer and its chat template.
        rows: How many.
        max_length: In tokens.

    Raises:
        DataError: A row cannot be used, or none is left.
    """
    tokenizer = load_tokenizer(model)
    drawn: list[tuple[Row, str | None]] = []
    draw = random.Random(0)
    for number, row in enumerate(_rows(addresses)):
        if number >= LOOKED_AT:
            break
        if len(drawn) < rows:
            drawn.append(row)
        elif (place := draw.randint(0, number)) < rows:
            drawn[place] = row
    samples = [sample for row, expected in drawn if (sample := _sample(tokenizer, row, expected, max_length)).answer]
    if not samples:
        raise DataError(f"{', '.join(addresses)}: no row has an answer within {max_length} tokens")
    return samples


def _rows(addresses: Sequence[str]) -> Iterator[tuple[Row, str | None]]:
    for piece in (piece for group in groups(find(addresses)) for piece in group):
        for number, raw in read(piece, COLUMNS):
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = raw if isinstance(raw, dict) else _object(raw)
                plain = row.get("messages") is None and row.get("text") is not None
                yield parse(raw, "pretrain" if plain else "sft"), row.get("expected")
            except RowError as error:
                raise DataError(f"{where(piece, number)}: {error}") from error


def _object(line: bytes) -> dict[str, Any]:
    """The row, or nothing of it where `parse` is about to say what is wrong."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _sample(tokenizer: Any, row: Row, expected: str | None, max_length: int) -> Sample:
    if isinstance(row, str):
        # The first token has nothing before it to be foretold from.
        ids = tuple(tokenizer(row)["input_ids"][:max_length])
        return Sample(ids[:1], ids[1:], expected)
    dialogue = row[0]
    last = max(index for index, message in enumerate(dialogue.messages) if message["role"] == "assistant")
    prompt = _rendered(tokenizer, dialogue, last, generate=True)
    whole = _rendered(tokenizer, dialogue, last + 1, generate=False)
    # Some templates write a turn differently once it is answered: the answer begins where the two part.
    shared = next((at for at, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(prompt))
    return Sample(tuple(whole[:shared]), tuple(whole[shared:max_length]), expected)


def _rendered(tokenizer: Any, dialogue: Dialogue, messages: int, *, generate: bool) -> list[int]:
    text = tokenizer.apply_chat_template(
        list(dialogue.messages[:messages]),
        tools=list(dialogue.tools) or None,
        add_generation_prompt=generate,
        tokenize=False,
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
