"""What a hostile or broken client sends gets the right 4xx in the one error shape, and the engine goes on serving.
After every case one good request must be answered. `WORD` is in every prompt, good or bad: at the end no log file may have it.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from client import (
    CHAT,
    EMBED,
    Answer,
    chat,
    connect,
    engine_metric,
    head,
    internal_secret,
    is_error,
    new_key,
    raw,
    read_answer,
    replica_address,
    request,
    until,
)
from conftest import Endpoint

WORD = "quillfeather" + uuid.uuid4().hex[:8]
SAY: list[Any] = [{"role": "user", "content": f"Say {WORD}."}]
COMPLETE, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ANSWER, MESSAGES, ENGINE = "/v1/responses", "/v1/messages", f"/engines/{CHAT}"
MIB = 2**20
NONCE = "AAAAAAAAAAAAAAAAAAAAAA=="
UPGRADE = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", NONCE)]


@pytest.fixture(scope="module")
def half_open(endpoint: Endpoint) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connections, opened before all else: a request whose body never comes, and one whose header never ends."""
    with ExitStack() as stack:
        body, header = (stack.enter_context(closing(connect(endpoint.root))) for _ in range(2))
        body.sendall(_head(endpoint, [("Content-Length", "50")]))
        header.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        yield body, header


@pytest.fixture(autouse=True)
def serving(endpoint: Endpoint, half_open: tuple[socket.socket, socket.socket]) -> Iterator[None]:
    """After each test the endpoint answers a good request."""
    yield
    good = chat(endpoint.root, endpoint.api_key, f"Hello {WORD}", max_tokens=1)
    assert good.status == 200, good


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": CHAT, "messages": SAY, "max_tokens": 2, **fields}


def _head(endpoint: Endpoint, headers: list[tuple[str, str]], method: str = "POST", path: str = COMPLETE) -> bytes:
    return head(method, path, [("Host", "x"), ("Authorization", f"Bearer {endpoint.api_key}"), *headers])


def _post(endpoint: Endpoint, path: str, body: Any, headers: list[tuple[str, str]] | None = None) -> Answer:
    return request(endpoint.root, "POST", path, endpoint.api_key, body, headers)


@pytest.mark.parametrize("key", [None, "", "sk-of-another-place", "tp-" + "x" * 43, "tp-é", "x" * 9000])
def test_no_key_or_a_foreign_one(endpoint: Endpoint, key: str | None) -> None:
    for method, path in (("POST", COMPLETE), ("GET", "/v1/models"), ("GET", "/admin/keys"), ("POST", "/tokenize")):
        answer = request(endpoint.root, method, path, key, _body())
        is_error(answer, 401, "invalid_api_key" if key else "missing_api_key")
        assert answer.headers["x-request-id"]


def test_dead_keys(endpoint: Endpoint) -> None:
    with new_key(endpoint, expires_at=time.time() - 60) as expired:
        is_error(chat(endpoint.root, expired["key"]), 401, "invalid_api_key")
    with new_key(endpoint) as revoked:
        assert chat(endpoint.root, revoked["key"], max_tokens=1).status == 200
    gone = time.monotonic() + 2.0
    until("it is two seconds later", lambda: time.monotonic() > gone, 3.0)
    is_error(chat(endpoint.root, revoked["key"]), 401, "invalid_api_key")


def test_a_model_that_the_key_may_not_use(endpoint: Endpoint) -> None:
    with new_key(endpoint, models=[EMBED]) as key:
        for name in (CHAT, "default"):
            is_error(chat(endpoint.root, key["key"], model=name), 403, "model_not_allowed")
        listed = request(endpoint.root, "GET", "/v1/models", key["key"])
        assert [model["id"] for model in listed.data["data"]] == [EMBED]
        is_error(request(endpoint.root, "GET", f"/v1/models/{CHAT}", key["key"]), 403, "model_not_allowed")


