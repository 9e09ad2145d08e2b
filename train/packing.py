"""From rows of tokens to sequences of one length, and back to the arrays a model takes.

A token takes 32 bits on disk: its id, and two flags (loss falls on it; a dialogue starts here). That is all a sequence needs:
labels and positions follow from the flags. `Packer` puts rows into sequences: with packing, first-fit into a bounded number of
open ones, so that memory is bounded and the result depends on nothing but the order of the rows; without, one row each. The run
of pads at the end is a segment of its own. Nothing here reads files; `train.data` is the caller.

Loss is on the token itself (labels are not shifted, as Hugging Face models expect), and never on the first token of a dialogue:
the token before it belongs to another one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Flagged = NDArray[np.uint32]
TRAINED = np.uint32(1 << 31)
START = np.uint32(1 << 30)
ID = np.uint32((1 << 30) - 1)
NO_LOSS = -100
WINDOW = 64  # open sequences; more pack a little tighter and cost more per row


def flag(ids: NDArray[np.int64], trained: NDArray[np.bool_]) -> Flagged:
    """One row for disk from token ids and whether loss falls on each, both [n]."""
    row = np.asarray(ids).astype(np.uint32)
    row[trained] |= TRAINED
    row[:1] = (row[:1] & ID) | START
    return row


def trained_tokens(flagged: Flagged) -> int:
    """Tokens with loss."""
    return int(np.count_nonzero(flagged & TRAINED))


def unpack(flagged: Flagged) -> dict[str, NDArray[np.int64]]:
    """`input_ids`, `labels` (-100: no loss) and `position_ids` (from 0 in each dialogue), int64, each in the given shape."""
    ids = (flagged & ID).astype(np.int64)
    labels = np.where(flagged & TRAINED, ids, NO_LOSS)
    at = np.arange(flagged.shape[-1])
    first = np.maximum.accumulate(np.where(flagged & START, at, 0), axis=-1)
    return {"input_ids": ids, "labels": labels, "position_ids": at - first}


class Packer:
    """Rows in, sequences out, in an order that depends on the rows alone.

    Args:
        length: Tokens of a sequence.
        pad: Token id that fills up.
        packing: Several rows share a sequence.
        streams: Rows that belong together, such as 2 for a chosen and a rejected answer; only 1 can be packed.
    """

    def __init__(self, length: int, pad: int, packing: bool, streams: int = 1) -> None:
        assert not (packing and streams > 1)
        self.length, self.pad, self.packing, self.streams = length, pad, packing, streams
        self._open: list[list[Flagged]] = []
        self._room: list[int] = []

    def add(self, *rows: Flagged) -> Iterator[Flagged]:
        """Take one row of each stream, each of 1 to `length` tokens; yields finished sequences [streams, length]."""
        assert len(rows) == self.streams and all(0 < len(row) <= self.length for row in rows)
        if not self.packing:
            yield np.stack([self._filled([row]) for row in rows])
            return
        (row,) = rows
        spot = next((spot for spot, room in enumerate(self._room) if len(row) <= room), None)
        if spot is None:
            if len(self._open) == WINDOW:
                yield self._close(0)
            spot = len(self._open)
            self._open.append([])
            self._room.append(self.length)
        self._open[spot].append(row)
        self._room[spot] -= len(row)
        if self._room[spot] == 0:
            yield self._close(spot)

    def finish(self) -> Iterator[Flagged]:
        """The sequences still open, oldest first."""
        while self._open:
            yield self._close(0)

    def _close(self, spot: int) -> Flagged:
        self._room.pop(spot)
        return self._filled(self._open.pop(spot))[None]

    def _filled(self, rows: list[Flagged]) -> Flagged:
        pads = np.full(self.length - sum(len(row) for row in rows), self.pad, np.uint32)
        pads[:1] |= START
        return np.concatenate([*rows, pads])
