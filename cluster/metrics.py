"""The metrics of our own processes, as Prometheus clients know them; names start with `tidepool_`.

Definitions only: `serve_apps.gateway` counts, `/metrics` shows. vLLM's and Ray's metrics keep their own names and places. Labels
are model ids from the configuration and HTTP statuses, never keys, users or anything a client can invent.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class GatewayMetrics:
    """One gateway replica's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._series: dict[str, tuple[list[Counter], Histogram, Histogram]] = {}
        self.requests = Counter("tidepool_requests", "Answered requests.", ["model", "status"], registry=registry)
        self.tokens = Counter("tidepool_tokens", "Tokens, as the engine counted them.", ["model", "kind"], registry=registry)
        self.ttft = Histogram(
            "tidepool_ttft_seconds", "Time to first byte.", ["model"], buckets=LATENCY_BUCKETS, registry=registry
        )
        self.latency = Histogram(
            "tidepool_latency_seconds", "Time to last byte.", ["model"], buckets=LATENCY_BUCKETS, registry=registry
        )
        self.running = Gauge("tidepool_running_requests", "Requests at the engines.", ["model"], registry=registry)
        self.queued = Gauge("tidepool_queued_requests", "Requests that wait in this gateway.", ["model"], registry=registry)
        self.replicas = Gauge("tidepool_engine_replicas", "Running engine replicas.", ["model"], registry=registry)
        self.retries = Counter("tidepool_retries", "Requests sent to another replica.", ["model"], registry=registry)
        self.cancelled = Counter("tidepool_cancelled_requests", "Requests whose client left.", ["model"], registry=registry)

    def count(self, model: str, status: int, tokens: tuple[int, int, int], latency_s: float, ttft_s: float) -> None:
        """One request is over. `tokens`: prompt, completion, cached; `ttft_s` 0 when there was no first byte."""
        series = self._series.get(model)
        if series is None:
            kinds = [self.tokens.labels(model, kind) for kind in ("prompt", "completion", "cached")]
            series = self._series[model] = (kinds, self.latency.labels(model), self.ttft.labels(model))
        self.requests.labels(model, str(status)).inc()
        for counter, amount in zip(series[0], tokens, strict=True):
            counter.inc(amount)
        series[1].observe(latency_s)
        if ttft_s:
            series[2].observe(ttft_s)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)
