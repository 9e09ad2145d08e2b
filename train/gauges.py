"""A training run's newest figures as gauges in Ray's metrics, for Prometheus.

Ray's metrics agents forget a gauge that was not set for 20 s, and a step may take longer: a thread sets them again until the
run is over. So the series of a run that waits for workers stay, and those of one that ended go.
`tidepool_train_last_step_timestamp_seconds` is when the last step was told, which is how an alert sees that no more come. Made
by `train.log`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

PERIOD_S = 5.0
KEYS = ("step", "loss", "lr", "grad_norm", "tokens_per_s", "validation_loss", "accuracy", "workers")
AT = "last_step_timestamp_seconds"


class RunGauges:
    """The gauges of one run; `run` is their label."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._values: dict[str, float] = {}
        self._gauges: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def show(self, line: dict[str, Any]) -> None:
        """The figures of a step, as they are in metrics.jsonl."""
        with self._lock:
            self._values |= figures(line, time.time())
        self._push()
        if self._thread is None:
            self._thread = threading.Thread(target=self._repeat, name="gauges", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """The run is over: its series end."""
        self._over.set()

    def _repeat(self) -> None:
        while not self._over.wait(PERIOD_S):
            self._push()

    def _push(self) -> None:
        from ray.util.metrics import Gauge

        with self._lock:
            for key, value in self._values.items():
                if key not in self._gauges:
                    self._gauges[key] = Gauge(f"tidepool_train_{key}", description=f"{key} of a training run", tag_keys=("run",))
                self._gauges[key].set(value, tags=self._tags)


def figures(line: dict[str, Any], now: float) -> dict[str, float]:
    """What a line of metrics.jsonl, told at `now` (unix seconds), has for the gauges."""
    return {key: float(line[key]) for key in KEYS if line.get(key) is not None} | {AT: now}
