"""Rows to train on and how to look at what became of them: for the tests of training data."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs

from cluster.train_config import DataConfig
from train.data import Sequences, prepare
from train.packing import NO_LOSS
from train.sources import GROUP_BYTES
from train.storage import Storage

END = "<|im_end|>"


def memory() -> Storage:
    """A filesystem without a move in one step, as object stores are."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Own(MemoryFileSystem):  # the library keeps one store per process
        store: dict = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

    return Storage(fs.PyFileSystem(fs.FSSpecHandler(Own(skip_instance_cache=True))), "bucket/run", "memory://bucket/run")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def dialogues(seed: int, rows: int) -> list[dict[str, Any]]:
    """Rows of one to three turns, no two the same."""
    draw = random.Random(seed)
    made = []
    for row in range(rows):
        messages = [{"role": "system", "content": "You help."}] if draw.random() < 0.3 else []
        for turn in range(draw.choice((1, 1, 2, 3))):
            messages += [
                user(f"Where is order {seed}-{row}-{turn}?" + " please" * draw.randint(0, 9)),
                answer(f"订单 {row} is on its way." + " soon" * draw.randint(0, 9)),
            ]
        made.append({"messages": messages})
    return made


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows))
    return path


def made(folder: Path, into: Storage, *addresses: Any, objective: Any = "sft", **settings: Any) -> Sequences:
    group_bytes = settings.pop("group_bytes", GROUP_BYTES)
    data = DataConfig(train=tuple(str(address) for address in addresses), **{"max_length": 256, **settings})
    prepared = prepare(data, objective, str(folder), into, "train", lambda line: None, group_bytes)
    sequences = Sequences.open(into, prepared.path)
    assert len(sequences) == prepared.sequences
    return sequences


def segments(arrays: dict[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every dialogue in a batch, by its positions; the last run of pads of a sequence is left out."""
    found = []
    for ids, labels, positions in zip(arrays["input_ids"], arrays["labels"], arrays["position_ids"], strict=True):
        starts = [*np.flatnonzero(positions == 0), len(ids)]
        for start, stop in itertools.pairwise(starts):
            assert list(positions[start:stop]) == list(range(stop - start))
            if ids[start:stop].any():  # the pad is token 0, which no dialogue holds
                found.append((list(ids[start:stop]), list(labels[start:stop])))
            else:
                assert stop == len(ids) and (labels[start:stop] == NO_LOSS).all()
    return found


def learned(tokenizer: Any, arrays: dict[str, np.ndarray]) -> list[list[str]]:
    """The texts that loss falls on, of each dialogue."""
    result = []
    for _, labels in segments(arrays):
        runs, last = [], NO_LOSS
        for label in labels:
            if label != NO_LOSS:
                if last == NO_LOSS:
                    runs.append([])
                runs[-1].append(label)
            last = label
        result.append([tokenizer.decode(run) for run in runs])
    return result
