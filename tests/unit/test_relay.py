"""Bytes from an engine: cut anywhere, they arrive whole; the usage comment is taken out wherever the cuts are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from serve_apps.relay import EngineGone, Relay, Stream, Whole
from serve_apps.replicas import Endpoint
from serve_apps.usage import Tokens

EVENTS = b'data: {"t":"a"}\n\nevent: x\ndata: {"t":"b"}\n\ndata: [DONE]\n\n'
COMMENT = b": tidepool-usage 12 345 6\n\n"


class Pieces:
    """The reading side of a response: each piece is one read."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    async def read(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def relayed(*pieces: bytes) -> tuple[list[bytes], Tokens | None]:
    async def read() -> tuple[list[bytes], Tokens | None]:
        stream, out = Stream(Pieces(list(pieces)), lambda: None), []  # type: ignore[arg-type]
        while data := await stream.next():
            out.append(data)
        return out, stream.tokens

    return asyncio.run(read())


@pytest.mark.parametrize("cut", range(len(EVENTS + COMMENT) + 1))
def test_a_cut_at_any_byte_changes_nothing(cut):
    whole = EVENTS + COMMENT
    out, tokens = relayed(whole[:cut], whole[cut:])
    assert b"".join(out) == EVENTS and tokens == Tokens(12, 345, 6)
    assert all(part.endswith(b"\n\n") for part in out), "only whole events are handed on"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_small_pieces(size):
    whole = EVENTS * 3 + COMMENT
    out, tokens = relayed(*[whole[i : i + size] for i in range(0, len(whole), size)])
    assert b"".join(out) == EVENTS * 3 and tokens == Tokens(12, 345, 6)


def test_an_engine_without_our_guard_counts_by_events():
    out, tokens = relayed(EVENTS[:20], EVENTS[20:])
    assert b"".join(out) == EVENTS and tokens == Tokens(completion=3)


def test_a_last_event_without_its_end_is_not_lost():
    out, _ = relayed(EVENTS + b"data: 1", b"2")
    assert b"".join(out) == EVENTS + b"data: 12"


def test_other_comments_pass():
    out, tokens = relayed(b": ping\n\n" + EVENTS + COMMENT)
    assert b"".join(out) == b": ping\n\n" + EVENTS and tokens == Tokens(12, 345, 6)


@pytest.mark.parametrize("text", [b": tidepool-usage 0 0 0", b": tidepool-usage ", b": tidepool-usage x y z"])
def test_an_answer_that_says_the_comment_is_an_answer(text):
    event = b'data: {"t":"' + text + b'"}\n\n'
    out, tokens = relayed(event, event + COMMENT)
    assert b"".join(out) == event * 2 and tokens == Tokens(12, 345, 6)


def test_an_empty_stream_ends():
    assert relayed() == ([], Tokens())
    assert relayed(COMMENT) == ([], Tokens(12, 345, 6))


def served(reply: bytes, test: Callable[[Relay, Endpoint, list[bytes]], Awaitable[None]]) -> None:
    """Run `test` beside a server that answers each connection with these raw bytes and closes it; it keeps the requests."""

    async def main() -> None:
        seen: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
            )
            seen.append(head + await reader.readexactly(length))
            writer.write(reply)
            await writer.drain()
            writer.close()

        async with serving(answer) as url, contextlib.aclosing(Closing(Relay("hidden", 1.0))) as made:
            await asyncio.wait_for(test(made.relay, Endpoint("e", url), seen), 20)

    asyncio.run(main())


class Closing:
    def __init__(self, relay: Relay) -> None:
        self.relay = relay

    async def aclose(self) -> None:
        self.relay.close()


@contextlib.asynccontextmanager
async def serving(answer: Callable[..., Awaitable[None]]) -> AsyncIterator[str]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def response(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


async def send(relay: Relay, endpoint: Endpoint) -> Whole | Stream:
    return await relay.send(endpoint, "/v1/completions", b'{"a":1}', "application/json", "id-1")


def test_a_whole_answer_with_its_count():
    async def test(relay: Relay, endpoint: Endpoint, seen: list[bytes]) -> None:
        answer = await send(relay, endpoint)
        assert answer == Whole(200, b"application/json", b'{"ok":1}', Tokens(3, 2, 1))
        head = seen[0].lower()
        assert head.startswith(b"post /v1/completions http/1.1\r\n") and seen[0].endswith(b'{"a":1}')
        assert b"x-tidepool-secret: hidden" in head and b"x-request-id: id-1" in head and b"authorization" not in head

    served(response("200 OK", b'{"ok":1}', "Content-Type: application/json", "X-Tidepool-Usage: 3 2 1"), test)


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "429 Too Many", "500 Oh"])
def test_a_client_mistake_is_an_answer(status):
    async def test(relay: Relay, endpoint: Endpoint, seen: list[bytes]) -> None:
        answer = await send(relay, endpoint)
        assert isinstance(answer, Whole) and answer.status == int(status[:3]) and answer.tokens == Tokens()

    served(response(status, b"{}", "Content-Type: application/json"), test)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        response("503 Service Unavailable", b"no"),
        response("502 Bad Gateway", b"no"),
        response("500 Oh", b'{"error":{"message":"EngineCore encountered an issue"}}'),
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"half":',
        CHUNKED,
        CHUNKED + b"7\r\ndata: 1\r\n",
        b"not http at all\r\n\r\n",
    ],
)
def test_an_engine_that_gives_no_first_event_is_gone(reply):
    async def test(relay: Relay, endpoint: Endpoint, seen: list[bytes]) -> None:
        with pytest.raises(EngineGone):
            await send(relay, endpoint)

    served(reply, test)


def test_a_refused_connection_is_gone():
    async def test(relay: Relay, endpoint: Endpoint, seen: list[bytes]) -> None:
        with pytest.raises(EngineGone):
            await send(relay, Endpoint("e", "http://127.0.0.1:26998"))

    served(b"", test)


def test_a_stream_that_breaks_is_gone_after_what_came():
    async def test(relay: Relay, endpoint: Endpoint, seen: list[bytes]) -> None:
        stream = await send(relay, endpoint)
        assert isinstance(stream, Stream) and stream.first == b"data: 1\n\n"
        with pytest.raises(EngineGone):
            await stream.next()
        stream.close()

    served(CHUNKED + b"9\r\ndata: 1\n\n\r\n", test)


def test_what_a_cancelled_request_used():
    async def test(relay: Relay, endpoint: Endpoint, seen: list[bytes]) -> None:
        assert await relay.cancelled_tokens(endpoint, "id-1") == Tokens(9, 8, 7)
        assert seen[0].startswith(b"GET /-/tidepool/usage/id-1 ")

    served(response("200 OK", b"", "X-Tidepool-Usage: 9 8 7"), test)


def test_an_engine_that_cannot_say_what_was_used_costs_nothing_and_no_time():
    async def test(relay: Relay, endpoint: Endpoint, seen: list[bytes]) -> None:
        assert await relay.cancelled_tokens(endpoint, "id-1") == Tokens()
        assert len(seen) == 1

    served(response("403 Forbidden", b""), test)
