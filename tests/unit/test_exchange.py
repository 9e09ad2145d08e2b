"""One HTTP exchange over plain ASGI: limits on the body, one start, one error shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cluster.errors import ApiError
from serve_apps.exchange import SSE_HEADERS, ClientGone, Exchange

Message = dict[str, Any]


class Client:
    """The other side: gives the parts of a body, then nothing, and keeps what it is sent."""

    def __init__(
        self, *parts: bytes, headers: list[tuple[bytes, bytes]] | None = None, then: str = "wait", echo: bool = True
    ) -> None:
        last = len(parts) - 1
        self.coming = [{"type": "http.request", "body": p, "more_body": i < last or then == "more"} for i, p in enumerate(parts)]
        self.then = then
        self.sent: list[Message] = []
        scope = {"type": "http", "method": "POST", "path": "/v1/x", "query_string": b"a=b", "headers": headers or []}
        self.exchange = Exchange(scope, self.receive, self.send, echo)

    async def receive(self) -> Message:
        if self.coming:
            return self.coming.pop(0)
        if self.then == "leave":
            return {"type": "http.disconnect"}
        return await asyncio.Future()

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


def refused(client: Client, limit: int = 100, timeout_s: float = 5.0) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(client.exchange.read_json(limit, timeout_s))
    return caught.value


def test_a_body_in_parts_is_one_body():
    client = Client(b'{"a"', b"", b": 1}")
    assert asyncio.run(client.exchange.read_json(8, 5.0)) == (b'{"a": 1}', {"a": 1})


def test_too_large_by_its_header_is_not_read():
    client = Client(b"x" * 10, headers=[(b"content-length", b"101")])
    error = refused(client)
    assert (error.status, error.code) == (413, "request_too_large") and len(client.coming) == 1


@pytest.mark.parametrize("length", [None, b"5", b"-1", b"nonsense"])
def test_too_large_by_what_comes_stops_reading(length):
    client = Client(*[b"x" * 40] * 100, headers=[(b"content-length", length)] if length else [])
    assert refused(client).status == 413 and len(client.coming) == 97


def test_exactly_the_limit_is_fine():
    assert asyncio.run(Client(b"x" * 100).exchange.read_body(100, 5.0)) == b"x" * 100


def test_a_body_that_does_not_end_is_408():
    error = refused(Client(b"{", then="more"), timeout_s=0.05)
    assert (error.status, error.code) == (408, "request_timeout")


def test_a_client_that_leaves_while_sending_is_gone():
    client = Client(b"{", then="more")
    client.then = "leave"
    with pytest.raises(ClientGone):
        asyncio.run(client.exchange.read_json(100, 5.0))


@pytest.mark.parametrize("coding", [b"gzip", b"br", b"gzip, identity"])
def test_compressed_is_415(coding):
    assert refused(Client(b"{}", headers=[(b"content-encoding", coding)])).status == 415


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"nul",
        b'{"a": 1} x',
        b"[1]",
        b'"text"',
        b"12",
        b"null",
        b"[" * 99,
        b'{"a":' * 19,
        b'{"a": ' + b"1" * 80 + b"}}",
    ],
)
def test_what_is_no_json_object_is_400(body):
    error = refused(Client(body))
    assert (error.status, error.code) == (400, "invalid_json") and len(error.message) < 300


def test_nested_brackets_do_not_crash():
    error = refused(Client(b"[" * 100_000), limit=10**6)
    assert error.status == 400
    assert refused(Client(b'{"a":' * 100_000), limit=10**6).status == 400
    assert refused(Client(b'{"a": ' + b"1" * 10_000 + b"}"), limit=10**6).status == 400


def test_of_a_member_given_twice_the_last_counts_as_at_the_engine():
    body = b'{"model": "a", "model": "b"}'
    assert asyncio.run(Client(body).exchange.read_json(100, 5.0)) == (body, {"model": "b"})


@pytest.mark.parametrize("given", [b"abc-1.2:3_X", b"x" * 128])
def test_a_request_id_comes_back(given):
    client = Client(headers=[(b"x-request-id", given)])
    asyncio.run(client.exchange.reply_json({}))
    assert client.headers[b"x-request-id"] == given


@pytest.mark.parametrize("given", [b"", b"a b", b"a\r\nset-cookie: x", b"abc\n", b"x" * 129, b"\xff", b"<script>"])
def test_a_request_id_that_is_no_id_is_replaced(given):
    client = Client(headers=[(b"x-request-id", given)])
    asyncio.run(client.exchange.reply_json({}))
    assert client.headers[b"x-request-id"] != given and len(client.headers[b"x-request-id"]) == 32


def test_no_request_id_where_another_adds_it():
    client = Client(headers=[(b"x-request-id", b"abc")], echo=False)
    asyncio.run(client.exchange.reply_json({}))
    assert b"x-request-id" not in client.headers and client.exchange.request_id == "abc"


def test_an_error_before_the_answer_is_a_whole_response():
    client = Client()
    client.exchange.extra["x-ratelimit-limit-requests"] = "5"
    asyncio.run(client.exchange.fail(ApiError(429, "slow down", "rate_limit_exceeded", retry_after=2.2)))
    assert client.status == client.exchange.status == 429 and client.exchange.started
    assert client.headers[b"retry-after"] == b"3" and client.headers[b"x-ratelimit-limit-requests"] == b"5"
    assert int(client.headers[b"content-length"]) == len(client.body)
    assert json.loads(client.body)["error"]["type"] == "rate_limit_error"


def test_an_error_in_a_stream_is_its_last_event():
    async def talk(exchange: Exchange) -> None:
        await exchange.start(200, SSE_HEADERS)
        await exchange.write(b"data: 1\n\n")
        await exchange.fail(ApiError(502, "broke", "engine_failed"))

    client = Client()
    asyncio.run(talk(client.exchange))
    assert client.status == 200 and [m["type"] for m in client.sent].count("http.response.start") == 1
    first, last, rest = client.body.split(b"\n\n")
    assert first == b"data: 1" and rest == b"" and json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert client.sent[-1]["more_body"] is False


def test_a_client_that_leaves_is_noticed():
    async def wait(exchange: Exchange) -> None:
        await exchange.read_body(10, 1.0)
        await asyncio.wait_for(exchange.wait_disconnect(), 5)

    asyncio.run(wait(Client(b"{}", then="leave").exchange))
