"""The gateway alone before fake engines: bytes, keep-alives, failover, leaving clients, and what does not belong on the wire."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from gateways import KEY, fake_engine, gateway, running

FAST, SLOW_A, SLOW_B, DEAD, ECHO = 26010, 26011, 26012, 26013, 26014
FRONT, NARROW = 26020, 26021
ROOT = f"http://127.0.0.1:{FRONT}"
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A fast engine, a slow one, an address nobody listens at, one that a test listens at, behind a wide and a narrow gateway."""
    logs = tmp_path_factory.mktemp("logs")
    urls = {"fast": FAST, "dead": DEAD, "echo": ECHO, "slow": SLOW_A}
    engines = [f"{name}=http://127.0.0.1:{port}" for name, port in urls.items()]
    short = ["--set", "body_timeout_s=1", "--set", "max_body_mb=1"]
    narrow = ["--slots", "1", "--set", "admission.max_queued=1", "--set", "admission.keepalive_s=0.2"]
    with (
        fake_engine(FAST, logs, "--model", "fast", "--rate", "0", "--ttft", "0", "--tokens", "20"),
        fake_engine(SLOW_A, logs, "--model", "slow", "--rate", "10", "--ttft", "0.1", "--tokens", "600"),
        gateway(FRONT, engines, logs, *short, "--alias", "quick=fast"),
        gateway(NARROW, [f"slow=http://127.0.0.1:{SLOW_A}"], logs, *narrow),
    ):
        yield logs


def run(test: Callable[[aiohttp.ClientSession], Awaitable[None]]) -> None:
    async def main() -> None:
        async with aiohttp.ClientSession(headers=BEARER) as session:
            await asyncio.wait_for(test(session), 60)

    asyncio.run(main())


