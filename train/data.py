"""Data of a run: rows are prepared once into sequences of one length, and workers read those by index.

`prepare` finds the files, and has them read, checked, tokenised and packed by tasks of Ray Data (a small data set in this
process, with the same bytes as result) into `data/<hash>/` of the run's storage; the index is written last, and the hash covers
all that decides the content, so a resumed run finds it. `Sequences` reads any of them; `batch_indices` says which belong to a
step, from the seed and the step's number alone, so that a run resumes anywhere on any number of workers. It moves nothing to a
device and starts no Ray. Called by `train.run` (prepare) and `train.loop` (the rest).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError
from cluster.train_config import DataConfig, Objective
from train import shards, sources
from train.dialogues import Encoder, tokenizer_files, tokenizer_identity
from train.packing import WINDOW, unpack
from train.storage import Storage, cannot_read

Say = Callable[[str], None]
Split = Literal["train", "validation"]
FORMAT = 1  # a change of what is written, or of how rows become tokens, must raise it
INDEX = "index.json"
SIDES = ("chosen_", "rejected_")
READERS = 8


@dataclass(frozen=True)
class Prepared:
    """Sequences that are ready.

    `path` is their folder below the storage; `tokens` counts no pads; `rows` counts all rows and `skipped` those left out
    because they are longer than max_length; `bytes_read` is what this call read of the input, 0 when an earlier one had done it
    (`reused`).
    """

    path: str
    sequences: int
    tokens: int
    trained_tokens: int
    rows: int
    skipped: int
    bytes_read: int
    reused: bool


def place(data: DataConfig, run: Storage) -> Storage:
    """Where a run's sequences are: below `data.prepared`, or in its own folder."""
    return Storage.open(data.prepared) if data.prepared else run


def prepare(
    data: DataConfig,
    objective: Objective,
    tokenizer_folder: str,
    into: Storage,
    split: Split,
    say: Say,
    group_bytes: int = sources.GROUP_BYTES,
) -> Prepared:
    """Make the sequences of a split, or find them made.

    Args:
        data: Where rows are and how they become sequences.
        objective: Which kind of rows.
        tokenizer_folder: A Hugging Face folder with tokenizer and chat template.
        into: Storage of the run.
        split: Which addresses of `data`.
        say: Takes each line of progress.
        group_bytes: About this much input is one task's work; what fits in one group needs no Ray.

    Raises:
        DataError: no such files, or a bad row: file, line, what is wrong.
        TrainError: the sequences cannot be written.
    """
    files = sources.find(data.train if split == "train" else data.validation)
    tokenizer = tokenizer_files(Path(tokenizer_folder))
    work = shards.Work.of(data, objective)
    path = f"data/{_key(files, tokenizer, work, group_bytes)}"
    if into.exists(f"{path}/{INDEX}"):
        index = into.read_json(f"{path}/{INDEX}")
        say(f"{split} data: {index['sequences']:,} sequences, prepared before")
        return _prepared(path, index, reused=True)
    into.check_writable()
    total, told = shards.Counted(), 0
    size = sum(file.size for file in files)
    groups = sources.groups(files, group_bytes)
    for counted in counts(groups, tokenizer_folder, tokenizer, replace(work, into=into, path=path)):
        if counted.mistakes:
            raise DataError(counted.mistakes[0])
        total.add(counted)
        if len(groups) > 1 and total.bytes_read * 10 // size > told:
            told = total.bytes_read * 10 // size
            say(f"{split} data: {total.bytes_read / size:.0%} read, {total.rows:,} rows")
    if total.sequences == 0:
        raise DataError(
            f"{', '.join(file.name for file in files[:3])}: no row has at most {data.max_length} tokens; raise max_length"
        )
    index = {
        "format": FORMAT,
        "max_length": work.max_length,
        "streams": 2 if objective == "dpo" else 1,
        "shards": total.shards,
        **{name: getattr(total, name) for name in ("sequences", "rows", "skipped", "tokens", "trained_tokens", "bytes_read")},
    }
    into.write_json(f"{path}/{INDEX}", index)
    filled = total.tokens / (total.sequences * index["streams"] * work.max_length)
    say(
        f"{split} data: {total.rows:,} rows ({total.skipped:,} skipped) in {total.sequences:,} sequences of {work.max_length}, "
        f"{filled:.0%} full, loss on {total.trained_tokens:,} of {total.tokens:,} tokens"
    )
    return _prepared(path, index, reused=False)


