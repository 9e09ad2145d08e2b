"""Packing and order: every token of every row once per epoch, on any number of workers, from any step on."""

from __future__ import annotations

import collections
import random

import numpy as np
from training_rows import dialogues, made, segments, write

from train.data import batch_indices, order, share, total_steps
from train.packing import Packer, flag, unpack
from train.storage import Storage


def test_packing_loses_nothing_and_keeps_dialogues_apart():
    import torch
    from transformers.masking_utils import find_packed_sequence_indices

    for seed in range(20):
        draw = np.random.default_rng(seed)
        length = int(draw.integers(4, 40))
        rows = [flag(draw.integers(1, 99, size), draw.random(size) < 0.5) for size in draw.integers(1, length + 1, 300)]
        for packing in (True, False):
            packer = Packer(length, 0, packing)
            packed = [sequence for row in rows for sequence in packer.add(row)] + list(packer.finish())
            arrays = unpack(np.concatenate(packed))
            assert collections.Counter(map(str, segments(arrays))) == collections.Counter(
                str(segments(unpack(row[None]))[0]) for row in rows
            )
            tokens = sum(len(row) for row in rows)
            assert len(packed) < 1.15 * tokens / length + 1 if packing and length > 10 else len(packed) <= len(rows)
            apart = find_packed_sequence_indices(torch.from_numpy(arrays["position_ids"]))
            starts = arrays["position_ids"] == 0
            if apart is not None:
                assert (apart.numpy() == np.cumsum(starts, axis=1) - 1).all()


def test_every_sequence_comes_once_per_epoch_on_any_number_of_workers():
    for seed in range(30):
        draw = random.Random(seed)
        sequences, batch_size = draw.randint(1, 50), 6 * draw.randint(1, 4)
        epochs = 3 * batch_size
        steps = epochs * sequences // batch_size
        one = np.concatenate([batch_indices(sequences, batch_size, seed, step) for step in range(steps)])
        for epoch in range(epochs):
            assert sorted(one[epoch * sequences : (epoch + 1) * sequences]) == list(range(sequences))
        for workers in (1, 2, 3):
            step = draw.randrange(steps)
            whole = batch_indices(sequences, batch_size, seed, step)  # asked for alone: a resume needs nothing but the number
            assert (whole == one[step * batch_size : (step + 1) * batch_size]).all()
            parts = [share(whole, rank, workers) for rank in range(workers)]
            assert (np.concatenate(parts) == whole).all() and len({len(part) for part in parts}) == 1
    assert (order(100, 1, 0) != order(100, 1, 1)).any() and (order(100, 1, 0) != order(100, 2, 0)).any()


def test_every_token_of_every_row_comes_once_per_epoch(chat_folder, tmp_path):
    for seed in range(3):
        path = write(tmp_path / f"{seed}.jsonl", dialogues(seed, 150))
        alone = made(chat_folder, Storage.open(str(tmp_path / "out")), path, packing=False)
        wanted = collections.Counter(map(str, segments(alone.batch(range(len(alone))))))
        assert sum(wanted.values()) == 150
        packed = made(chat_folder, Storage.open(str(tmp_path / "out")), path)
        assert len(packed) < 100
        count = len(packed)
        for workers in (1, 2, 3):
            # Batches of 6 do not fit into an epoch: what is left over comes first in the next one.
            steps = range(6 * count // 6)
            batches = [
                packed.batch(share(batch_indices(count, 6, seed, step), rank, workers))
                for step in steps
                for rank in range(workers)
            ]
            found = collections.Counter(str(segment) for arrays in batches for segment in segments(arrays))
            assert found == {segment: 6 * times for segment, times in wanted.items()}


def test_steps_round_up():
    assert [total_steps(10, 4, epochs, None) for epochs in (0.01, 1, 2, 2.1)] == [1, 3, 5, 6]
    assert total_steps(10, 4, 100, 7) == 7 and total_steps(30, 10, 0.1 * 3, None) == 1
