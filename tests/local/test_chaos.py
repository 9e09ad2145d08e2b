"""`kill -9` of each process of a serving cluster in turn, under a steady light load: it answers again without a hand.

Runs after all other tests that share the cluster (`conftest`). Each case prints how many requests failed and for how long.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Endpoint
from processes import by_kind, counts
from traffic import Load, ask, chat_body, summary

MODEL = "tidepool-chat"
APP = "engine-tidepool-chat"
CLIENTS = 3
RECOVERY_S = 180.0
# Where nothing needs to be lost: only an answer that has begun can break off, one per client. Without HAProxy nobody answers.
MOST_FAILED = {"manager": 0, "fallback": 0, "controller": 0, "store": 0} | dict.fromkeys(
    ("gateway", "worker", "core", "replica"), CLIENTS
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gateway", "manager", "haproxy", "fallback", "store", "controller", "core", "replica"])
def test_kill_9(endpoint: Endpoint, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = _settled(endpoint)
    (victim, *_) = before[kind]
    with Load(endpoint.root, endpoint.api_key, MODEL, CLIENTS) as load:
        _wait(lambda: len(load.results) > 2 * CLIENTS, 60, "the load does not run")
        assert {result.verdict for result in load.results} == {"ok"}, load.results
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)

        def recovered() -> bool:
            if load.answered_since(killed) < 2 * CLIENTS:
                return False
            now = by_kind(endpoint.run_dir, APP)
            whole = counts(now) == counts(before) and victim not in now[kind]
            calm = time.monotonic() - max((r.ended for r in load.results if r.verdict != "ok"), default=killed) > 3.0
            return whole and calm

        _wait(recovered, RECOVERY_S, lambda: f"{summary(load.results)}; {counts(by_kind(endpoint.run_dir, APP))}")
        whole_s = time.monotonic() - killed
    results = [result for result in load.results if result.ended > killed]
    line = f"kill -9 {kind:10s} {summary(results)}; whole again after {whole_s:.1f} s"
    with capsys.disabled():
        print(f"\n{line}", file=sys.stderr)
    assert not [result for result in results if result.verdict == "bad"], line
    failed = sum(1 for result in results if result.verdict != "ok")
    assert failed <= MOST_FAILED.get(kind, len(results)), line
    _usage_adds_up(endpoint)


def _usage_adds_up(endpoint: Endpoint) -> None:
    """What a new key uses is counted, request by request and token by token."""
    key = _admin(endpoint, "/admin/keys", {"name": f"chaos-{time.monotonic_ns()}"})
    made = time.monotonic()
    for turn in range(4):
        result = ask(endpoint.root, key["key"], chat_body(MODEL, stream=turn % 2 == 0))
        while "invalid_api_key" in result.detail and time.monotonic() - made < 2:  # each gateway learns of a new key by itself
            result = ask(endpoint.root, key["key"], chat_body(MODEL, stream=turn % 2 == 0))
        assert result.verdict == "ok", result

    def counted() -> bool:
        rows = _admin(endpoint, f"/admin/usage?key={urllib.parse.quote(key['id'])}")["data"]
        return [(row["requests"], row["completion_tokens"]) for row in rows] == [(4, 32)]

    _wait(counted, 15, lambda: str(_admin(endpoint, f"/admin/usage?key={urllib.parse.quote(key['id'])}")))


def _settled(endpoint: Endpoint) -> dict[str, list[int]]:
    """The processes, when each kind is there and none is being started or drained."""
    found: dict[str, list[int]] = {}

    def whole() -> bool:
        nonlocal found
        found = by_kind(endpoint.run_dir, APP)
        return counts(found) == {kind: 2 if kind == "gateway" else 1 for kind in found}

    _wait(whole, RECOVERY_S, lambda: str(counts(found)))
    return found


def _admin(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Authorization": f"Bearer {endpoint.admin_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(endpoint.root + path, json.dumps(body).encode() if body else None, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def _wait(true: Callable[[], bool], limit_s: float, what: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.25)
