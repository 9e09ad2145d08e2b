"""What a run writes for people to look at: metrics.jsonl, TensorBoard's event files, Ray's metrics.

All three hold one entry per optimizer step. metrics.jsonl is rewritten as a whole, since object stores cannot append, and the
less often the longer it takes: at most a hundredth of the time. After a resume from step N the entries behind N are dropped:
their steps are done again. Called by the supervisor, in its process.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from train.gauges import RunGauges
from train.storage import Storage

FOLDER = "log"
METRICS = "metrics.jsonl"
SHARE = 100  # a write that takes t seconds is followed by SHARE * t without one
SHORTEST_S = 1.0
SCALARS = ("loss", "lr", "grad_norm", "tokens_per_s", "validation_loss", "accuracy", "workers")


class RunLog:
    """The log of one run.

    Args:
        run: The run's folder; what it holds already is read and continued.
        name: The run's name, a tag of Ray's metrics.
    """

    def __init__(self, run: Storage, name: str) -> None:
        self.home, self.name = run.below(FOLDER), name
        self.lines: list[dict[str, Any]] = _old(self.home)
        self.due = time.monotonic() + SHORTEST_S
        self.dirty = False
        self.events: _Events | None = None
        self.gauges = RunGauges(name)

    def rewind(self, step: int) -> None:
        """Forget the steps behind `step`: they will come again."""
        self.lines = [line for line in self.lines if line["step"] <= step]

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Steps in order."""
        self.lines += lines
        self.dirty = True
        self.gauges.show(lines[-1])
        if time.monotonic() >= self.due:
            self.flush()

    def measured(self, step: int, validation_loss: float) -> None:
        """The validation loss after a step that was added before."""
        for line in reversed(self.lines):
            if line["step"] == step:
                line["validation_loss"] = validation_loss
                self.gauges.show(line)
                self.dirty = True
                return

    def flush(self) -> None:
        """Write what is not written yet."""
        if not self.dirty:
            return
        begun = time.monotonic()
        self.home.write_bytes(METRICS, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        if self.events is None:
            self.events = _Events(self.home, self.lines[0]["step"])
        self.events.write(self.lines)
        now = time.monotonic()
        self.due = now + max(SHORTEST_S, SHARE * (now - begun))
        self.dirty = False

    def close(self) -> None:
        """Write the rest."""
        self.gauges.close()
        self.flush()
        if self.events is not None:
            self.events.close()


def _old(home: Storage) -> list[dict[str, Any]]:
    if not home.exists(METRICS):
        return []
    try:
        return [json.loads(line) for line in home.read_bytes(METRICS).splitlines()]
    except ValueError as error:
        raise DataError(f"{home.name(METRICS)}: is not JSON lines; move it away") from error


class _Events:
    """TensorBoard's event file of this start of a run; elsewhere than on a local disk it is copied with each write."""

    def __init__(self, home: Storage, first: int) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.home = home
        self.local = home.local()
        self.folder = self.local or Path(tempfile.mkdtemp(prefix="tidepool-events-"))
        self.writer = EventFileWriter(str(self.folder))
        self.written = first - 1

    def write(self, lines: list[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for line in lines:
            # The newest one waits: its validation loss may not be there yet.
            if line["step"] <= self.written or line is lines[-1]:
                continue
            values = [Summary.Value(tag=key, simple_value=line[key]) for key in SCALARS if line.get(key) is not None]
            self.writer.add_event(Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values)))
            self.written = line["step"]
        self.writer.flush()
        if self.local is None:
            for path in self.folder.iterdir():
                self.home.put(path, path.name)

    def close(self) -> None:
        self.writer.close()
