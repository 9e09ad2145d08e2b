"""A few rows of a data set as token ids: to calibrate a compression with, and to see what it cost.

`read_samples` draws rows with a fixed seed and splits each into prompt and last answer, by the tokens that training puts loss on.
Training's own way (all rows, packed, in order) is `train.data`; this one is for a hundred rows in one process. Called by
`compress`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from cluster.train_config import Objective
from train.dialogues import Encoder
from train.packing import ID, TRAINED
from train.rows import Row, RowError, parse
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
    drawn: list[tuple[Row, str | None]] = []
    draw = random.Random(0)
    for number, row in enumerate(_rows(addresses)):
        if number >= LOOKED_AT:
            break
        if len(drawn) < rows:
            drawn.append(row)
        elif (place := draw.randint(0, number)) < rows:
            drawn[place] = row
    encoders = {kind: Encoder(model, kind, max_length, "truncate") for kind in {_kind(row) for row, _ in drawn}}
    samples = [sample for row, expected in drawn if (sample := _sample(encoders[_kind(row)], row, expected)) is not None]
    if not samples:
        raise DataError(f"{', '.join(addresses)}: no row has an answer within {max_length} tokens")
    return samples


def _kind(row: Row) -> Objective:
    return "pretrain" if isinstance(row, str) else "sft"


def _rows(addresses: Sequence[str]) -> Iterator[tuple[Row, str | None]]:
    for piece in (piece for group in groups(find(addresses)) for piece in group):
        for number, raw in read(piece, COLUMNS):
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = raw if isinstance(raw, dict) else _object(raw)
                plain = row.get("messages") is None and row.get("text") is not None
                yield parse(raw, "pretrain" if plain else "sft"), row.get("expected") or None
            except RowError as error:
                raise DataError(f"{where(piece, number)}: {error}") from error


def _object(line: bytes) -> dict[str, Any]:
    """The row, or nothing of it where `parse` is about to say what is wrong."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _sample(encoder: Encoder, row: Row, expected: str | None) -> Sample | None:
    """The last run of tokens that training would put loss on, and what is before it; None when the cut leaves none."""
    (encoded,) = encoder.encode([row])
    if isinstance(encoded, RowError):
        raise DataError(f"a row of the sample {encoded}")
    if not encoded.streams:
        return None
    flagged = encoded.streams[0][0]
    ids = [int(token) for token in flagged & ID]
    trained = [bool(token) for token in flagged & TRAINED]
    # The first token of a text has nothing before it to be foretold from.
    trained[0] = False
    if True not in trained:
        return None
    end = len(trained) - trained[::-1].index(True)
    start = next((at for at in range(end, 0, -1) if not trained[at - 1]), 0)
    return Sample(tuple(ids[:start]), tuple(ids[start:end]), expected)
