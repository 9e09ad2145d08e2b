"""The metrics of our own processes, as Prometheus clients know them; names start with `tidepool_`.

Definitions only: `serve_apps.gateway` counts, `/metrics` shows one replica's, `serve_apps.exporter` brings those of every
replica to Ray's metrics agents. Labels are model ids from the configuration and HTTP statuses, never keys, users or anything a
client can invent.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Series that exist from the start: the first increase of a series that appears with it is seen by nobody's `rate`.
EXPECTED_STATUSES = ("200", "500", "502", "503", "504")
LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class GatewayMetrics:
    """One gateway replica's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._series: dict[str, tuple[list[Counter], Histogram, Histogram]] = {}
        self.requests = Counter("tidepool_requests", "Answered requests.", ["model", "status"], registry=registry)
        self.tokens = Counter("tidepool_tokens", "Tokens, as the engine counted them.", ["model", "kind"], registry=registry)
        self.cost = Counter("tidepool_cost_usd", "Price of the tokens, by the configuration.", ["model"], registry=registry)
        self.ttft = Histogram(
            "tidepool_ttft_seconds", "Time to first byte.", ["model"], buckets=LATENCY_BUCKETS, registry=registry
        )
        self.latency = Histogram(
            "tidepool_latency_seconds", "Time to last byte.", ["model"], buckets=LATENCY_BUCKETS, registry=registry
        )
        self.running = Gauge("tidepool_running_requests", "Requests at the engines.", ["model"], registry=registry)
        self.queued = Gauge("tidepool_queued_requests", "Requests that wait in this gateway.", ["model"], registry=registry)
        self.replicas = Gauge("tidepool_engine_replicas", "Running engine replicas.", ["model"], registry=registry)
        self.wanted = Gauge("tidepool_engine_replicas_min", "The fewest there should be.", ["model"], registry=registry)
        self.store_age = Gauge("tidepool_store_age_seconds", "Since the store last answered this gateway.", registry=registry)
        self.retries = Counter("tidepool_retries", "Requests sent to another replica.", ["model"], registry=registry)
        self.cancelled = Counter("tidepool_cancelled_requests", "Requests whose client left.", ["model"], registry=registry)

    def expect(self, model: str, replicas: int) -> None:
        """A model of the configuration and its `min_replicas`: its series begin at 0."""
        kinds = [self.tokens.labels(model, kind) for kind in ("prompt", "completion", "cached")]
        self._series[model] = (kinds, self.latency.labels(model), self.ttft.labels(model))
        for status in EXPECTED_STATUSES:
            self.requests.labels(model, status)
        for metric in (self.cost, self.retries, self.cancelled, self.running, self.queued, self.replicas):
            metric.labels(model)
        self.wanted.labels(model).set(replicas)

    def count(
        self, model: str, status: int, tokens: tuple[int, int, int], cost_usd: float, latency_s: float, ttft_s: float
    ) -> None:
        """One request of an expected model is over. `tokens`: prompt, completion, cached; `ttft_s` 0 without a first byte."""
        series = self._series[model]
        self.requests.labels(model, str(status)).inc()
        self.cost.labels(model).inc(cost_usd)
        for counter, amount in zip(series[0], tokens, strict=True):
            counter.inc(amount)
        series[1].observe(latency_s)
        if ttft_s:
            series[2].observe(ttft_s)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)