@pytest.mark.parametrize("path", [
    "", "/", "/health", "/v1/models", "/metrics", "/docs", "/openapi.json", "/load", "/version", "/ping", "/-/healthz",
    "/-/routes", "/-/tidepool/usage/x", "/v1/load_lora_adapter", COMPLETE, "/tokenize", "/v1/models.",
    "/../" + CHAT + "/metrics", "//metrics",
])  # fmt: skip
def test_engine_routes_are_closed(endpoint: Endpoint, path: str) -> None:
    own = replica_address(endpoint)
    refusal = (404, "not_found") if path == "/-/routes" else (403, "forbidden")  # by `serve_apps/edge.py`, before the guard
    for root, method in itertools.product((endpoint.root, own), ("GET", "POST")):
        for headers in ([], [("x-tidepool-secret", "guess")], [("x-tidepool-secret", internal_secret(endpoint)[:-1])]):
            is_error(request(root, method, ENGINE + path, endpoint.admin_key, _body(), headers), *refusal)
    # Below the replica's own root there is Serve's health check and nothing of the engine; no client is ever sent there.
    answer = request(own, "GET", path or "/v1/chat", endpoint.admin_key)
    assert answer.status == 404 or (path.startswith("/-/") and len(answer.body) < 100)


@pytest.mark.parametrize("path", [
    f"/{ENGINE}/v1/models", f"/engines%2f{CHAT}/v1/models", f"/%65ngines/{CHAT}/v1/models", f"/v1/..{ENGINE}/metrics",
    f"/.{ENGINE}/health", f"/ENGINES/{CHAT}/health", f"/engines./{CHAT}/health", f"/engines/{CHAT}%00/health",
    f"/engines/{CHAT};x/health", "/engines", "/engines/", "/engines/other/health", "/v1//models", f"{COMPLETE}/", "/V1/models",
    "/..", "/%2e%2e/engines", "\\engines", "/", "*", "/-/routes", "/-/healthz/x", "/docs", "/openapi.json", "/redoc", "/load",
    "/v1/load_lora_adapter", "/v1/models/..%2fengines", "/v1/models/%00", "/v1/models/%ff", "/v1/models/" + "a" * 8000,
    "/v1/files", "/admin", "/adminkeys",
])  # fmt: skip
def test_path_tricks_find_nothing(endpoint: Endpoint, path: str) -> None:
    is_error(request(endpoint.root, "GET", path, endpoint.api_key), 404)


def test_an_absolute_address_is_no_way_in(endpoint: Endpoint) -> None:
    is_error(request(endpoint.root, "GET", endpoint.root + ENGINE + "/metrics", endpoint.api_key), 403, "forbidden")


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", COMPLETE, 405), ("PUT", COMPLETE, 405), ("DELETE", "/v1/models", 405), ("POST", "/v1/models", 405),
    ("OPTIONS", COMPLETE, 405), ("BREW", COMPLETE, 405), ("post", COMPLETE, 405), ("TRACE", "/v1/models", 405),
    ("POST", "/healthz", 405), ("DELETE", "/metrics", 405), ("PUT", "/readyz", 405),
])  # fmt: skip
def test_methods(endpoint: Endpoint, method: str, path: str, status: int) -> None:
    is_error(request(endpoint.root, method, path, endpoint.api_key), status, "method_not_allowed")


def test_admin_routes_need_an_admin_key(endpoint: Endpoint) -> None:
    for method, path in (
        ("GET", "/admin/keys"),
        ("POST", "/admin/keys"),
        ("DELETE", "/admin/keys/x"),
        ("GET", "/admin/usage"),
        ("GET", "/admin/x"),
    ):
        is_error(request(endpoint.root, method, path, endpoint.api_key, {"name": "mine"}), 403, "admin_key_required")


