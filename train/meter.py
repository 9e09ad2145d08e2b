"""Counts what a run uses while it runs, over all its starts, and keeps it in the run's `cost.json`.

Written at every checkpoint and at the end, so that a start that is killed loses what it used since its last checkpoint only. The
arithmetic is `train.cost`'s. Called by `train.supervisor`, which is told what happens; it asks nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.train_config import TrainConfig
from train import cost
from train.cost import Usage
from train.storage import Storage

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
CHECKPOINT_BYTES = 12  # per trained parameter: weight and two moments in fp32


class Meter:
    """The counters of one start, on top of what earlier ones used.

    Args:
        config: The run.
        run: Its folder.
        base: Folder of the model it starts from, None when that has no weights yet.
        clock: Seconds that only grow.
    """

    def __init__(self, config: TrainConfig, run: Storage, base: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.run, self.clock = config, run, clock
        self.earlier = cost.read(run)
        self.begun = self.since = clock()
        self.workers = 0
        self.sequence_bytes = 0.0
        self.used = Usage(model_bytes=weights(base) if base is not None else 0)
        self.base_bytes = self.used.model_bytes

    def holds(self, workers: int) -> None:
        """From now on so many workers are held for the run."""
        now = self.clock()
        cpu, gpu = cost.held(self.config.scale, self.workers, now - self.since)
        self.used = replace(
            self.used,
            seconds=now - self.begun,
            cpu_seconds=self.used.cpu_seconds + cpu,
            gpu_seconds=self.used.gpu_seconds + gpu,
        )
        self.workers, self.since = workers, now

    def read(self, source_bytes: int, sequence_bytes: float) -> None:
        """Rows were read to prepare sequences, which have so many bytes each."""
        self.used = replace(self.used, bytes_read=self.used.bytes_read + source_bytes)
        self.sequence_bytes = sequence_bytes

    def stepped(self, lines: Iterable[dict[str, Any]]) -> None:
        """Steps done, as lines of metrics."""
        seconds = [float(line["step_s"]) for line in lines]
        read = int(len(seconds) * self.config.batch_size * self.sequence_bytes)
        self.used = replace(self.used, step_seconds=self.used.step_seconds + sum(seconds), bytes_read=self.used.bytes_read + read)

    def saved(self, size: int) -> None:
        """A checkpoint of so many bytes was written."""
        trained = size // CHECKPOINT_BYTES * BYTES[self.config.precision]
        # Adapters are trained beside the base; all weights are trained in its place.
        whole = trained + self.base_bytes if self.config.lora is not None else trained
        self.used = replace(self.used, checkpoint_bytes=self.used.checkpoint_bytes + size, model_bytes=whole)

    def write(self) -> dict[str, Any]:
        """Bring `cost.json` up to now and return what it says."""
        self.holds(self.workers)
        now = replace(self.used, stored_bytes=self.run.size())
        return cost.write(self.run, self.earlier + now, self.config.price)


def weights(folder: Path) -> int:
    """Bytes of the weights in a Hugging Face folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
