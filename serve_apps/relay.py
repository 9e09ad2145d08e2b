"""Carries one request to an engine replica and the bytes of its answer back.

No JSON is read here. An answer is either whole (status, body) or a stream of SSE bytes, handed on as they come; the engine's
token count travels beside it, in a header or in a last comment that is taken out (see `engine.Guard`). `EngineGone` means that
the replica died before it gave a single byte, so the caller may try another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve_apps.replicas import Endpoint
from serve_apps.upstream import Connection, Connections, UpstreamError
from serve_apps.usage import Tokens
from serve_apps.wire import SECRET_HEADER, USAGE_COMMENT, USAGE_HEADER, USAGE_PATH

CANCELLED_TRIES = 20
CANCELLED_PAUSE_S = 0.1
KEEP_S = 4.0  # the engine's server closes idle connections after 5 s
# A replica in one of these states cannot serve anyone; its answer is not about the request. A 500 may be about the request,
# unless vLLM says that its engine core is gone.
ENGINE_DOWN = frozenset({502, 503, 504})
ENGINE_DEAD = b"EngineCore"


class EngineGone(Exception):
    """The replica did not answer: refused, reset, or closed before the first byte of the answer."""


@dataclass(frozen=True)
class Whole:
    """An answer in one piece."""

    status: int
    content_type: bytes
    body: bytes
    tokens: Tokens


class Stream:
    """An SSE answer. `first` is what came first; `next` gives the rest; `tokens` is known after the end."""

    def __init__(self, connection: Connection, done: Callable[[], None]) -> None:
        self._connection = connection
        self._done = done
        self._rest = b""
        self.tokens: Tokens | None = None
        self.first = b""
        self.events = 0

    async def next(self) -> bytes:
        """Whole SSE events as they come; empty at the end.

        Raises:
            EngineGone: the engine's connection broke.
        """
        while True:
            try:
                data = await self._connection.read()
            except UpstreamError as error:
                raise EngineGone(str(error)) from error
            if not data and self._rest:  # the last event was not ended: what there is goes on as it is
                data, self._rest = self._rest, b""
                self.events += 1
                return data
            if not data:
                if self.tokens is None:  # an engine without our guard: events are the best count there is
                    self.tokens = Tokens(completion=self.events)
                return b""
            if self._rest:
                data = self._rest + data
                self._rest = b""
            if not data.endswith(b"\n\n"):
                cut = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
                data, self._rest = data[:cut], data[cut:]
                if not data:
                    continue
            mark = data.rfind(USAGE_COMMENT, max(0, len(data) - 128))
            if mark == 0 or (mark > 0 and data[mark - 1 : mark] == b"\n"):  # a line of its own, not an answer's text
                self.tokens = Tokens.parse(data[mark + len(USAGE_COMMENT) :])
                data = data[:mark]
                if not data:
                    continue
            self.events += data.count(b"\n\n")
            return data

    def close(self) -> None:
        """Let go of the connection; the engine stops the request if it is still running."""
        self._done()


class Relay:
    """One gateway's connections to all engines. Must be made inside the event loop."""

    def __init__(self, secret: str, connect_timeout_s: float) -> None:
        # Serve would cancel the engine's handler when we leave; vLLM stops a generation for good only when it sees that itself.
        self._secret = {SECRET_HEADER.decode(): secret, "X-Request-Disconnect-Disabled": "?1"}
        self._connections = Connections(connect_timeout_s, KEEP_S)

    def close(self) -> None:
        """Close what is idle."""
        self._connections.close()

    async def send(
        self,
        endpoint: Endpoint,
        path: str,
        body: bytes,
        content_type: str,
        request_id: str,
        more: Mapping[str, str] | None = None,
    ) -> Whole | Stream:
        """POST the body, with `more` headers; return the whole answer, or a stream whose first bytes have come.

        Raises:
            EngineGone: see the class.
        """
        headers = {**self._secret, "Content-Type": content_type, "X-Request-Id": request_id, **(more or {})}
        url = endpoint.url + path
        try:
            connection = await self._connections.request("POST", url, headers, body)
        except UpstreamError as error:
            raise EngineGone(str(error)) from error
        kept = False
        try:
            kind = connection.headers.get(b"content-type", b"")
            if kind.startswith(b"text/event-stream"):
                stream = Stream(connection, lambda: self._connections.done(url, connection))
                stream.first = await stream.next()
                kept = True
                return stream
            content = await _whole(connection)
            if connection.status in ENGINE_DOWN or (connection.status == 500 and ENGINE_DEAD in content):
                raise EngineGone(f"status {connection.status}")
            return Whole(connection.status, kind, content, Tokens.parse(connection.headers.get(USAGE_HEADER, b"0 0 0")))
        finally:
            if not kept:
                self._connections.done(url, connection)

    async def cancelled_tokens(self, endpoint: Endpoint, request_id: str) -> Tokens:
        """What a request that we left had used, once the engine has stopped it; nothing if the engine cannot say."""
        url = endpoint.url + USAGE_PATH + request_id
        for _ in range(CANCELLED_TRIES):
            await asyncio.sleep(CANCELLED_PAUSE_S)  # the engine needs a moment to see that we left
            try:
                connection = await self._connections.request("GET", url, self._secret)
                try:
                    await _whole(connection)
                finally:
                    self._connections.done(url, connection)
            except (UpstreamError, EngineGone):
                break
            if connection.status == 200:
                return Tokens.parse(connection.headers[USAGE_HEADER])
            if connection.status not in (404, 409):
                break
        return Tokens()


async def _whole(connection: Connection) -> bytes:
    """All of an answer's body.

    Raises:
        EngineGone: it broke off.
    """
    parts = []
    try:
        while data := await connection.read():
            parts.append(data)
    except UpstreamError as error:
        raise EngineGone(str(error)) from error
    return b"".join(parts)
