"""A client that leaves frees its engine slot within a second, and what it used is counted all the same.

Seen in vLLM's own metric of running requests, not in ours. An engine that is busy with others' requests would blur the count, so
each test begins when it is idle.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from typing import Any

import pytest
from client import CHAT, connect, engine_metric, head, new_key, until, usage
from conftest import Endpoint

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
LONG: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True}
SAY: list[Any] = [{"role": "user", "content": "Tell me a long story."}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": SAY, "stream": True, **LONG}),
        ("/v1/chat/completions", {"messages": SAY, **LONG}),
        ("/v1/completions", {"prompt": "Once", "stream": True, "n": 2, **LONG}),
        ("/v1/completions", {"prompt": ["Once", "Twice"], **LONG}),
        ("/v1/responses", {"input": "A story", "stream": True, "max_output_tokens": 1900, "ignore_eos": True}),
        ("/v1/messages", {"messages": SAY, "stream": True, **LONG}),
    ],
    ids=["chat stream", "chat", "completions stream n=2", "completions of two prompts", "responses stream", "messages stream"],
)
def test_a_client_that_leaves_frees_its_slot(endpoint: Endpoint, path: str, body: dict[str, Any]) -> None:
    until("the engine is idle", lambda: _busy(endpoint) == 0, 30)
    with new_key(endpoint, max_parallel=1) as key:
        data = json.dumps({"model": CHAT, **body}).encode()
        headers = [("Host", "x"), ("Authorization", f"Bearer {key['key']}"), ("Content-Length", str(len(data)))]
        with closing(connect(endpoint.root)) as sock:
            sock.sendall(head("POST", path, headers) + data)
            if body.get("stream"):
                received = b""
                while received.count(b"data:") < 12:
                    piece = sock.recv(65536)
                    assert piece, received
                    received += piece
                assert received.startswith(b"HTTP/1.1 200")
            until("the engine works on it", lambda: engine_metric(endpoint, RUNNING) >= 1, 20)
            tokens = engine_metric(endpoint, "vllm:generation_tokens_total")
            until("it has made tokens", lambda: engine_metric(endpoint, "vllm:generation_tokens_total") > tokens + 4, 20)
            left = time.monotonic()
        until("the slot is free", lambda: _busy(endpoint) == 0, 1.0)
        assert time.monotonic() - left < 1.0
        until("its tokens are counted", lambda: CHAT in usage(endpoint, key["id"]), 10, 0.1)
        row = usage(endpoint, key["id"])[CHAT]
        assert row["requests"] == 1 and row["prompt_tokens"] > 0
        assert 4 < row["completion_tokens"] < 3800
        assert row["cost_usd"] > 0


def test_leaving_while_waiting_for_a_slot_takes_none(endpoint: Endpoint) -> None:
    """160 clients of 128 slots leave at once: no slot is lost. How fast one slot is freed is the test above; 160 take a while."""
    until("the engine is idle", lambda: _busy(endpoint) == 0, 30)
    data = json.dumps({"model": CHAT, "messages": SAY, "stream": True, **LONG}).encode()
    headers = [("Host", "x"), ("Authorization", f"Bearer {endpoint.api_key}"), ("Content-Length", str(len(data)))]
    clients = [connect(endpoint.root) for _ in range(160)]
    try:
        for client in clients:
            client.sendall(head("POST", "/v1/chat/completions", headers) + data)
        until("many run", lambda: engine_metric(endpoint, RUNNING) >= 100, 60, pause_s=0.5)
    finally:
        for client in clients:
            client.close()
    until("the engine is idle", lambda: _busy(endpoint) == 0, 20.0, pause_s=0.5)


def _busy(endpoint: Endpoint) -> float:
    return engine_metric(endpoint, RUNNING) + engine_metric(endpoint, WAITING)
