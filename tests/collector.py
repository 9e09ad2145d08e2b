"""An OpenTelemetry collector inside the test: takes OTLP over HTTP and keeps the spans, decoded, in the order they came."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Seen:
    """One span. Ids in hex, `parent` empty for a root; times in ns; `status` 2 is an error; `raw`: all that came with it."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    kind: int
    start: int
    end: int
    status: int
    attributes: dict[str, Any]
    events: dict[str, int]
    raw: bytes


@dataclass
class Collector:
    """What came in at `url`."""

    url: str
    spans: list[Seen] = field(default_factory=list)

    def wait(self, enough: Callable[[list[Seen]], bool], timeout_s: float = 20.0) -> list[Seen]:
        """The spans, once they are enough. Raises AssertionError."""
        end = time.monotonic() + timeout_s
        while not enough(list(self.spans)):
            assert time.monotonic() < end, (
                f"not within {timeout_s:g} s; came: {[(span.service, span.name) for span in self.spans]}"
            )
            time.sleep(0.02)
        return list(self.spans)


@contextmanager
def collector(port: int = 0) -> Iterator[Collector]:
    """A collector on 127.0.0.1, on a free port unless told which."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.spans += decode(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    made = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()


def decode(body: bytes) -> list[Seen]:
    """The spans of an export request."""
    found = []
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = _values(resource.resource.attributes).get("service.name", "")
        found += [_seen(service, span, resource.SerializeToString()) for scope in resource.scope_spans for span in scope.spans]
    return found


def _seen(service: str, span: Any, raw: bytes) -> Seen:
    return Seen(
        service=service,
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        kind=span.kind,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        status=span.status.code,
        attributes=_values(span.attributes),
        events={event.name: event.time_unix_nano for event in span.events},
        raw=raw,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}
