"""One task of preparation: read a group of pieces, check, tokenise and pack their rows, write the sequences as files.

The result of a group depends on the group and the settings only, so it does not matter which process does it, or how many do.
Memory is bounded by a batch of rows, the packer's open sequences and one shard. A shard is a `.npy` file, uint32 [sequences,
streams, max_length], see `train.packing`. `train.data` makes the groups and runs this in its own process or through Ray Data;
`train.check` runs it without writing.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import DataError, TrainError
from cluster.train_config import DataConfig, Objective
from train.dialogues import Encoder, tokenizer_identity
from train.packing import Flagged, Packer, trained_tokens
from train.rows import COLUMNS, Row, RowError, parse
from train.sources import Piece, read, where
from train.storage import Storage

SHARD_BYTES = 16 * 2**20
BATCH_ROWS, BATCH_BYTES = 512, 8 * 2**20  # what is tokenised at once; ends with whichever comes first


@dataclass(frozen=True)
class Work:
    """What is the same for all groups.

    Args:
        objective: Which kind of rows.
        max_length, packing, too_long: See `DataConfig`.
        mistakes: Stop at this many bad rows; None goes on to the end and keeps the texts of the first ones only.
        into: Where shards go; None writes nothing.
        path: Folder below it.
    """

    objective: Objective
    max_length: int
    packing: bool
    too_long: str
    mistakes: int | None = 1
    into: Storage | None = None
    path: str = ""

    @classmethod
    def of(cls, data: DataConfig, objective: Objective) -> Work:
        """The settings of a data set, without a place to write to."""
        return cls(objective, data.max_length, data.packing and objective != "dpo", data.too_long)


@dataclass
class Counted:
    """What came of one or more groups; adds up."""

    shards: list[tuple[str, int]] = field(default_factory=list)  # name and sequences
    sequences: int = 0
    rows: int = 0
    skipped: int = 0  # rows left out for their length
    tokens: int = 0  # without pads
    trained_tokens: int = 0
    bytes_read: int = 0
    bad: int = 0
    mistakes: list[str] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)  # rows by their number of tokens, before any cut

    def add(self, other: Counted) -> None:
        """Add the next group's counts."""
        self.shards += other.shards
        for name in ("sequences", "rows", "skipped", "tokens", "trained_tokens", "bytes_read", "bad"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.mistakes = (self.mistakes + other.mistakes)[:KEPT_MISTAKES]
        self.lengths.update(other.lengths)


KEPT_MISTAKES = 20


def run(group: int, pieces: Sequence[Piece], encoder: Encoder, work: Work) -> Counted:
    """Do one group.

    Args:
        group: Its number, which names its shards.
        pieces: What to read, in order.
        encoder: The tokenizer.
        work: What to do.

    Raises:
        TrainError: a shard cannot be written.
    """
    counted = Counted(bytes_read=sum(piece.size for piece in pieces))
    packer = Packer(work.max_length, encoder.pad, work.packing, encoder.streams)
    shard = _Shard(group, work, encoder.streams, counted)
    for piece in pieces:
        before = counted.rows + counted.bad
        try:
            for batch in _batches(piece, work, counted):
                _encode(batch, piece, encoder, packer, shard, counted)
                if work.mistakes is not None and counted.bad >= work.mistakes:
                    return counted
        except DataError as error:
            _mistake(counted, str(error))
        if piece.whole and counted.rows + counted.bad == before:
            _mistake(counted, f"{piece.file.name}: has no rows; write some into it or take it out")
        if work.mistakes is not None and counted.bad >= work.mistakes:
            return counted
    for sequence in packer.finish():
        shard.add(sequence)
    shard.close()
    return counted


def _batches(piece: Piece, work: Work, counted: Counted) -> Iterator[list[tuple[int, Row]]]:
    """Checked rows with their numbers. Bad ones are counted, and named, here."""
    batch: list[tuple[int, Row]] = []
    size = 0
    for number, raw in read(piece, COLUMNS[work.objective]):
        try:
            if isinstance(raw, RowError):
                raise raw
            row = parse(raw, work.objective)
        except RowError as error:
            _wrong(counted, piece, number, error)
            if work.mistakes is not None and counted.bad >= work.mistakes:
                break
            continue
        batch.append((number, row))
        # A Parquet row comes without its size; its kind of row is small, or one text.
        size += len(raw) if isinstance(raw, bytes) else len(row) if isinstance(row, str) else 2**12
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _encode(
    batch: list[tuple[int, Row]], piece: Piece, encoder: Encoder, packer: Packer, shard: _Shard, counted: Counted
) -> None:
    for (number, _), encoded in zip(batch, encoder.encode([row for _, row in batch]), strict=True):
        if isinstance(encoded, RowError):
            _wrong(counted, piece, number, encoded)
            continue
        counted.rows += 1
        counted.lengths[encoded.length] += 1
        counted.skipped += not encoded.streams
        for streams in encoded.streams:
            counted.tokens += sum(len(stream) for stream in streams)
            counted.trained_tokens += sum(trained_tokens(stream) for stream in streams)
            for sequence in packer.add(*streams):
                shard.add(sequence)


def _wrong(counted: Counted, piece: Piece, number: int, error: RowError) -> None:
    # Finding a line's number can mean reading what is before it, so only what is shown is looked up.
    text = f"{where(piece, number)}: {error}" if len(counted.mistakes) < KEPT_MISTAKES else ""
    _mistake(counted, text)


def _mistake(counted: Counted, text: str) -> None:
    counted.bad += 1
    if len(counted.mistakes) < KEPT_MISTAKES:
        counted.mistakes.append(text)


class _Shard:
    """Sequences gathered until they make a file."""

    def __init__(self, group: int, work: Work, streams: int, counted: Counted) -> None:
        self._group, self._work, self._counted = group, work, counted
        self._full = max(1, SHARD_BYTES // (4 * streams * work.max_length))
        self._held: list[Flagged] = []

    def add(self, sequence: Flagged) -> None:
        self._counted.sequences += 1
        if self._work.into is not None:
            self._held.append(sequence)
            if len(self._held) == self._full:
                self.close()

    def close(self) -> None:
        if not self._held or self._work.into is None:
            return
        name = f"{self._group:06d}-{len(self._counted.shards):03d}.npy"
        content = io.BytesIO()
        np.save(content, np.stack(self._held), allow_pickle=False)
        self._work.into.write_bytes(f"{self._work.path}/{name}", content.getvalue())
        self._counted.shards.append((name, len(self._held)))
        self._held = []


@dataclass(frozen=True)
class Task:
    """`run` for Ray Data: everything it needs travels along, so that a node needs no copy of the tokenizer."""

    tokenizer: dict[str, bytes]
    work: Work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`{"group", "pieces"}` to `{"counted", "failed"}`: pieces pickled, counts as JSON, and the text of an error of writing.

        The error does not pass Ray Data as an exception: it would come out wrapped, and after a stack trace on the terminal.
        """
        encoder = _encoder(_Files(self.tokenizer), self.work.objective, self.work.max_length, self.work.too_long)
        try:
            counted = run(row["group"], pickle.loads(row["pieces"]), encoder, self.work)
        except TrainError as error:
            return {"counted": "", "failed": str(error)}
        return {"counted": json.dumps(vars(counted)), "failed": ""}


def counted_of(row: dict[str, Any]) -> Counted:
    """The counts that a `Task` gave.

    Raises:
        TrainError: it could not write.
    """
    if row["failed"]:
        raise TrainError(row["failed"])
    values = json.loads(row["counted"])
    values["lengths"] = Counter({int(length): rows for length, rows in values["lengths"].items()})
    values["shards"] = [(name, sequences) for name, sequences in values["shards"]]
    return Counted(**values)


class _Files:
    """A tokenizer's files, equal when their content is: the key of a process's cache."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self._identity = files, tokenizer_identity(files)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Files) and other._identity == self._identity

    def __hash__(self) -> int:
        return hash(self._identity)


@functools.lru_cache(maxsize=2)
def _encoder(tokenizer: _Files, objective: Objective, max_length: int, too_long: str) -> Encoder:
    with tempfile.TemporaryDirectory(prefix="tidepool-tokenizer-") as folder:
        for name, content in tokenizer.files.items():
            (Path(folder) / name).write_bytes(content)
        return Encoder(Path(folder), objective, max_length, too_long)
