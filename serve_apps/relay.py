"""Carries one request to an engine replica and the bytes of its answer back.

No JSON is read here. An answer is either whole (status, body) or a stream of SSE bytes, handed on as they come; the engine's
token count travels beside it, in a header or in a last comment that is taken out (see `engine.Guard`). `EngineGone` means that
the replica died before it gave a single byte, so the caller may try another.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import aiohttp

from serve_apps.replicas import Endpoint
from serve_apps.usage import Tokens
from serve_apps.wire import SECRET_HEADER, USAGE_COMMENT, USAGE_HEADER, USAGE_PATH

CANCELLED_TRIES = 20
CANCELLED_PAUSE_S = 0.1
READ_BUFFER = 2**18
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

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
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
                data = await self._response.content.readany()
            except (aiohttp.ClientError, OSError) as error:
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
        self._response.close()


class Relay:
    """One gateway's connections to all engines. Must be made inside the event loop."""

    def __init__(self, secret: str, connect_timeout_s: float) -> None:
        # Serve would cancel the engine's handler when we leave; vLLM stops a generation for good only when it sees that itself.
        self._secret = {SECRET_HEADER.decode(): secret, "X-Request-Disconnect-Disabled": "?1"}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
            auto_decompress=False,
            read_bufsize=READ_BUFFER,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
        )

    async def close(self) -> None:
        await self._session.close()

    async def send(self, endpoint: Endpoint, path: str, body: bytes, content_type: str, request_id: str) -> Whole | Stream:
        """POST the body; return the whole answer, or a stream whose first bytes have come.

        Raises:
            EngineGone: see the class.
        """
        headers = {**self._secret, "Content-Type": content_type, "X-Request-Id": request_id}
        try:
            response = await self._session.post(endpoint.url + path, data=body, headers=headers)
        except (aiohttp.ClientError, OSError) as error:
            raise EngineGone(str(error)) from error
        kept = False
        try:
            if response.content_type == "text/event-stream":
                stream = Stream(response)
                stream.first = await stream.next()
                kept = True
                return stream
            try:
                content = await response.read()
            except (aiohttp.ClientError, OSError) as error:
                raise EngineGone(str(error)) from error
            if response.status in ENGINE_DOWN or (response.status == 500 and ENGINE_DEAD in content):
                raise EngineGone(f"status {response.status}")
            kept = True
            usage = response.headers.get(USAGE_HEADER.decode(), "0 0 0").encode()
            return Whole(response.status, response.headers.get("Content-Type", "").encode(), content, Tokens.parse(usage))
        finally:
            if not kept:
                response.close()

    async def cancelled_tokens(self, endpoint: Endpoint, request_id: str) -> Tokens:
        """What a request that we left had used, once the engine has stopped it; nothing if the engine cannot say."""
        url = endpoint.url + USAGE_PATH + request_id
        for _ in range(CANCELLED_TRIES):
            await asyncio.sleep(CANCELLED_PAUSE_S)  # the engine needs a moment to see that we left
            try:
                async with self._session.get(url, headers=self._secret) as response:
                    if response.status == 200:
                        return Tokens.parse(response.headers[USAGE_HEADER.decode()].encode())
                    if response.status not in (404, 409):
                        break
            except (aiohttp.ClientError, OSError):
                break
        return Tokens()