@pytest.mark.parametrize(("method", "path", "body", "status"), [
    ("POST", "/admin/keys", {"name": ""}, 400), ("POST", "/admin/keys", {"name": 5}, 400),
    ("POST", "/admin/keys", {"nam": "x"}, 400), ("POST", "/admin/keys", {"name": "x", "rpm": -1}, 400),
    ("POST", "/admin/keys", {"name": "x", "tpm": 10**30}, 400), ("POST", "/admin/keys", {"name": "x", "models": "y"}, 400),
    ("POST", "/admin/keys", {"name": "x", "expires_at": "never"}, 400), ("POST", "/admin/keys", {"name": "\ud800"}, 400),
    ("POST", "/admin/keys", [], 400), ("POST", "/admin/keys", {"name": "x" * 70_000}, 413), ("PUT", "/admin/keys", {}, 405),
    ("DELETE", "/admin/keys/nothere", None, 404), ("DELETE", "/admin/keys/%00", None, 404),
    ("GET", "/admin/usage?since=x", None, 400), ("GET", "/admin/usage?what=1", None, 400), ("GET", "/admin/nothing", None, 404),
])  # fmt: skip
def test_admin_mistakes(endpoint: Endpoint, method: str, path: str, body: Any, status: int) -> None:
    is_error(request(endpoint.root, method, path, endpoint.admin_key, body), status)


@pytest.mark.parametrize("body", [
    b"", b"{", b'{"model":', b"[1]", b'"x"', b"null", b"\xff\xfe\x00", b'{"model":"' + CHAT.encode() + b'","messages":"\xff"}',
    b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"max_tokens":' + b"9" * 5000 + b"}", b"{'model': 1}", b"\0" * 1000,
    b"a=b&c=d",
], ids=lambda body: repr(body[:12]))  # fmt: skip
def test_bodies_that_are_no_json_object(endpoint: Endpoint, body: bytes) -> None:
    is_error(_post(endpoint, COMPLETE, body), 400, "invalid_json")


