"""HTTP/1.1 to an engine replica: one request after the other on kept connections, the answer's bytes as they come.

A narrow client for one purpose, on asyncio's protocols and httptools (the parser of the server on the other side). It exists for
its cost per streamed chunk (docs/decisions/0009-upstream-on-httptools.md). It knows no redirects, TLS, proxies, cookies or
compression. Called by `relay.py` only.
"""

from __future__ import annotations

import asyncio
import time
from typing import cast
from urllib.parse import urlsplit

import httptools

HIGH_WATER = 2**18  # bytes of an answer that may wait for a slow client before the engine's socket is left unread


class UpstreamError(Exception):
    """The connection could not be opened, broke, or what came is not HTTP."""


class Connection(asyncio.Protocol):
    """One connection, which carries one exchange at a time."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._parts: list[bytes] = []
        self._waiting: asyncio.Future[None] | None = None
        self._begun = self._complete = self._keeps = self._lost = self._paused = False
        self._wrong = "closed"

    async def exchange(self, request: bytes) -> None:
        """Send a request; return when the answer's status and headers are there.

        Raises:
            UpstreamError: none came.
        """
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self.status, self.headers, self._parts = 0, {}, []
        self._begun = self._complete = False
        self._read_on()
        self._transport.write(request)
        while not self._begun:
            await self._more()

    async def read(self) -> bytes:
        """What has come of the body since the last call, waiting for at least one byte; empty at the end.

        Raises:
            UpstreamError: it broke off.
        """
        while not self._parts:
            if self._complete:
                return b""
            await self._more()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._read_on()
        return data

    @property
    def reusable(self) -> bool:
        """Whether the exchange is over and another may follow."""
        return self._complete and self._keeps and not self._lost

    @property
    def usable(self) -> bool:
        """Whether the connection is open."""
        return not self._lost

    def close(self) -> None:
        """Cut it off; an engine sees at once that nobody listens."""
        self._lost = True
        if self._transport is not None:
            self._transport.abort()

    def _read_on(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    async def _more(self) -> None:
        if self._lost:
            raise UpstreamError(self._wrong)
        self._waiting = self._loop.create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of its subclasses

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._complete:  # bytes nobody asked for
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._wrong = f"not HTTP: {error}"
            self.close()
        if self._parts and not self._paused and sum(map(len, self._parts)) > HIGH_WATER and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        if error is not None:
            self._wrong = str(error)
        if self._begun and not {b"content-length", b"transfer-encoding"} & self.headers.keys():
            self._complete = True  # such an answer ends with its connection
        self._wake()

    # httptools calls these.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        self._begun = self.status >= 200

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self._complete = self._begun
        self._keeps = self._parser.should_keep_alive()  # the parser knows it only now


class Connections:
    """Connections to any number of replicas, kept for a while after use.

    Args:
        connect_timeout_s: Longest wait for a connection.
        keep_s: How long an idle one is kept; less than the other side keeps it.
    """

    def __init__(self, connect_timeout_s: float, keep_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._keep_s = keep_s
        self._idle: dict[str, list[Connection]] = {}

    async def request(self, method: str, url: str, headers: dict[str, str], body: bytes = b"") -> Connection:
        """Send a request; the connection that carries the answer goes back with `done`.

        Raises:
            UpstreamError: see the class.
        """
        parts = urlsplit(url)
        lines = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if head.count(b"\r\n") != len(lines) + 1:
            raise ValueError("a header's value has a line break in it")
        connection = self._kept(parts.netloc) or await self._connect(parts.hostname or "", parts.port or 80)
        answered = False
        try:
            await connection.exchange(head + body)
            answered = True
        finally:
            if not answered:
                connection.close()
        return connection

    def done(self, url: str, connection: Connection) -> None:
        """The answer was read, or nobody wants the rest."""
        if not connection.reusable:
            connection.close()
            return
        now = connection.idle_since = time.monotonic()
        idle = self._idle.setdefault(urlsplit(url).netloc, [])
        while idle and now - idle[0].idle_since > self._keep_s:
            idle.pop(0).close()
        idle.append(connection)

    def close(self) -> None:
        """Close what is idle."""
        for connection in [connection for idle in self._idle.values() for connection in idle]:
            connection.close()
        self._idle.clear()

    def _kept(self, netloc: str) -> Connection | None:
        idle = self._idle.get(netloc)
        while idle:
            connection = idle.pop()
            if connection.usable and time.monotonic() - connection.idle_since < self._keep_s:
                return connection
            connection.close()
        self._idle.pop(netloc, None)  # a replica that is gone leaves nothing behind
        return None

    async def _connect(self, host: str, port: int) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(Connection, host, port)
        except TimeoutError:
            raise UpstreamError(f"no connection within {self._connect_timeout_s:g} s") from None
        except OSError as error:
            raise UpstreamError(str(error)) from error
        return connection