async def until(true: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not await true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


def chat(model: str, **more) -> dict:
    return {"model": model, "messages": [{"role": "user", "content": "one two"}], **more}


def check_error(status: int, body: bytes, code: str | None = None) -> None:
    """The one shape, whatever the status."""
    data = json.loads(body)
    assert list(data) == ["error"] and set(data["error"]) == {"message", "type", "param", "code"}, data
    assert status >= 400 and (code is None or data["error"]["code"] == code), data


VARYING = re.compile(rb'"id": ?"[a-z]+-[0-9a-f]+"|"created": ?[0-9]+')


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_the_answer_is_the_engines_byte_for_byte(stack, route, stream):
    async def test(session: aiohttp.ClientSession) -> None:
        body = chat("fast", stream=stream, prompt="one two", stream_options={"include_usage": True}, max_tokens=50)
        async with (
            session.post(f"http://127.0.0.1:{FAST}{route}", json=body) as direct,
            session.post(ROOT + route, json=body) as ours,
        ):
            assert direct.status == ours.status == 200 and direct.content_type == ours.content_type
            one, two = await direct.read(), await ours.read()
        assert VARYING.sub(b"", one) == VARYING.sub(b"", two) and one.count(b" word") == 50

    run(test)


def test_bytes_no_json_parser_ever_saw_pass_unchanged(stack):
    """An engine of the test itself: what it gets and what it sends, to the byte, in odd pieces."""
    sent = b'data: {"x": "\xf0\x9f\x8c\x8a" }\n\n: comment\n\nevent: y\ndata:  {not json}\ndata: two\n\ndata: [DONE]\n\n'
    odd = b'{ "model":"echo",  "prompt" : "a\\u0000b", "stream":true, "unknown_field": [1e400, -0.0]}'
    seen: list[tuple[bytes, dict[str, str]]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append((await request.read(), {name.lower(): value for name, value in request.headers.items()}))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for start in range(0, len(sent), 7):
            await response.write(sent[start : start + 7])
        await response.write(b": tidepool-usage 11 22 3\n\n")
        return response

    async def test(session: aiohttp.ClientSession) -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", ECHO).start()
        extra = {
            "x-tidepool-secret": "guess",
            "x-tidepool-usage": "0 0 0",
            "x-tidepool-queued": "9",
            "x-ratelimit-remaining-requests": "9",
            "cookie": "a=b",
        }
        async with session.post(ROOT + "/v1/completions", data=odd, headers={**extra, "x-request-id": "mine-1"}) as response:
            assert await response.read() == sent
            assert response.headers["x-request-id"] == "mine-1"
        await runner.cleanup()
        body, headers = seen[0]
        assert body == odd
        assert headers["x-request-id"].startswith("mine-1-") and headers["x-tidepool-secret"] == ""
        assert headers["x-tidepool-queued"] == "0.000"
        assert not {"authorization", "cookie", "x-tidepool-usage"} & set(headers) and "guess" not in headers.values()

        async def counted() -> bool:
            async with session.get(ROOT + "/metrics") as response:
                text = await response.text()
            wanted = {"prompt": 11, "completion": 22, "cached": 3}
            return all(f'tidepool_tokens_total{{kind="{kind}",model="echo"}} {n}.0' in text for kind, n in wanted.items())

        await until(counted, 5, "tokens counted by the engine's comment, not by a client's header")

    run(test)


def test_many_models_and_aliases_by_one_address(stack):
    async def test(session: aiohttp.ClientSession) -> None:
        async with session.get(ROOT + "/v1/models") as response:
            assert {card["id"] for card in (await response.json())["data"]} == {"fast", "quick", "slow", "dead", "echo"}
        for name, status in (("fast", 200), ("quick", 200), ("slow", 200), ("nobody", 404), ("FAST", 404)):
            async with session.post(ROOT + "/v1/chat/completions", json=chat(name, max_tokens=1)) as response:
                assert response.status == status, name
                if status == 404:
                    check_error(404, await response.read(), "model_not_found")
                else:
                    assert (await response.json())["model"] == ("fast" if name == "quick" else name)

    run(test)


def test_a_stream_that_waits_hears_comments_and_a_full_queue_says_so(stack):
    async def test(session: aiohttp.ClientSession) -> None:
        url = f"http://127.0.0.1:{NARROW}/v1/chat/completions"
        async with session.post(url, json=chat("slow", stream=True, max_tokens=12)) as first:
            await first.content.readline()
            waiting = asyncio.create_task(_read(session, url, chat("slow", stream=True, max_tokens=2)))
            await until(lambda: _metric(session, NARROW, "queued", 1), 5, "one waits")
            async with session.post(url, json=chat("slow")) as third:
                assert third.status == 503 and int(third.headers["retry-after"]) >= 1
                check_error(503, await third.read(), "model_overloaded")
            status, body = await waiting
        assert status == 200 and body.startswith(b": waiting for the model\n\n") and body.endswith(b"data: [DONE]\n\n")
        rest = body.replace(b": waiting for the model\n\n", b"")
        assert rest.startswith(b"data: ") and rest.count(b" word") == 2

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine_within_a_second(stack, stream):
    async def busy(count: int) -> bool:
        return await asyncio.to_thread(running, SLOW_A) == count

    async def test(session: aiohttp.ClientSession) -> None:
        await until(lambda: busy(0), 10, "nothing runs")
        tasks = [
            asyncio.create_task(_read(session, ROOT + "/v1/chat/completions", chat("slow", stream=stream, max_tokens=600)))
            for _ in range(5)
        ]
        await until(lambda: busy(5), 10, "five run")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if stream:  # the fake engine notices a closed connection when it next writes; it does not look while it is silent
            await until(lambda: busy(0), 1, "all five are gone")
        await until(lambda: _metric(session, FRONT, "running", 0), 1, "the gateway holds no slot")

    run(test)


def test_an_engine_that_dies_before_its_first_byte_is_not_noticed(stack):
    async def test(session: aiohttp.ClientSession) -> None:
        engines = {port: f"m=http://127.0.0.1:{port}" for port in (SLOW_B, SLOW_B + 100)}
        flags = ("--model", "m", "--rate", "20", "--ttft", "3")
        with (
            fake_engine(SLOW_B, stack, *flags) as one,
            fake_engine(SLOW_B + 100, stack, *flags) as two,
            gateway(FRONT + 100, list(engines.values()), stack),
        ):
            url = f"http://127.0.0.1:{FRONT + 100}/v1/chat/completions"
            pending = [
                asyncio.create_task(_read(session, url, chat("m", stream=s, max_tokens=5))) for s in (True, True, False, False)
            ]

            async def all_sent() -> bool:
                return running(SLOW_B) + running(SLOW_B + 100) == 4

            await until(all_sent, 5, "all four are at the engines")
            assert running(SLOW_B) > 0
            os.kill(one.process.pid, signal.SIGKILL)
            for status, body in await asyncio.gather(*pending):
                assert status == 200 and body.count(b" word") == 5 and b"error" not in body
            # After the first byte it cannot be hidden: the stream ends with an error in the one shape.
            async with session.post(url, json=chat("m", stream=True, max_tokens=200)) as response:
                assert (await response.content.readline()).startswith(b"data: ")
                os.kill(two.process.pid, signal.SIGKILL)
                rest = await response.read()
            last = rest.strip().rpartition(b"\n\n")[2]
            check_error(502, last.removeprefix(b"data: "), "engine_failed")
            assert b"[DONE]" not in rest

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_no_engine_is_503_in_the_one_shape(stack, stream):
    async def test(session: aiohttp.ClientSession) -> None:
        async with session.post(ROOT + "/v1/chat/completions", json=chat("dead", stream=stream)) as response:
            assert response.status == 503 and response.headers["retry-after"] == "2"
            check_error(503, await response.read(), "engine_failed")
        await until(lambda: _metric(session, FRONT, "running", 0), 1, "no slot leaks")

    run(test)


async def _read(session: aiohttp.ClientSession, url: str, body: dict) -> tuple[int, bytes]:
    async with session.post(url, json=body) as response:
        return response.status, await response.read()


async def _metric(session: aiohttp.ClientSession, port: int, name: str, value: int) -> bool:
    async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
        text = await response.text()
    found = re.findall(rf"^tidepool_\w*{name}\w*{{[^}}]*}} ([0-9.]+)$", text, re.M)
    assert found, f"no metric {name}"
    return sum(float(number) for number in found) == value


def raw(data: bytes, port: int = FRONT, linger_s: float = 5.0) -> bytes:
    """Send bytes as they are; everything that comes back until the other side closes or is silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=linger_s) as connection:
        connection.sendall(data)
        back = b""
        try:
            while part := connection.recv(65536):
                back += part
                head, found, body = back.partition(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                if found and length and len(body) >= int(length[1]):
                    break
        except (TimeoutError, ConnectionResetError):
            pass
        return back


def request(line: str, *headers: str, body: bytes = b"", key: str = KEY) -> bytes:
    lines = [line, "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def parts(answer: bytes) -> tuple[int, bytes, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), answer[:200]
    return int(head.split()[1]), head, body


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET //engines HTTP/1.1", 404),
        ("GET /engines HTTP/1.1", 404),
        ("GET /engines%2ffast/v1/models HTTP/1.1", 404),
        ("POST /engines/fast/v1/completions HTTP/1.1", 404),
        ("GET /v1/../admin/keys HTTP/1.1", 404),
        ("GET /v1/%2e%2e/admin/keys HTTP/1.1", 404),
        ("GET /admin/keys HTTP/1.1", 403),
        ("GET /admin%2fkeys HTTP/1.1", 403),
        ("GET /admin/../v1/models HTTP/1.1", 403),
        ("GET //v1/models HTTP/1.1", 404),
        ("GET /V1/models HTTP/1.1", 404),
        ("GET /v1/models/ HTTP/1.1", 200),
        ("GET /v1/models/..%2f..%2fadmin HTTP/1.1", 404),
        ("GET /-/tidepool/usage/x HTTP/1.1", 404),
        ("GET /docs HTTP/1.1", 404),
        ("GET /%00 HTTP/1.1", 404),
        ("GET /v1/chat/completions HTTP/1.1", 405),
        ("DELETE /v1/models HTTP/1.1", 405),
        ("POST /metrics HTTP/1.1", 405),
        ("TRACE / HTTP/1.1", 404),
    ],
)
def test_a_path_is_one_of_ours_or_404(stack, line, status):
    got, _, body = parts(raw(request(line)))
    assert got == status
    if status >= 400:
        check_error(got, body)


@pytest.mark.parametrize("key", ["", "tp-wrong", "' OR 1=1 --", "x" * 5000])
def test_no_or_another_key_is_401(stack, key):
    got, _, body = parts(raw(request("GET /v1/models HTTP/1.1", key=key)))
    check_error(got, body)
    assert got == 401 and (len(key) < 10 or key.encode() not in body)


@pytest.mark.parametrize(
    "header",
    ["X-Request-Id: a\r\n Set-Cookie: evil=1", "X-Request-Id: a\rSet-Cookie: evil=1", "X-Request-Id: a\nSet-Cookie: evil=1",
     "X-Request-Id: \x00\x01", "X-Request-Id: \xff<script>", "X-Request-Id: " + "a" * 5000],
)  # fmt: skip
def test_no_header_of_ours_is_made_of_the_clients(stack, header):
    status, head, _ = parts(raw(request("GET /v1/models HTTP/1.1", header)))
    assert status in (200, 400) and b"evil" not in head and b"script" not in head and b"aaaa" not in head


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"model":"fast","messages":' + b"[" * 100_000, 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b'{"model":"fast","messages":[],"n":129}', 400, "invalid_value"),
        (b'{"model":"fast","messages":"x"}', 400, "invalid_value"),
        (b'{"model":"fast","messages":[],"max_tokens":-1}', 400, "invalid_value"),
        (b'{"model":["fast"]}', 400, "invalid_type"),
        (b'{"messages":[]}', 400, "missing_model"),
        (b'{"model":"fast\\ud800"}', 404, "model_not_found"),
        (b"x" * (1 << 20) + b"x", 413, "request_too_large"),
    ],
    ids=range(11),
)
def test_a_body_that_is_wrong_is_4xx(stack, body, status, code):
    got, _, said = parts(raw(request("POST /v1/chat/completions HTTP/1.1", body=body)))
    assert got == status
    check_error(got, said, code)


def test_a_body_that_grows_too_large_without_saying_so_is_413(stack):
    head = request("POST /v1/completions HTTP/1.1").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    got, _, body = parts(raw(head + chunk * 17))
    assert got == 413
    check_error(got, body, "request_too_large")


@pytest.mark.parametrize("part", [b"", b'{"model":'])
def test_a_body_that_never_ends_is_408(stack, part):
    head = request("POST /v1/completions HTTP/1.1").replace(b"Content-Length: 0", b"Content-Length: 500")
    began = time.monotonic()
    got, _, body = parts(raw(head + part, linger_s=15))
    assert got == 408 and time.monotonic() - began < 10
    check_error(got, body, "request_timeout")


def test_half_open_connections_do_not_keep_others_out(stack):
    halves = [socket.create_connection(("127.0.0.1", FRONT)) for _ in range(100)]
    for number, half in enumerate(halves):
        half.sendall(request("POST /v1/completions HTTP/1.1").replace(b"Content-Length: 0", b"Content-Length: 9")[: 20 + number])
    assert parts(raw(request("GET /v1/models HTTP/1.1")))[0] == 200
    for half in halves:
        half.close()
    body = json.dumps(chat("fast", max_tokens=1)).encode()
    assert parts(raw(request("POST /v1/chat/completions HTTP/1.1", body=body)))[0] == 200


def test_what_was_asked_is_in_no_log(stack):
    for body in (
        b'{"model":"fast","messages":"very secret words"}',
        b'{"very secret words',
        b'{"model":"dead","prompt":"very secret words"}',
    ):
        raw(request("POST /v1/completions HTTP/1.1", body=body))
    logs = [path.read_bytes() for path in stack.glob("gateway-*.log")]
    assert logs and not any(b"very secret words" in log or b"Traceback" in log for log in logs)
