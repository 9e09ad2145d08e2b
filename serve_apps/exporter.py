"""Brings what a Serve replica counts to Prometheus, through the metrics agent that Ray runs on each node.

A scrape of the endpoint reaches one gateway; the agents, which Ray lists for Prometheus, have them all. Every few seconds the
samples of a Prometheus registry are set as Ray gauges of the same names (Ray puts `ray_` before them), with the label
`replica`. Gauges also for counters and buckets, and not `ray.util.metrics.Counter` or `Histogram`: PromQL's `rate` and
`histogram_quantile` read a sample's name and value, not its type; a gauge may begin at 0, so that the first increase is seen;
sums stay exact (Ray's histograms guess them from bucket middles); the cost does not depend on the number of requests; and a
replica's series end with it.

An engine's figures come out of the registry that vLLM fills anyway. `log_engine_metrics` of Ray would set some sixty metrics in
every step of the engine instead, on the event loop that streams the tokens; here it is some fifty calls, about a millisecond,
in `PERIOD_S`. Called by `app.py` and `engine.py`; a gateway that runs alone has its own `/metrics`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

# An agent forgets a gauge that was not set for 20 s (two of Ray's report intervals).
PERIOD_S = 5.0
# Of Ray's `NodeDeathInfo.Reason`: UNEXPECTED_TERMINATION, AUTOSCALER_DRAIN_PREEMPTED.
LOST = (2, 3)
GAP = "vllm:inter_token_latency_seconds"
# vLLM's names and ours, which stay when vLLM's change.
ENGINE_NAMES = {
    "vllm:num_requests_running": "tidepool_engine_running",
    "vllm:num_requests_waiting": "tidepool_engine_waiting",
    "vllm:kv_cache_usage_perc": "tidepool_engine_kv_use",
    "vllm:num_preemptions_total": "tidepool_engine_preemptions_total",
    "vllm:prompt_tokens_total": "tidepool_engine_prompt_tokens_total",
    "vllm:generation_tokens_total": "tidepool_engine_generated_tokens_total",
    "vllm:prefix_cache_queries_total": "tidepool_engine_prefix_queries_total",
    "vllm:prefix_cache_hits_total": "tidepool_engine_prefix_hits_total",
    **{f"{GAP}{part}": f"tidepool_engine_token_gap_seconds{part}" for part in ("_bucket", "_sum", "_count")},
}


class Mirror:
    """Shows a registry's samples as Ray gauges.

    Args:
        registry: Anything with prometheus_client's `collect`.
        tags: Labels that every sample gets, such as `replica`.
        names: Which samples, and the names they get; all, under their own, without it.
        drop: Labels that are left out.
    """

    def __init__(
        self, registry: Any, tags: Mapping[str, str], names: Mapping[str, str] | None = None, drop: tuple[str, ...] = ()
    ) -> None:
        self._registry = registry
        self._tags = dict(tags)
        self._names = names
        self._drop = drop
        self._gauges: dict[str, Any] = {}

    def push(self) -> None:
        """Set every gauge once."""
        for name, description, labels, value in self.samples():
            self._gauge(name, description, tuple(labels)).set(value, tags=labels)

    def samples(self) -> Iterator[tuple[str, str, dict[str, str], float]]:
        """Name, description, labels and value of what `push` sets."""
        for family in self._registry.collect():
            for sample in family.samples:
                name = sample.name if self._names is None else self._names.get(sample.name, "")
                if name and not name.endswith("_created"):
                    labels = {key: value for key, value in sample.labels.items() if key not in self._drop} | self._tags
                    yield name, family.documentation, labels, sample.value

    def _gauge(self, name: str, description: str, keys: tuple[str, ...]) -> Any:
        gauge = self._gauges.get(name)
        if gauge is None:
            from ray.util.metrics import Gauge

            gauge = self._gauges[name] = Gauge(name, description=description, tag_keys=keys)
        return gauge


class Speed:
    """Tokens per second since the last push, for `python -m cluster status`, which looks once. Only inside a Serve replica.

    Args:
        tokens: All that were made so far.
    """

    def __init__(self, model: str, tokens: Callable[[], int]) -> None:
        self._tokens = tokens
        self._tags = {"model": model, "replica": _replica()}
        self._seen = (time.monotonic(), tokens())
        from ray.util.metrics import Gauge

        name = "tidepool_engine_tokens_per_second"
        self._gauge = Gauge(name, description="Tokens made, lately.", tag_keys=tuple(self._tags))

    def push(self) -> None:
        """Set the gauge."""
        (then, before), self._seen = self._seen, (time.monotonic(), self._tokens())
        self._gauge.set((self._seen[1] - before) / max(self._seen[0] - then, 1e-3), tags=self._tags)


def gateway_mirror(registry: CollectorRegistry) -> Mirror:
    """A gateway replica's own metrics. Only inside a Serve replica."""
    return Mirror(registry, {"replica": _replica()})


def engine_mirror(model: str) -> Mirror:
    """What vLLM counts in this replica of a model. Only inside a Serve replica; empty when its engine has `disable_log_stats`."""
    return Mirror(
        REGISTRY.restricted_registry(ENGINE_NAMES), {"model": model, "replica": _replica()}, ENGINE_NAMES, drop=("model_name",)
    )


async def run(*steps: Callable[[], None]) -> None:
    """Do the steps, again and again, until cancelled."""
    while True:
        for step in steps:
            step()
        await asyncio.sleep(PERIOD_S)


async def watch_nodes() -> None:
    """Show how many nodes were lost, until cancelled. Ray counts those that were told to go among its failed ones."""
    import ray
    from ray.util.metrics import Gauge

    gauge = Gauge("tidepool_nodes_lost", description="Nodes that ended without being told to.", tag_keys=("replica",))
    while True:
        # In a thread: it asks the GCS, which may be slow, and nothing of it is needed for requests.
        gauge.set(lost_nodes(await asyncio.to_thread(ray.nodes)), tags={"replica": _replica()})
        await asyncio.sleep(PERIOD_S)


def lost_nodes(nodes: Iterable[Mapping[str, Any]]) -> int:
    """How many of the nodes that the cluster ever had (`ray.nodes()`) were neither stopped nor drained when idle."""
    return sum(not node["Alive"] and node["DeathReason"] in LOST for node in nodes)


def _replica() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)
