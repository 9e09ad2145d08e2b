"""What an engine replica tells the replica policy about itself, every `INTERVAL_S`; Serve brings it to its controller.

How many requests are here is known from our own meter (vLLM's gauge of running requests stays where it was when the last one is
aborted); how many of them wait, the KV cache, the time to first token and the time in the engine come from the Prometheus
registry that vLLM fills, as the change since the last look. Gateways say with each request how many others wait for each that
runs (`QUEUED_HEADER`), so the replica's part of their queues is that ratio times what runs here, and the parts of all replicas
add up to the queues.

With vLLM's `disable_log_stats` only requests and queues are known. Read by `EngineServer.record_autoscaling_stats`; the names
are those of `autoscale.ReplicaLoad`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import REGISTRY

from serve_apps.metering import Meter

INTERVAL_S = 2.0
HEARD_S = 15.0
# What is left of requests that came and went between two looks: enough to keep a model awake.
PASSED = 0.1

WAITING = "vllm:num_requests_waiting"
KV_USE = "vllm:kv_cache_usage_perc"
TIMES = {"ttft_s": "vllm:time_to_first_token_seconds", "service_s": "vllm:e2e_request_latency_seconds"}
NAMES = frozenset({WAITING, KV_USE, *(f"{name}{part}" for name in TIMES.values() for part in ("_sum", "_count"))})


class EngineLoad:
    """The figures of this process's engine.

    Args:
        meter: Counts what runs here.
        registry: Anything with prometheus_client's `restricted_registry`.
        clock: Seconds.
    """

    def __init__(self, meter: Meter, registry: Any = REGISTRY, clock: Callable[[], float] = time.monotonic) -> None:
        self._meter = meter
        self._samples = registry.restricted_registry(NAMES)
        self._clock = clock
        self._before: dict[str, float] = {}
        self._tokens = meter.tokens
        self._heard: list[float] = []
        self._ratio = 0.0
        self._heard_at = 0.0

    def heard(self, header: bytes) -> None:
        """A gateway's `QUEUED_HEADER`: requests that wait there, for each that it has at the engines."""
        self._heard.append(float(header))

    def figures(self) -> dict[str, float]:
        """What happened since the last call; a time is left out when no request gave one."""
        sums, most_kv = self._read()
        running = float(self._meter.running)
        waiting = min(running, sums.get(WAITING, 0.0))
        found = {"running": running - waiting, "waiting": waiting, "queued": running * self._queue()}
        if not running and self._meter.tokens != self._tokens:
            found["running"] = PASSED
        self._tokens = self._meter.tokens
        # vLLM's gauges rest at what they were in its last step.
        found["kv_use"] = most_kv if running else 0.0
        for figure, name in TIMES.items():
            count = self._change(sums, f"{name}_count")
            seconds = self._change(sums, f"{name}_sum")
            if count > 0:
                found[figure] = seconds / count
        self._before = sums
        return found

    def _read(self) -> tuple[dict[str, float], float]:
        """Samples by name, added up over the engines of this replica, and the fullest KV cache among them."""
        sums: dict[str, float] = {}
        most_kv = 0.0
        for family in self._samples.collect():
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
                if sample.name == KV_USE:
                    most_kv = max(most_kv, sample.value)
        return sums, most_kv

    def _change(self, sums: dict[str, float], name: str) -> float:
        return sums.get(name, 0.0) - self._before.get(name, 0.0)

    def _queue(self) -> float:
        """What gateways said since the last call, on average; for a while what they said before, where none came."""
        now = self._clock()
        if self._heard:
            self._ratio, self._heard_at = sum(self._heard) / len(self._heard), now
            self._heard.clear()
        elif now - self._heard_at > HEARD_S:
            self._ratio = 0.0
        return self._ratio