@pytest.mark.parametrize("fields", [
    {"model": None}, {"model": 1}, {"model": [CHAT]}, {"messages": "x"}, {"messages": None}, {"messages": []},
    {"messages": [1]}, {"messages": [{"role": 1, "content": WORD}]}, {"messages": [{"role": "user", "content": 7}]},
    {"messages": [{"role": "user", "content": "\ud800"}]},
    {"messages": [{"role": "user", "content": [{"type": "wat", "text": WORD}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}]},
    {"max_tokens": -5}, {"max_tokens": 0}, {"max_tokens": "many"}, {"max_tokens": 1.5}, {"max_tokens": 10**9},
    {"max_tokens": [1]}, {"max_tokens": 10**400}, {"max_completion_tokens": -1}, {"n": 100_000}, {"n": 0}, {"n": -1},
    {"n": "two"}, {"n": 1e30}, {"temperature": "hot"}, {"temperature": -1}, {"temperature": float("nan")},
    {"temperature": float("inf")}, {"top_p": 2}, {"top_k": -7}, {"stop": 5}, {"stop": [["a"]]}, {"stream": "perhaps"},
    {"stream": 7}, {"stream": True, "stream_options": 5}, {"stream": True, "max_tokens": -1},
    {"stream_options": {"include_usage": True}}, {"seed": "x"}, {"seed": 2**70}, {"logprobs": True, "top_logprobs": 1000},
    {"logit_bias": {"99999999": 1}}, {"logit_bias": "x"}, {"tools": "x"}, {"tools": [{"type": "function"}]},
    {"tool_choice": "wat"}, {"response_format": "json"}, {"response_format": {"type": "wat"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
    {"structured_outputs": {"regex": "(((("}}, {"frequency_penalty": 99}, {"min_tokens": 50}, {"chat_template": "{{ 1/0 }}"},
    {"user": 5}, {"allowed_token_ids": [10**9]}, {"prompt_logprobs": -9}, {"priority": "x"}, {"truncate_prompt_tokens": -5},
    {"cache_salt": ""},
], ids=lambda fields: json.dumps(fields)[:40])  # fmt: skip
def test_wrong_fields(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    answer = _post(endpoint, COMPLETE, _body(**fields))
    is_error(answer, 400)
    assert answer.headers["x-request-id"]


def test_too_long_a_prompt(endpoint: Endpoint) -> None:
    is_error(chat(endpoint.root, endpoint.api_key, f"{WORD} parcel " * 3000), 400, "context_length_exceeded")
    is_error(_post(endpoint, COMPLETE, _body(max_tokens=2048)), 400, "context_length_exceeded")


@pytest.mark.parametrize("name", ["gpt-9", f"{CHAT}:no-adapter", "../../etc/passwd", "\ud800", "x" * 5000])
def test_unknown_models(endpoint: Endpoint, name: str) -> None:
    is_error(_post(endpoint, COMPLETE, _body(model=name)), 404, "model_not_found")


@pytest.mark.parametrize(("path", "body", "code"), [
    (VECTORS, {"model": CHAT, "input": WORD}, "model_not_supported"),
    (COMPLETE, {"model": EMBED, "messages": SAY}, "model_not_supported"),
    (TEXT, {"model": EMBED, "prompt": WORD}, "model_not_supported"),
    ("/v1/score", {"model": CHAT, "text_1": WORD, "text_2": "b"}, "model_not_supported"),
    ("/v1/audio/transcriptions", {"model": CHAT}, "model_not_supported"), (TEXT, {"model": CHAT}, None),
    (TEXT, {"model": CHAT, "prompt": 5}, None), (TEXT, {"model": CHAT, "prompt": [10**9]}, None),
    (TEXT, {"model": CHAT, "prompt": [-1]}, None), (TEXT, {"model": CHAT, "prompt": [WORD] * 3000}, None),
    (TEXT, {"model": CHAT, "prompt_embeds": "AAAA"}, None), (ANSWER, {"model": CHAT, "input": 5}, None),
    (ANSWER, {"model": CHAT}, None), (ANSWER, {"model": CHAT, "input": WORD, "max_output_tokens": -1}, None),
    (ANSWER, {"model": CHAT, "input": WORD, "background": True}, None), (MESSAGES, {"model": CHAT, "messages": SAY}, None),
    (MESSAGES, {"model": CHAT, "messages": SAY, "max_tokens": -1}, None),
    (MESSAGES, {"model": CHAT, "messages": SAY, "max_tokens": 5000}, None), ("/tokenize", {"model": CHAT, "prompt": 5}, None),
    ("/detokenize", {"model": CHAT, "tokens": [-1]}, None), ("/detokenize", {"model": CHAT, "tokens": [10**12]}, None),
])  # fmt: skip
def test_mistakes_on_the_other_routes(endpoint: Endpoint, path: str, body: dict[str, Any], code: str | None) -> None:
    is_error(_post(endpoint, path, body), 400, code)


def test_forms(endpoint: Endpoint) -> None:
    path = "/v1/audio/transcriptions"
    for kind, body, code in (
        ("", b"", "invalid_form"),
        ("; boundary=b", b"--b\r\nxx", "missing_model"),
        ("; boundary=b", b"", "missing_model"),
    ):
        sent = [("Content-Type", f"multipart/form-data{kind}"), ("Content-Length", str(len(body)))]
        is_error(raw(endpoint.root, _head(endpoint, sent, path=path) + body, "POST"), 400, code)


def test_100_mb_are_refused_early(endpoint: Endpoint) -> None:
    """The answer comes before the body does. Of a body without a length, the limit and what the buffers hold is taken."""
    declared = raw(endpoint.root, _head(endpoint, [("Content-Length", str(100 * MIB))]), "POST", 5)
    is_error(declared, 413, "request_too_large")
    is_error(raw(endpoint.root, head("POST", COMPLETE, [("Host", "x"), ("Content-Length", str(100 * MIB))]), "POST", 5), 401)
    for sent_length, most in ((True, 16 * MIB), (False, 48 * MIB)):
        framing = ("Content-Length", str(100 * MIB)) if sent_length else ("Transfer-Encoding", "chunked")
        piece = b"x" * 65536 if sent_length else b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with closing(connect(endpoint.root)) as sock:
            sock.sendall(_head(endpoint, [framing]))
            sent = 0
            while not select.select([sock], [], [], 0)[0]:
                sock.sendall(piece)
                sent += len(piece)
                assert sent < 100 * MIB, "the whole body was taken"
            is_error(read_answer(sock, "POST"), 413, "request_too_large")
            assert sent < most


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "identity, gzip", "wat"])
def test_compressed_bodies(endpoint: Endpoint, encoding: str) -> None:
    is_error(_post(endpoint, COMPLETE, _body(), [("Content-Encoding", encoding)]), 415)


@pytest.mark.parametrize("payload", [
    b"hello there\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100, b"GET /v1/models\r\n\r\n",
    b"GET /v1/models HTTX/1.1\r\n\r\n", b"GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models#x HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n: x\r\n\r\n", b"GET / HTTP/1.1\r\nx: a\0b\r\n\r\n",
    b"GET / HTTP/1.1\r\nx-request-id: a\rSet-Cookie: b\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 0x10\r\n\r\n", b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 500 + b"\r\n",
], ids=lambda payload: repr(payload[:50]))  # fmt: skip
def test_bytes_that_are_not_http(endpoint: Endpoint, payload: bytes) -> None:
    """HAProxy's parser answers 400 by itself, before there is a request that a rule could see.

    Its page is a constant in the program: in 2.8 `errorfile`, `errorfiles` and `http-error` reach only the answers given to a
    parsed request (an empty error file makes the parser close without a word, which is worse). So only the status is checked.
    """
    with closing(connect(endpoint.root)) as sock:
        sock.sendall(payload)
        assert read_answer(sock).status == 400


@pytest.mark.parametrize("given", ["é", "a b", "{}", "", "a" * 500, "a\r\n b", "\x7f", "a, b"])
def test_a_bad_request_id_is_replaced(endpoint: Endpoint, given: str) -> None:
    for key, status in ((endpoint.api_key, 200), (None, 401)):
        answer = chat(endpoint.root, key, WORD, headers=[("x-request-id", given)])
        assert answer.status == status and answer.headers["x-request-id"] != given


def test_a_good_request_id_comes_back(endpoint: Endpoint) -> None:
    for key, path, status in (
        (endpoint.api_key, COMPLETE, 200),
        (None, COMPLETE, 401),
        (endpoint.api_key, "/nothing", 404),
        (None, ENGINE + "/x", 403),
    ):
        answer = request(endpoint.root, "POST", path, key, _body(), [("x-request-id", "my-Request.1:a_b")])
        assert (answer.status, answer.headers["x-request-id"]) == (status, "my-Request.1:a_b")


def test_large_headers_and_header_injection(endpoint: Endpoint) -> None:
    is_error(chat(endpoint.root, endpoint.api_key, headers=[("x-big", "a" * 20_000)]), 431, "headers_too_large")
    for ending in ("\r\n", "\n"):
        answer = chat(endpoint.root, endpoint.api_key, WORD, headers=[("x-request-id", f"a{ending}x-evil: 1")])
        assert answer.status == 200 and "x-evil" not in answer.headers and answer.headers["x-request-id"] == "a"


@pytest.mark.parametrize(
    "name",
    [
        "x-session-id",
        "X_Session_Id",
        "serve_multiplexed_model_id",
        "Serve-Multiplexed-Model-Id",
        "traceparent",
        "cookie",
        "user-agent",
    ],
)
def test_headers_that_serve_would_stumble_over(endpoint: Endpoint, name: str) -> None:
    assert chat(endpoint.root, endpoint.api_key, WORD, headers=[(name, "\xe9\xff")]).status == 200


@pytest.mark.parametrize("header", [
    ("x-tidepool-secret", "x"), ("x-tidepool-usage", "9 9 9"), ("x-serve-anything", "1"), ("x-forwarded-for", "1.2.3.4"),
    ("expect", "nonsense"), ("x-data-parallel-rank", "99"), ("range", "bytes=0-1"),
    ("connection", "upgrade"), ("upgrade", "h2c"),
    ("x-request-timeout-seconds", "0.001"), ("x-request-disconnect-disabled", "?1"), ("content-encoding", "IDENTITY"),
], ids=lambda header: header[0])  # fmt: skip
def test_headers_without_effect(endpoint: Endpoint, header: tuple[str, str]) -> None:
    answer = chat(endpoint.root, endpoint.api_key, WORD, headers=[header])
    assert answer.status == 200 and answer.data["usage"]["completion_tokens"] == 2
    assert not [name for name in answer.headers if name.startswith("x-tidepool")]


def test_smuggled_requests_are_requests(endpoint: Endpoint) -> None:
    """Length and chunks together: what follows the last chunk is a request of its own, and is refused like any other."""
    inner = f"GET {ENGINE}/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    framing = [("Content-Length", str(5 + len(inner))), ("Transfer-Encoding", "chunked")]
    with closing(connect(endpoint.root)) as sock:
        sock.sendall(_head(endpoint, framing) + b"0\r\n\r\n" + inner)
        is_error(read_answer(sock, "POST"), 400, "invalid_json")
        sock.settimeout(5)
        rest = b""
        while piece := sock.recv(65536):
            rest += piece
    assert b"vllm:" not in rest and (not rest or b" 403 " in rest.split(b"\r\n")[0])


def test_http_1_0(endpoint: Endpoint) -> None:
    assert (
        raw(endpoint.root, head("GET", "/v1/models", [("Authorization", f"Bearer {endpoint.api_key}")], "HTTP/1.0")).status == 200
    )
    is_error(raw(endpoint.root, head("GET", "/v1/models", [], "HTTP/1.0")), 401)
    is_error(raw(endpoint.root, head("GET", ENGINE, [], "HTTP/1.0")), 403)


def test_websockets(endpoint: Endpoint) -> None:
    for path in ("/v1/realtime", COMPLETE, "/", f"{ENGINE}/v1/realtime"):
        is_error(request(endpoint.root, "GET", path, endpoint.api_key, headers=UPGRADE), 400, "websocket_not_supported")
    assert request(replica_address(endpoint), "GET", f"{ENGINE}/v1/realtime", endpoint.api_key, headers=UPGRADE).status == 403


def test_a_client_that_stops_reading(endpoint: Endpoint) -> None:
    """Streams that nobody reads do not hold up the others; when their clients are gone, so are the requests."""
    with ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(closing(connect(endpoint.root)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps(_body(stream=True, max_tokens=1500, n=4, ignore_eos=True)).encode()
            sock.sendall(_head(endpoint, [("Content-Length", str(len(body)))]) + body)
        until("they run", lambda: engine_metric(endpoint, "vllm:num_requests_running") >= 8, 20)
        assert chat(endpoint.root, endpoint.api_key, WORD, max_tokens=1).status == 200
    until("they are gone", lambda: engine_metric(endpoint, "vllm:num_requests_running") == 0, 10)


def test_half_open_requests_are_given_up(half_open: tuple[socket.socket, socket.socket]) -> None:
    is_error(read_answer(half_open[0], "POST"), 408, "request_timeout")
    assert read_answer(half_open[1], "POST").status == 408  # by HAProxy's parser, as above


def test_the_endpoint_made_no_error_of_its_own(endpoint: Endpoint) -> None:
    for _ in range(8):
        lines = request(endpoint.root, "GET", "/metrics", endpoint.admin_key).body.decode().splitlines()
        failed = [line for line in lines if line.startswith("tidepool_requests_total{") and 'status="5' in line]
        assert {line.split()[-1] for line in failed} <= {"0.0"}


def test_no_prompt_is_in_a_log(endpoint: Endpoint) -> None:
    logs = [file for file in (endpoint.run_dir / "ray" / "session_latest" / "logs").rglob("*") if file.is_file()]
    assert len(logs) > 10
    assert [str(file) for file in logs if WORD.encode() in file.read_bytes()] == []
