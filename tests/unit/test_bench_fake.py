"""The fake engine speaks the protocol, and the load generator notices when a server does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from bench import processes
from bench.fake import FakeEngine, FakePlan
from bench.load import LoadPlan, drive
from bench.sse import DONE, SseReader, has_token, sent_at
from cluster.errors import LaunchError


@contextlib.asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


FAST = FakePlan(rate=2000.0, ttft_s=0.0, tokens=4)
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "one two"}]}


async def _post(url: str, data: Any) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        async with session.post(url, data=raw) as response:
            return response.status, await response.json()


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_has_the_shape_of_vllms(chat: bool) -> None:
    async def go() -> list[bytes]:
        path, body = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", {"model": "fake", "prompt": "one two"})
        async with served(FakeEngine(FAST).app()) as root, aiohttp.ClientSession() as session:
            asked = body | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
            async with session.post(root + path, json=asked) as response:
                assert response.status == 200 and response.content_type == "text/event-stream"
                return SseReader().feed(await response.read())

    payloads = asyncio.run(go())
    assert payloads[-1] == DONE and sum(has_token(payload) for payload in payloads) == 3
    chunks = [json.loads(payload) for payload in payloads[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1 and all(chunk["model"] == "fake" for chunk in chunks)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-2:] == [None, "length"]
    if chat:
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_answers_that_do_not_stream_and_refusals() -> None:
    async def go() -> None:
        engine = FakeEngine(FAST)
        async with served(engine.app()) as root:
            url = f"{root}/v1/chat/completions"
            status, answer = await _post(url, CHAT)
            assert status == 200 and answer["usage"]["completion_tokens"] == 4
            assert answer["choices"][0]["message"]["content"].split() == ["word"] * 4
            refused = [b"{bad", b"3", CHAT | {"max_tokens": -1}, CHAT | {"messages": 3}, CHAT | {"n": 2}]
            for body in refused:
                status, answer = await _post(url, body)
                assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}
            status, answer = await _post(url, CHAT | {"model": "other"})
            assert status == 404 and answer["error"]["type"] == "NotFoundError"
        assert engine.running == 0

    asyncio.run(go())


def test_a_client_that_leaves_is_noticed() -> None:
    async def go() -> None:
        engine = FakeEngine(FakePlan(rate=50.0, ttft_s=0.0))
        async with served(engine.app()) as root:
            body = CHAT | {"stream": True, "max_tokens": 5000}
            async with aiohttp.ClientSession() as session, session.post(f"{root}/v1/chat/completions", json=body) as response:
                await response.content.readany()
                assert engine.running == 1
            async with asyncio.timeout(5):
                while engine.running:  # noqa: ASYNC110 - the condition is the engine's, it tells nobody
                    await asyncio.sleep(0.01)
        assert engine.aborted == 1

    asyncio.run(go())


def test_load_against_the_fake_engine_measures_pace_and_delay() -> None:
    async def go() -> dict[str, Any]:
        async with served(FakeEngine(FakePlan(rate=100.0, ttft_s=0.1, stamps=True)).app()) as root:
            return await drive(LoadPlan(f"{root}/v1", "", "fake", 4, 10, max_tokens=8, stamps=True))

    result = asyncio.run(go())
    assert (result["requests"], result["failures"], result["output_tokens"], result["chunks"]) == (10, 0, 80, 80)
    assert result["status"] == {"200": 10} and result["ttft_ms_p50"] > 95
    assert 2 < result["gap_ms_p50"] < 50 and 0 < result["delay_ms_p50"] < 100


def test_stamps_are_send_times() -> None:
    async def go() -> bytes:
        app, body = FakeEngine(FakePlan(rate=0, ttft_s=0, stamps=True)).app(), {"prompt": "x", "stream": True, "max_tokens": 2}
        async with (
            served(app) as root,
            aiohttp.ClientSession() as session,
            session.post(f"{root}/v1/completions", json=body) as response,
        ):
            return await response.read()

    stamps = [sent_at(payload) for payload in SseReader().feed(asyncio.run(go())) if has_token(payload)]
    assert len(stamps) == 2 and all(stamp is not None for stamp in stamps) and stamps == sorted(stamps)  # type: ignore[type-var]


def _broken(kind: str) -> web.Application:
    async def answer(request: web.Request) -> web.StreamResponse:
        if kind == "status":
            return web.json_response({"error": {"message": "full"}}, status=429)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
        if kind == "cut":
            assert request.transport is not None
            request.transport.abort()
            return response
        if kind == "short":
            await response.write(b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n')
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    return app


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("status", "status 429"), ("cut", "Error"), ("short", "1 tokens instead of 4"), ("open", "no [DONE]")],
)
def test_every_kind_of_broken_answer_is_a_failure(kind: str, reason: str) -> None:
    async def go() -> dict[str, Any]:
        async with served(_broken(kind)) as root:
            return await drive(LoadPlan(f"{root}/v1", "", "m", 2, 4, max_tokens=4))

    result = asyncio.run(go())
    assert result["failures"] == 4 and result["tok_per_s"] == 0
    assert reason in next(iter(result["failure_reasons"]))


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    yield number


def test_a_server_is_started_and_leaves_nothing(tmp_path: Path, port: int) -> None:
    server = processes.start("fake", [sys.executable, "-m", "bench", "fake", "--port", str(port)], tmp_path)
    try:
        processes.wait_until(lambda: processes.answers(f"http://127.0.0.1:{port}/health"), server, "fake", 30)
        assert server.process.pid in server.pids()
    finally:
        processes.stop(server)
    assert not processes.living({server.process.pid})
    assert not processes.answers(f"http://127.0.0.1:{port}/health")


def test_stopping_reaches_a_child_that_ignores_it_and_left_the_session(tmp_path: Path) -> None:
    child = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    parent = f"import subprocess,sys; subprocess.Popen([sys.executable,'-c',{child!r}], start_new_session=True).wait()"
    server = processes.start("stubborn", [sys.executable, "-c", parent], tmp_path)
    processes.wait_until(lambda: "up" in server.log.read_text(), server, "the child", 20)
    pids = server.pids()
    assert len(pids) == 2
    processes.stop(server, grace_s=0.5)
    assert not processes.living(pids)


def test_a_server_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    server = processes.start("dying", [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"], tmp_path)
    with pytest.raises(LaunchError, match=r"code 3(.|\n)*no such model"):
        processes.wait_until(lambda: False, server, "the server", 20)
