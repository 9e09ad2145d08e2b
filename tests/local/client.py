"""A small HTTP client that sends what a well-behaved one would refuse to: any path, any header, any bytes, half a request.

For the abuse, key, cancel and usage tests. One fresh connection per request, so that HAProxy may choose any gateway each time.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from conftest import Endpoint

CHAT = "tidepool-chat"
EMBED = "tidepool-embed"
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; header names are in lower case, the last of several wins."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """`error.code`, for an error in the one shape."""
        code: str | None = self.data["error"]["code"]
        return code


def connect(root: str, timeout_s: float = TIMEOUT_S) -> socket.socket:
    """A connection to `http://host:port`."""
    spot = urlsplit(root)
    return socket.create_connection((spot.hostname or "", spot.port or 80), timeout_s)


def read_answer(sock: socket.socket, method: str = "GET") -> Answer:
    """Read one answer from a connection. Raises http.client.HTTPException when there is none."""
    response = http.client.HTTPResponse(sock, method=method)
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def head(method: str, path: str, headers: list[tuple[str, str]], version: str = "HTTP/1.1") -> bytes:
    """The bytes of a request up to its body; nothing is checked or escaped."""
    lines = [f"{method} {path} {version}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def raw(root: str, payload: bytes, method: str = "GET", timeout_s: float = TIMEOUT_S) -> Answer:
    """Send exactly these bytes and read one answer."""
    with closing(connect(root, timeout_s)) as sock:
        sock.sendall(payload)
        return read_answer(sock, method)


def request(
    root: str,
    method: str,
    path: str,
    key: str | None = None,
    body: Any = None,
    headers: list[tuple[str, str]] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """One request on a fresh connection. `body` is sent as it is when it is bytes, as JSON when it is anything else."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = [("Host", urlsplit(root).netloc), ("Connection", "close")]
    if key is not None:
        sent.append(("Authorization", f"Bearer {key}"))
    if body is not None:
        sent += [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    return raw(root, head(method, path, sent + (headers or [])) + data, method, timeout_s)


def chat(root: str, key: str | None, text: str = "Hello", headers: list[tuple[str, str]] | None = None, **fields: Any) -> Answer:
    """One chat completion; `fields` change or add members of the body."""
    body = {"model": CHAT, "messages": [{"role": "user", "content": text}], "max_tokens": 2, **fields}
    return request(root, "POST", "/v1/chat/completions", key, body, headers)


def is_error(answer: Answer, status: int, code: str | None = None) -> None:
    """Assert the one wire shape, `{"error": {"message", "type", "param", "code"}}`, and the status."""
    shown = f"{answer.status} {answer.headers} {answer.body[:600]!r}"
    assert answer.status == status, shown
    assert answer.headers.get("content-type", "").startswith("application/json"), shown
    assert set(answer.data) == {"error"}, shown
    error = answer.data["error"]
    assert set(error) == {"message", "type", "param", "code"}, shown
    assert isinstance(error["message"], str) and error["message"], shown
    assert isinstance(error["type"], str) and error["type"], shown
    assert error["param"] is None or isinstance(error["param"], str), shown
    assert error["code"] is None or isinstance(error["code"], str), shown
    assert "Traceback" not in error["message"] and 'File "' not in error["message"], shown
    if code is not None:
        assert error["code"] == code, shown


def internal_secret(endpoint: Endpoint) -> str:
    """What engines ask for, read from the cluster's SQLite store."""
    with closing(sqlite3.connect(f"file:{endpoint.run_dir}/tidepool.db?mode=ro", uri=True)) as store:
        row: tuple[str] = store.execute("select value from settings where name = 'internal_secret'").fetchone()
    return row[0]


def replica_address(endpoint: Endpoint, application: str = f"engine-{CHAT}") -> str:
    """`http://host:port` of a replica itself, as HAProxy was told of it."""
    for file in endpoint.run_dir.glob("**/haproxy.cfg"):
        found = re.search(rf"^\s*server SERVE_REPLICA_{application}-\S+ (\S+:\d+)", file.read_text(), re.M)
        if found:
            return f"http://{found[1]}"
    raise AssertionError(f"no replica of {application} is in a configuration of HAProxy below {endpoint.run_dir}")


def engine_metric(endpoint: Endpoint, name: str) -> float:
    """One of the chat engine's own metrics, summed over its labels."""
    headers = [("x-tidepool-secret", internal_secret(endpoint))]
    answer = request(endpoint.root, "GET", f"/engines/{CHAT}/metrics", headers=headers)
    assert answer.status == 200, answer
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", answer.body.decode(), re.M)
    assert values, f"the engine has no metric {name}"
    return sum(map(float, values))


def until(what: str, check: Callable[[], bool], timeout_s: float, pause_s: float = 0.02) -> float:
    """Wait for a condition; seconds it took. Raises AssertionError."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(pause_s)
    return time.monotonic() - began


@contextmanager
def new_key(endpoint: Endpoint, **spec: Any) -> Iterator[dict[str, Any]]:
    """A key of its own for a test, revoked afterwards; `key` is its secret."""
    made = request(endpoint.root, "POST", "/admin/keys", endpoint.admin_key, {"name": "test", **spec})
    assert made.status == 201, made
    try:
        yield made.data
    finally:
        request(endpoint.root, "DELETE", f"/admin/keys/{made.data['id']}", endpoint.admin_key)


def usage(endpoint: Endpoint, key_id: str) -> dict[str, dict[str, Any]]:
    """The key's rows of `/admin/usage`, by model."""
    answer = request(endpoint.root, "GET", f"/admin/usage?key={key_id}", endpoint.admin_key)
    assert answer.status == 200, answer
    return {row["model"]: row for row in answer.data["data"]}
