"""OpenTelemetry traces: one span per request at the gateway, below the client's if it sends a `traceparent`, above vLLM's own.

With `tracing.endpoint` the gateway has a `Tracer`, and each engine is told the same collector (`for_engine`). A span says route,
model, status, tokens, waits and the replica; never a prompt, an answer or a key, and requests without a known key make none.
Spans go out in batches from a thread, and when the collector is away they are dropped. Without an endpoint nothing of
OpenTelemetry is imported and requests pay nothing. The collector's own credentials come from OTEL_EXPORTER_OTLP_TRACES_HEADERS.
Wired in `app.py` and `alone.py`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.config import ModelConfig, TracingConfig
from cluster.errors import ApiError
from serve_apps.exchange import ClientGone, Exchange

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from serve_apps.service import Outcome

GATEWAY, ENGINE = "tidepool-gateway", "tidepool-engine"
HEADERS = ("traceparent", "tracestate")
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
CLOSE_S = 3.0


def for_engine(model: ModelConfig, config: TracingConfig) -> ModelConfig:
    """The model with vLLM told where its spans go; what the model's own configuration says about it stays."""
    if config.endpoint is None:
        return model
    env = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        # Spans of requests that the gateway traces: not of its probes, nor of loading the model.
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        "OTEL_SERVICE_NAME": ENGINE,
    }
    kwargs = {"otlp_traces_endpoint": config.endpoint, **model.engine_kwargs}
    return model.model_copy(update={"engine_kwargs": kwargs, "env": {**env, **model.env}})


def tracer(config: TracingConfig) -> Tracer | None:
    """What the gateway traces with; None when it does not."""
    return None if config.endpoint is None else Tracer(config)


class RequestTrace:
    """The span of one request. It ends when the answer has ended and the tokens are known, whichever is later.

    Args:
        span: Open; without a record when the request is not sampled.
        headers: What makes the engine's span a child of this one; empty when the request is not sampled.
    """

    def __init__(self, span: Span, headers: dict[str, str]) -> None:
        self._span = span
        self._headers = headers
        self._unsettled = False
        self._ended = 0
        self._served = 0

    def serving(self, asked: str, model: str, stream: bool) -> dict[str, str]:
        """The request was let in, `settle` will follow. Returns the headers for the engine."""
        self._unsettled, self._served = True, time.time_ns()
        self._span.set_attributes(
            {"gen_ai.request.model": asked, "gen_ai.response.model": model, "gen_ai.request.stream": stream}
        )
        return self._headers

    def settle(self, outcome: Outcome) -> None:
        """The tokens are known."""
        tokens = outcome.tokens
        attributes: dict[str, Any] = {
            "gen_ai.usage.input_tokens": tokens.prompt,
            "gen_ai.usage.output_tokens": tokens.completion,
            "gen_ai.usage.cache_read.input_tokens": tokens.cached,
            "tidepool.attempts": len(outcome.used),
        }
        if outcome.used:
            attributes |= {"tidepool.replica": outcome.used[-1].id, "tidepool.queue_s": outcome.queued_s}
        if outcome.ttft_s:
            attributes["gen_ai.response.time_to_first_chunk"] = outcome.ttft_s
            self._span.add_event("first byte", timestamp=self._served + int(outcome.ttft_s * 1e9))
        self._span.set_attributes(attributes)
        self._unsettled = False
        if self._ended:
            self._span.end(self._ended)

    def end(self, status: int, wrong: str) -> None:
        """The answer has ended, with this status and, if it is an error, its code."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("http.response.status_code", status)
        if wrong:
            self._span.set_attribute("error.type", wrong)
            if (
                status >= 500 or status == 200
            ):  # by the conventions a client's mistake is no error of a server; a broken stream is
                self._span.set_status(StatusCode.ERROR)
        self._ended = time.time_ns()
        if not self._unsettled:
            self._span.end(self._ended)


class Tracer:
    """One gateway's spans and their way to the collector. Made and closed inside the event loop."""

    def __init__(self, config: TracingConfig) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        who = {"service.name": GATEWAY, "service.instance.id": f"{socket.gethostname()}-{os.getpid()}"}
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(config.sample), resource=Resource.create(who), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=config.endpoint)
        size = min(512, config.max_queued)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, config.max_queued, max_export_batch_size=size))
        self._tracer = self._provider.get_tracer(GATEWAY)
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, exchange: Exchange) -> Iterator[RequestTrace]:
        """The span of an exchange on one of the relayed routes, around all that is done for it."""
        trace = self._begin(exchange)
        status, wrong = 500, "internal_error"  # what is neither of the below is a bug of ours
        try:
            yield trace
            status, wrong = exchange.status, ""
        except ApiError as error:
            status, wrong = error.status, error.code
            raise
        except ClientGone:
            status, wrong = 499, "client_gone"
            raise
        finally:
            if status != 401:  # a stranger's request: it would push out those of clients
                trace.end(exchange.status if exchange.started else status, wrong)

    def close(self) -> None:
        """Send what waits; gives up after `CLOSE_S`, for the collector may be away. Blocks meanwhile."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(CLOSE_S)

    def _begin(self, exchange: Exchange) -> RequestTrace:
        from opentelemetry.trace import SpanKind, set_span_in_context

        given = {name: exchange.headers.get(name.encode(), b"").decode("latin-1") for name in HEADERS}
        attributes = {
            "http.request.method": exchange.method,
            "http.route": exchange.path,
            "tidepool.request_id": exchange.request_id,
        }
        if exchange.path in OPERATIONS:
            attributes["gen_ai.operation.name"] = OPERATIONS[exchange.path]
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.path}",
            context=self._propagator.extract({name: value for name, value in given.items() if value}),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )
        headers: dict[str, str] = {}
        if span.is_recording():
            self._propagator.inject(headers, set_span_in_context(span))
        return RequestTrace(span, headers)
