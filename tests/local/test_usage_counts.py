"""Usage is the engine's own count: `/admin/usage` equals the sum of the answers' `usage`, and the money follows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import yaml
from client import CHAT, EMBED, new_key, request, until, usage
from conftest import CONFIG, Endpoint, cluster_command

SAY: list[Any] = [{"role": "user", "content": "Where is my parcel? " * 40}]


@pytest.fixture
def key(endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    with new_key(endpoint) as made:
        yield made


def _post(endpoint: Endpoint, key: dict[str, Any], path: str, body: dict[str, Any]) -> Any:
    answer = request(endpoint.root, "POST", path, key["key"], body, timeout_s=240)
    assert answer.status == 200, answer
    assert b"tidepool-usage" not in answer.body and "x-tidepool-usage" not in answer.headers
    if not body.get("stream"):
        return answer.data
    events = [line.removeprefix(b"data: ") for line in answer.body.split(b"\n") if line.startswith(b"data: ")]
    assert not [line for line in answer.body.split(b"\n") if line.startswith(b":")], "a comment that is not ours to send"
    return [json.loads(event) for event in events if event != b"[DONE]"]


def _row(endpoint: Endpoint, key: dict[str, Any], model: str, requests: int) -> dict[str, Any]:
    """The key's row once all its requests are in it."""
    until("all is counted", lambda: usage(endpoint, key["id"]).get(model, {"requests": 0})["requests"] >= requests, 10, 0.1)
    row = usage(endpoint, key["id"])[model]
    assert (row["requests"], row["errors"]) == (requests, 0)
    return row


def _cost(model: str, row: dict[str, Any]) -> float:
    price = next(entry["price"] for entry in yaml.safe_load(CONFIG.read_text())["models"] if entry["id"] == model)
    fresh = row["prompt_tokens"] - row["cached_tokens"]
    paid = fresh * price["prompt"] + row["cached_tokens"] * price.get("cached", price["prompt"])
    return float(paid + row["completion_tokens"] * price.get("completion", 0.0)) / 1e6


def test_sums_are_the_engines_own(endpoint: Endpoint, key: dict[str, Any]) -> None:
    chat, text = "/v1/chat/completions", "/v1/completions"
    prompt = completion = cached = 0

    def add(used: dict[str, Any]) -> None:
        nonlocal prompt, completion, cached
        prompt += used.get("prompt_tokens", used.get("input_tokens", 0)) + used.get("cache_read_input_tokens", 0)
        completion += used.get("completion_tokens", used.get("output_tokens", 0))
        details = used.get("prompt_tokens_details") or used.get("input_tokens_details") or {}
        cached += (details.get("cached_tokens") or 0) + used.get("cache_read_input_tokens", 0)

    base = {"model": CHAT, "messages": SAY, "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    first = _post(endpoint, key, chat, base)
    add(first["usage"])
    again = _post(endpoint, key, chat, base)
    add(again["usage"])
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "the second time the prefix cache has it"
    # A stream without usage says nothing; it is the same request, so it used the same.
    chunks = _post(endpoint, key, chat, {**base, "stream": True})
    assert all(chunk.get("usage") is None for chunk in chunks)
    add(again["usage"])
    chunks = _post(endpoint, key, chat, {**base, "stream": True, "stream_options": {"include_usage": True}})
    add(chunks[-1]["usage"])
    add(_post(endpoint, key, text, {"model": CHAT, "prompt": "Once", "n": 2, "max_tokens": 7, "ignore_eos": True})["usage"])
    add(_post(endpoint, key, text, {"model": "default", "prompt": ["One", "Two, three"], "max_tokens": 5})["usage"])
    said = {"model": CHAT, "input": "Hello", "max_output_tokens": 6}
    add(_post(endpoint, key, "/v1/responses", said)["usage"])
    add(_post(endpoint, key, "/v1/responses", {**said, "stream": True})[-1]["response"]["usage"])
    add(_post(endpoint, key, "/v1/messages", {"model": CHAT, "messages": SAY, "max_tokens": 8})["usage"])

    row = _row(endpoint, key, CHAT, 9)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt, completion)
    assert row["cached_tokens"] == cached
    assert row["cost_usd"] == pytest.approx(_cost(CHAT, row), abs=1e-12)
    assert row["name"] == "test" and row["latency_s"] > 0 and row["ttft_s"] > 0


def test_embeddings_and_the_command(endpoint: Endpoint, key: dict[str, Any]) -> None:
    answer = _post(endpoint, key, "/v1/embeddings", {"model": EMBED, "input": ["a parcel", "a refund, please"]})
    row = _row(endpoint, key, EMBED, 1)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (answer["usage"]["prompt_tokens"], 0)
    assert row["cost_usd"] == pytest.approx(_cost(EMBED, row), abs=1e-12) and row["cost_usd"] > 0

    done = cluster_command("usage", "--json", "--key", key["id"], "--run-dir", str(endpoint.run_dir))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["data"] == [row] and told["total_usd"] == pytest.approx(row["cost_usd"], abs=1e-9)
    done = cluster_command("usage", "--since", "1h", "--model", EMBED, "--key", key["id"], "--run-dir", str(endpoint.run_dir))
    assert done.returncode == 0 and key["id"] in done.stdout and f"total: {row['cost_usd']:.6f}" in done.stdout

    with closing(sqlite3.connect(f"file:{endpoint.run_dir}/tidepool.db?mode=ro", uri=True)) as store:
        kept = store.execute("select sum(requests), sum(prompt_tokens) from usage where key_id = ?", (key["id"],)).fetchone()
    assert kept == (1, row["prompt_tokens"])


def test_refused_requests_cost_nothing(endpoint: Endpoint, key: dict[str, Any]) -> None:
    for _ in range(3):
        answer = request(endpoint.root, "POST", "/v1/completions", key["key"], {"model": CHAT, "prompt": "x", "max_tokens": -1})
        assert answer.status == 400
    headers = [("x-tidepool-usage", "900 900 900")]
    body = {"model": CHAT, "prompt": "x", "max_tokens": 2, "ignore_eos": True}
    used = request(endpoint.root, "POST", "/v1/completions", key["key"], body, headers).data["usage"]
    until("all is counted", lambda: usage(endpoint, key["id"]).get(CHAT, {"requests": 0})["requests"] >= 4, 10, 0.1)
    row = usage(endpoint, key["id"])[CHAT]
    assert (row["prompt_tokens"], row["completion_tokens"]) == (used["prompt_tokens"], 2)