def counts(
    groups: Sequence[Sequence[sources.Piece]], folder: str, tokenizer: dict[str, bytes], work: shards.Work
) -> Iterator[shards.Counted]:
    """Do all groups, through Ray Data where there are several and Ray is connected, and give what came of each, in order."""
    if len(groups) == 1 or not _connected():
        encoder = Encoder(Path(folder), work.objective, work.max_length, work.too_long)
        for number, pieces in enumerate(groups):
            yield shards.run(number, pieces, encoder, work)
        return
    import ray.data

    items = [{"group": number, "pieces": pickle.dumps(list(pieces))} for number, pieces in enumerate(groups)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset = dataset.map(shards.Task(tokenizer, work).__call__, num_cpus=1)
    dataset.context.execution_options.preserve_order = True  # so that the first mistake is always the same one
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    log = logging.getLogger("ray.data")
    level = log.level
    log.setLevel(logging.ERROR)  # what it is doing is told by `say`
    try:
        for row in dataset.iter_rows():
            yield shards.counted_of(row)
    finally:
        log.setLevel(level)


def _connected() -> bool:
    import ray

    return bool(ray.is_initialized())


def _key(files: Sequence[sources.SourceFile], tokenizer: dict[str, bytes], work: shards.Work, group_bytes: int) -> str:
    """16 hex digits over all that decides the sequences."""
    # Content is the surer sign; of a large data set only size and time of change are looked at, or this would read it all.
    small = sum(file.size for file in files) <= group_bytes
    content = {
        "format": [FORMAT, group_bytes, shards.SHARD_BYTES, WINDOW],
        "files": [file.identity(by_content=small) for file in files],
        "tokenizer": tokenizer_identity(tokenizer),
        "settings": [work.objective, work.max_length, work.packing, work.too_long],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _prepared(path: str, index: dict[str, Any], reused: bool) -> Prepared:
    numbers = {name: index[name] for name in ("sequences", "tokens", "trained_tokens", "rows", "skipped")}
    return Prepared(path=path, **numbers, bytes_read=0 if reused else index["bytes_read"], reused=reused)


class Sequences:
    """Prepared sequences, read by index: memory maps of local files, ranged reads of others. Not for several threads.

    `max_length` is tokens per sequence, `bytes_read` what `batch` has read so far.
    """

    def __init__(self, storage: Storage, path: str, index: dict[str, Any]) -> None:
        if index["format"] != FORMAT:
            raise DataError(f"{storage.name(path)}: written by another version; delete it, it will be made again")
        self.max_length, self._streams = int(index["max_length"]), int(index["streams"])
        self._storage, self._path = storage, path
        self._names = [name for name, _ in index["shards"]]
        self._starts = np.cumsum([0, *(sequences for _, sequences in index["shards"])])
        self._open = functools.lru_cache(maxsize=256)(self._opened)
        self._readers: ThreadPoolExecutor | None = None
        self.bytes_read = 0

    @classmethod
    def open(cls, into: Storage, prepared_path: str) -> Sequences:
        """Open what `prepare` gave as `path`.

        Raises:
            DataError: it is not there, as on a node that does not share the storage.
        """
        return cls(into, prepared_path, into.read_json(f"{prepared_path}/{INDEX}"))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Sequences as arrays for a model, int64 [len(indices), max_length] each.

        `input_ids`, `labels` (not shifted; -100: no loss) and `position_ids` (from 0 in each dialogue; give no attention mask,
        a model of Transformers then keeps dialogues apart). For dpo each of them twice, with `chosen_` and `rejected_` in
        front.

        Raises:
            DataError: a file cannot be read.
        """
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"sequences {wanted.min()} to {wanted.max()} of {len(self)}")
        found = np.searchsorted(self._starts, wanted, side="right") - 1
        places = [(int(shard), int(row)) for shard, row in zip(found, wanted - self._starts[found], strict=True)]
        if self._storage.local() is None and len(places) > 1:
            self._readers = self._readers or ThreadPoolExecutor(READERS)
            rows = list(self._readers.map(self._row, places))
        else:
            rows = [self._row(place) for place in places]
        flagged = np.stack(rows) if rows else np.zeros((0, self._streams, self.max_length), np.uint32)
        self.bytes_read += flagged.nbytes
        if self._streams == 1:
            return unpack(flagged[:, 0])
        return {f"{side}{name}": array for at, side in enumerate(SIDES) for name, array in unpack(flagged[:, at]).items()}

    def _row(self, place: tuple[int, int]) -> NDArray[np.uint32]:
        shard, row = place
        name = self._storage.name(f"{self._path}/{self._names[shard]}")
        try:
            content, offset = self._open(shard)
            if isinstance(content, np.ndarray):
                return np.asarray(content[row])
            size = 4 * self._streams * self.max_length
            data = content.read_at(size, offset + row * size)
        except (OSError, ValueError) as error:
            cannot_read(name, error)
        return np.frombuffer(data, np.uint32).reshape(self._streams, self.max_length)

    def _opened(self, shard: int) -> tuple[Any, int]:
        """A memory map, or a file and where its numbers begin."""
        path = f"{self._path}/{self._names[shard]}"
        local = self._storage.local(path)
        if local is not None:
            return np.load(local, mmap_mode="r", allow_pickle=False), 0
        file = self._storage.open_input(path)
        head = io.BytesIO(file.read_at(4096, 0))
        np.lib.format.read_magic(head)  # type: ignore[no-untyped-call]
        np.lib.format.read_array_header_1_0(head)  # type: ignore[no-untyped-call]
        return file, head.tell()


@functools.lru_cache(maxsize=4)
def order(sequences: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch: a permutation of `range(sequences)`, read-only, the same wherever it is asked for."""
    permutation = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(sequences)
    permutation.flags.writeable = False
    return permutation


def batch_indices(sequences: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """Sequences of global step `step` (from 0), of all workers together, int64 [batch_size].

    Epochs follow each other without a gap: a batch may hold the end of one and the beginning of the next, so every sequence
    comes once per epoch whatever the batch size.
    """
    first = step * batch_size
    result = np.empty(batch_size, np.int64)
    filled = 0
    while filled < batch_size:
        epoch, at = divmod(first + filled, sequences)
        part = order(sequences, seed, epoch)[at : at + batch_size - filled]
        result[filled : filled + len(part)] = part
        filled += len(part)
    return result


def share(indices: NDArray[np.int64], rank: int, workers: int) -> NDArray[np.int64]:
    """The part of a batch that one worker does: the rank-th of equal contiguous ones."""
    assert len(indices) % workers == 0, f"{len(indices)} sequences cannot be divided among {workers} workers"
    each = len(indices) // workers
    return indices[rank * each : (rank + 1) * each]


def total_steps(sequences: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: the last one is rounded up, so that nothing of the last epoch is left out."""
    steps = max(1, math.ceil(round(epochs * sequences / batch_size, 6)))
    return min(steps, max_steps) if max_steps else steps
