"""One HTTP exchange with a client: its headers, its body within limits, and an answer that is started at most once.

A thin layer over ASGI for the gateway's handlers, so that none of them repeats byte handling. An error after the answer has
begun goes out as a last SSE event, before that as a whole response; both have the one error shape. Knows no models and no keys.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from cluster.errors import ApiError
from serve_apps.wire import send_error

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Exchange:
    """One request and its answer.

    Args:
        scope, receive, send: ASGI.
        echo_request_id: Whether the answer needs an `x-request-id` of ours; Ray Serve's own middleware adds one.
    """

    def __init__(self, scope: Any, receive: Any, send: Any, echo_request_id: bool) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.headers: Mapping[bytes, bytes] = dict(scope["headers"])
        self.started = False
        self.status = 0
        self.extra: dict[str, str] = {}
        self._receive = receive
        self._send = send
        given = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._echo = [(b"x-request-id", self.request_id.encode())] if echo_request_id else []

    async def read_body(self, limit: int, timeout_s: float) -> bytes:
        """The whole body.

        Raises:
            ApiError: 413 over `limit` bytes, 408 when it takes longer than `timeout_s`, 415 when it is compressed.
            ClientGone: the client left while sending.
        """
        if self.headers.get(b"content-encoding", b"").strip().lower() not in (b"", b"identity"):
            raise ApiError(415, "Compressed request bodies are not accepted; send it without Content-Encoding.", "encoding")
        too_large = ApiError(413, f"The request body is larger than {limit} bytes.", "request_too_large")
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"The request body did not arrive within {timeout_s:.0f} s.", "request_timeout") from None

    async def read_json(self, limit: int, timeout_s: float) -> tuple[bytes, dict[str, Any]]:
        """The body and the JSON object in it.

        Raises:
            ApiError: as `read_body`, and 400 when it is not a JSON object.
        """
        body = await self.read_body(limit, timeout_s)
        try:
            data = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The request body is not valid JSON: {str(error)[:200]}", "invalid_json") from None
        if not isinstance(data, dict):
            raise ApiError(400, f"The request body must be a JSON object, found {type(data).__name__}.", "invalid_json")
        return body, data

    async def wait_disconnect(self) -> None:
        """Return when the client has left; call it after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin the answer."""
        more = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.extra.items()]
        self.started, self.status = True, status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *more, *self._echo]})

    async def write(self, body: bytes, more: bool = True) -> None:
        """Send a part of the answer; `more=False` ends it."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def reply(self, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
        """Send a whole answer."""
        await self.start(status, [(b"content-type", content_type), (b"content-length", str(len(body)).encode())])
        await self.write(body, more=False)

    async def reply_json(self, data: Any, status: int = 200) -> None:
        """Send a whole answer as JSON."""
        await self.reply(status, json.dumps(data).encode())

    async def fail(self, error: ApiError) -> None:
        """Send an error: a response of its own, or the last event of a stream that has begun."""
        if self.started:
            await self.write(b"data: " + error.body() + b"\n\n", more=False)
            return
        self.started, self.status = True, error.status
        error.headers = {**self.extra, **error.headers}
        await send_error(self._send, error, self._echo)
