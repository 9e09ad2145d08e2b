"""Keys made and revoked with the command line, and every limit a key can have, across all gateways of a cluster.

Each request comes on a fresh connection, so that many of them meet every gateway.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from client import CHAT, EMBED, Answer, chat, is_error, new_key, request, until
from conftest import Endpoint, cluster_command

ROUND = 12  # fresh connections that surely meet both gateways


def _keys(endpoint: Endpoint, *args: str) -> Any:
    done = cluster_command("keys", *args, "--run-dir", str(endpoint.run_dir), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def _models(endpoint: Endpoint, secret: str) -> list[int]:
    """What a round of cheap requests is answered with."""
    return [request(endpoint.root, "GET", "/v1/models", secret).status for _ in range(ROUND)]


def test_created_listed_revoked(endpoint: Endpoint) -> None:
    made = _keys(endpoint, "create", "alice", "--models", f"{CHAT},{EMBED}", "--rpm", "600", "--priority", "2", "--expires", "1h")
    secret = made["key"]
    assert secret.startswith("tp-") and len(secret) > 40
    assert _models(endpoint, secret) == [200] * ROUND, "a new key works at once on every gateway"

    done = cluster_command("keys", "list", "--run-dir", str(endpoint.run_dir))
    assert done.returncode == 0 and made["id"] in done.stdout and secret not in done.stdout
    listed = {key["id"]: key for key in _keys(endpoint, "list")["data"]}
    assert secret not in json.dumps(listed)
    record = listed[made["id"]]
    assert (record["name"], record["models"], record["rpm"], record["priority"]) == ("alice", [CHAT, EMBED], 600, 2)
    assert 3500 < record["expires_at"] - time.time() <= 3600

    _keys(endpoint, "revoke", made["id"])
    gone = time.monotonic() + 2.0
    until("it is two seconds later", lambda: time.monotonic() > gone, 3.0)
    assert _models(endpoint, secret) == [401] * ROUND, "no gateway takes the key"
    assert made["id"] not in {key["id"] for key in _keys(endpoint, "list")["data"]}
    assert made["id"] in {key["id"] for key in _keys(endpoint, "list", "--all")["data"]}


def test_secrets_are_kept_as_hashes_only(endpoint: Endpoint) -> None:
    with new_key(endpoint, name="hidden") as key:
        with closing(sqlite3.connect(f"file:{endpoint.run_dir}/tidepool.db?mode=ro", uri=True)) as store:
            assert store.execute("select count(*) from keys where id = ?", (key["id"],)).fetchone() == (1,)
        kept = b"".join(file.read_bytes() for file in endpoint.run_dir.glob("tidepool.db*"))
        assert key["id"].encode() in kept
        for secret in (key["key"], endpoint.api_key, endpoint.admin_key):
            assert secret.encode() not in kept


def test_a_key_works_at_once_on_every_gateway(endpoint: Endpoint) -> None:
    for _ in range(5):
        with new_key(endpoint) as key:
            assert _models(endpoint, key["key"]) == [200] * ROUND


def test_expiry(endpoint: Endpoint) -> None:
    with new_key(endpoint, expires_at=time.time() + 3) as key:
        assert _models(endpoint, key["key"]) == [200] * ROUND
        until("the key is over", lambda: time.time() > key["expires_at"], 4)
        assert _models(endpoint, key["key"]) == [401] * ROUND


def test_allowed_models(endpoint: Endpoint) -> None:
    with new_key(endpoint, models=["default"]) as key:
        assert chat(endpoint.root, key["key"], model="default").status == 200
    with new_key(endpoint, models=[EMBED]) as key:
        is_error(chat(endpoint.root, key["key"]), 403, "model_not_allowed")


def test_a_spent_budget(endpoint: Endpoint) -> None:
    with new_key(endpoint, budget_usd=1e-7) as key:
        assert chat(endpoint.root, key["key"], max_tokens=8).status == 200, "the first request is not refused"
        until("every gateway knows", lambda: {chat(endpoint.root, key["key"]).status for _ in range(ROUND)} == {429}, 5, 0.1)
        is_error(chat(endpoint.root, key["key"]), 429, "insufficient_quota")


def test_requests_per_minute(endpoint: Endpoint) -> None:
    """A bucket of 30 that refills at one in two seconds, exact whatever gateway is asked."""
    with new_key(endpoint, rpm=30) as key:
        began = time.monotonic()
        answers = [chat(endpoint.root, key["key"], max_tokens=1) for _ in range(50)]
        refilled = (time.monotonic() - began) / 2
    good, refused = _split(answers)
    assert 30 <= len(good) <= 30 + refilled + 1
    is_error(refused[0], 429, "rate_limit_exceeded")
    _check_limit_headers(refused[0], "requests", 30)
    assert good[0].headers["x-ratelimit-limit-requests"] == "30"
    left = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in good]
    assert max(left) <= 30 and left[0] > left[-1]


def test_tokens_per_minute(endpoint: Endpoint) -> None:
    """What the engine counted is what is charged: an estimate that was too high is given back."""
    with new_key(endpoint, tpm=1200) as key:
        began = time.monotonic()
        answers = [chat(endpoint.root, key["key"], max_tokens=200, ignore_eos=True) for _ in range(16)]
        refilled = 20 * (time.monotonic() - began)
        good, refused = _split(answers)
        used = sum(answer.data["usage"]["total_tokens"] for answer in good)
        assert refused, f"{used} tokens of 1200 were used and nothing was refused"
        assert 1200 - 500 <= used <= 1200 + refilled + 2 * 260
        is_error(refused[0], 429, "rate_limit_exceeded")
        _check_limit_headers(refused[0], "tokens", 1200)


def test_parallel_requests_across_gateways(endpoint: Endpoint) -> None:
    """Never more than three at a time, on all gateways together; a slot that is free again can be had."""
    with new_key(endpoint, max_parallel=3) as key:

        def ask(_: int) -> Answer:
            return chat(endpoint.root, key["key"], max_tokens=400, ignore_eos=True)

        with ThreadPoolExecutor(12) as pool:
            good, refused = _split(list(pool.map(ask, range(12))))
        assert 1 <= len(good) <= 3 and len(good) + len(refused) == 12
        is_error(refused[0], 429, "rate_limit_exceeded")
        assert int(refused[0].headers["retry-after"]) >= 1
        until("a slot is free", lambda: chat(endpoint.root, key["key"], max_tokens=1).status == 200, 5, 0.1)


def _split(answers: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Good ones and refused ones; there is nothing else."""
    good = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    assert len(good) + len(refused) == len(answers), {answer.status for answer in answers}
    return good, refused


def _check_limit_headers(answer: Answer, kind: str, limit: int) -> None:
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers[f"x-ratelimit-limit-{kind}"] == str(limit)
    assert 0 <= int(answer.headers[f"x-ratelimit-remaining-{kind}"]) < limit
    assert re.fullmatch(r"[0-9.]+s", answer.headers[f"x-ratelimit-reset-{kind}"])
