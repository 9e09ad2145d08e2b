"""The store's actor on a real Ray: killed in the middle of its writes, it comes back and nothing acknowledged is lost."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import store_actor
from cluster.database import default_url
from cluster.errors import StoreError
from cluster.ledger import LeaseGrant, LeaseRequest
from cluster.records import KeySpec, SyncAnswer, UsageRow, hash_secret, new_secret


@pytest.fixture(scope="module")
def actor() -> Iterator[Any]:
    # A short path: Ray puts its sockets below it, and a socket's path has room for 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="tp-store-", dir="/tmp"))
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=80 << 20,
        include_dashboard=False,
        _temp_dir=str(folder / "ray"),
        log_to_driver=False,
    )
    try:
        yield store_actor.connect(default_url(folder / "run"))
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_connect_finds_the_one_store(actor: Any) -> None:
    again = store_actor.connect("sqlite:////nowhere/else.sqlite3")
    assert ray.get(again.open.remote()) == ray.get(actor.open.remote())
    assert ray.get(store_actor.attach().open.remote()) == ray.get(actor.open.remote())
    assert ray.get(store_actor.attach().internal_secret.remote()) == ray.get(actor.internal_secret.remote())


def test_a_refusal_arrives_as_a_store_error(actor: Any) -> None:
    with pytest.raises(StoreError) as caught:
        ray.get(actor.revoke_key.remote("key_nothere"))
    assert str(caught.value.cause).startswith("key 'key_nothere' does not exist")  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="absolute"):
        store_actor.connect("sqlite:///relative.sqlite3")


def test_kill_9_mid_write_loses_nothing_and_counts_nothing_twice(actor: Any) -> None:
    record, _ = ray.get(actor.create_key.remote(KeySpec(name="writer", rpm=1_000_000_000), new_secret()))
    stop = threading.Event()
    kept: list[int] = []
    made: list[tuple[str, str]] = []
    taken: list[int] = []

    def write() -> None:
        number = 0
        while not stop.is_set():
            row = UsageRow(key_id=record.id, model="m", window_start=60 * number, requests=1, cost_usd=1.0)
            lease = LeaseRequest(key_id=record.id, kind="requests", want=7)
            answer = ray.get(actor.sync.remote("g1", 0, f"batch-{number}", [row], [lease]))
            kept.append(number)
            taken.extend(grant.granted for grant in answer.grants)
            secret = new_secret()
            key, _ = ray.get(actor.create_key.remote(KeySpec(name=f"k{number}"), secret))
            made.append((key.id, secret))
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    pids = []
    try:
        for round_number in range(3):
            _wait_for_growth(kept, 20)
            pids.append(ray.get(actor.open.remote()))
            os.kill(pids[-1], signal.SIGKILL)
            _wait_for_growth(kept, 3)
            assert ray.get(actor.open.remote()) not in pids, f"round {round_number}: the killed process answers"
    finally:
        stop.set()
        writer.join(timeout=60)
    assert not writer.is_alive()
    (total,) = ray.get(actor.usage.remote(key_id=record.id))
    assert total.requests == len(kept) and kept == list(range(len(kept)))
    assert ray.get(actor.spent_usd.remote()) == {record.id: float(len(kept))}
    assert set(taken) == {7}
    keys = {key.id: key for key in ray.get(actor.list_keys.remote())}
    assert all(keys[key_id].hash == hash_secret(secret) for key_id, secret in made)
    assert len(keys) == len(made) + 1, "a repeated create_key made a second key"


def test_a_call_that_died_after_its_commit_is_not_applied_again(actor: Any, tmp_path: Path) -> None:
    class DiesUnanswered(store_actor.StoreActor):
        """Each kind of call is committed and then, the first time, the process dies before it answers."""

        def lease(self, requests: Sequence[LeaseRequest], now: float | None = None) -> list[LeaseGrant]:
            answer = super().lease(requests, now)
            self._die_once("lease")
            return answer

        def sync(self, *args: Any, **kwargs: Any) -> SyncAnswer:
            answer = super().sync(*args, **kwargs)
            self._die_once("sync")
            return answer

        def _die_once(self, name: str) -> None:
            mark = tmp_path / name
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    options = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 0}
    dying = ray.remote(DiesUnanswered).options(**options).remote(default_url(tmp_path))
    record, _ = ray.get(dying.create_key.remote(KeySpec(name="leased", rpm=1000), new_secret()))
    now = time.time()  # one instant, so that nothing is refilled
    take = LeaseRequest(key_id=record.id, kind="requests", want=10)
    (grant,) = ray.get(dying.lease.remote([take], now))
    assert (tmp_path / "lease").exists() and (grant.granted, grant.remaining) == (10, 990)
    (grant,) = ray.get(dying.lease.remote([take], now))
    assert grant.remaining == 980, "the next call is a new one"
    charge = LeaseRequest(key_id=record.id, kind="requests", charge=600)
    row = UsageRow(key_id=record.id, model="m", window_start=0, requests=1, cost_usd=1.0)
    answer = ray.get(dying.sync.remote("g1", 0, "batch", [row], [charge]))
    assert (tmp_path / "sync").exists() and answer.spent_usd == {record.id: 1.0}
    assert 380 <= answer.grants[0].remaining < 1000, "990 - 10 - 600 and what was refilled; charged twice it would be 0"
    ray.kill(dying)


def _wait_for_growth(kept: list[int], more: int) -> None:
    """Until `more` further calls were answered."""
    enough, deadline = len(kept) + more, time.monotonic() + 60
    while len(kept) < enough:
        assert time.monotonic() < deadline, "waited 60 s for answers"
        time.sleep(0.01)
