"""Connections to engines: kept, given up in time, and never read faster than the client takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serve_apps.upstream import HIGH_WATER, Connections, UpstreamError

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def served(answer: Answer, test: Callable[[Connections, str], Awaitable[None]], keep_s: float = 5.0) -> None:
    """Run `test` beside a server whose every connection is handled by `answer`."""

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            connections = Connections(1.0, keep_s)
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
            await asyncio.wait_for(test(connections, url), 20)
            connections.close()

    asyncio.run(main())


async def again_and_again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    peers.append(writer.get_extra_info("peername"))
    while await reader.readline():
        while (await reader.readline()).strip():
            pass
        writer.write(OK)
    writer.close()


peers: list[object] = []


@pytest.mark.parametrize(("keep_s", "connected"), [(5.0, 1), (0.0, 3)])
def test_a_connection_is_kept_for_a_while(keep_s, connected):
    peers.clear()

    async def test(connections: Connections, url: str) -> None:
        for _ in range(3):
            connection = await connections.request("GET", url, {})
            assert connection.status == 200 and await connection.read() == b"ok" and await connection.read() == b""
            connections.done(url, connection)

    served(again_and_again, test, keep_s)
    assert len(peers) == connected


def test_a_connection_that_the_engine_closed_is_not_used_again():
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await writer.drain()
        writer.close()

    async def test(connections: Connections, url: str) -> None:
        for _ in range(3):
            connection = await connections.request("GET", url, {})
            assert await connection.read() == b"ok"
            connections.done(url, connection)
            while connection.usable:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    served(once, test)


def test_what_nobody_reads_stays_at_the_engine():
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while not writer.is_closing():
            writer.write(bytes(2**16))
            await writer.drain()
            await asyncio.sleep(0)
            sent += 2**16

    async def test(connections: Connections, url: str) -> None:
        connection = await connections.request("GET", url, {})
        before = -1
        while before != sent:  # until the sockets are full
            before = sent
            await asyncio.sleep(0.2)
        assert HIGH_WATER < sent < 2**26
        taken, wanted = 0, 2 * sent
        while taken < wanted:
            taken += len(await connection.read())
        connections.done(url, connection)
        assert not connection.usable, "half an answer is not left on a kept connection"

    served(endless, test)


def test_no_connection_and_a_header_that_would_be_two():
    async def test(connections: Connections, url: str) -> None:
        with pytest.raises(UpstreamError):
            await connections.request("GET", "http://127.0.0.1:26998/x", {})
        with pytest.raises(ValueError, match="line break"):
            await connections.request("GET", url, {"a": "b\r\nc: d"})

    served(again_and_again, test)
