"""The store on SQLite and on PostgreSQL: keys, usage, idempotency, and what a kill -9 leaves."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StoreError
from cluster.ledger import LeaseRequest
from cluster.records import KeySpec, UsageRow, hash_secret, new_secret
from cluster.store import Store, StoreUnavailable, default_url

ROW = UsageRow(
    key_id="key_a",
    model="m",
    window_start=1_700_000_040,
    requests=1,
    errors=0,
    prompt_tokens=10,
    completion_tokens=5,
    cached_tokens=2,
    latency_s=0.5,
    ttft_s=0.25,
    cost_usd=0.125,
)


class Clock:
    """A clock that tests set."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(store_url: str, clock: Clock) -> Iterator[Store]:
    opened = Store(store_url, clock)
    yield opened
    opened.close()


def test_key_is_kept_and_only_its_hash(store: Store, store_url: str) -> None:
    spec = KeySpec(
        name="ann", models=("a", "b:lora"), rpm=60, tpm=10**12, max_parallel=4, priority=-2, expires_at=1.8e9, budget_usd=2.5
    )
    record, secret = store.create_key(spec)
    assert secret.startswith("tp-") and len(secret) == 3 + 43
    assert record.id.startswith("key_") and len(record.id) == 4 + 12
    assert record.prefix == secret[:10] and record.hash == hash_secret(secret)
    again = Store(store_url)
    assert again.list_keys() == [record]
    assert again.find_key(hash_secret(secret)) == record
    assert again.find_key(hash_secret("tp-other")) is None
    assert secret not in str(record.public()) and "hash" not in record.public()
    again.close()
    if store_url.startswith("sqlite"):
        path = Path(store_url.removeprefix("sqlite:///"))
        files = list(path.parent.glob("tidepool.db*"))
        assert not any(secret.encode() in file.read_bytes() for file in files)
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_create_with_the_same_secret_makes_one_key(store: Store) -> None:
    secret = new_secret()
    first, _ = store.create_key(KeySpec(name="a"), secret)
    second, _ = store.create_key(KeySpec(name="a"), secret)
    assert first == second and len(store.list_keys()) == 1


def test_revision_follows_every_change(store: Store, clock: Clock) -> None:
    revision, keys = store.keys_since(0)
    assert keys == []
    assert store.keys_since(revision) == (revision, None)
    record, _ = store.create_key(KeySpec(name="a"))
    created, keys = store.keys_since(revision)
    assert created > revision and keys == [record]
    clock.now += 5
    revoked = store.revoke_key(record.id)
    assert revoked.revoked_at == clock.now and not revoked.live(clock.now)
    after, keys = store.keys_since(created)
    assert after > created and keys == [revoked]
    assert store.revoke_key(record.id) == revoked
    assert store.keys_since(after) == (after, None)


@pytest.mark.parametrize("key_id", ["key_nothere", "", "a\x00b", "' OR 1=1"])
def test_revoking_an_unknown_key_is_refused(store: Store, key_id: str) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        store.revoke_key(key_id)


def test_first_admin_key_is_made_once(store: Store, clock: Clock) -> None:
    mine = new_secret(admin=True)
    assert store.ensure_admin_key(mine) == mine
    assert store.ensure_admin_key(mine) == mine, "a repeated call must get its answer"
    assert store.ensure_admin_key() is None
    store.revoke_key(store.list_keys()[0].id)
    fresh = store.ensure_admin_key()
    assert fresh is not None and fresh.startswith("tp-admin-")
    found = store.find_key(hash_secret(fresh))
    assert found is not None and found.admin


def test_openers_and_admin_makers_at_once_agree(store_url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: Store(store_url), range(8)))
        made = list(pool.map(lambda opened: opened.ensure_admin_key(), stores))
    assert sum(secret is not None for secret in made) == 1
    assert len({opened.internal_secret() for opened in stores}) == 1
    assert len(stores[0].internal_secret()) == 43
    for opened in stores:
        opened.close()


def test_usage_is_added_up_once_per_batch(store: Store) -> None:
    record, _ = store.create_key(KeySpec(name="ann"))
    row = replace(ROW, key_id=record.id)
    other = replace(row, model="n", cost_usd=1.0)
    store.record_usage("b1", [row, row, other])
    store.record_usage("b1", [row, row, other])
    store.record_usage("b2", [replace(row, window_start=row.window_start + 59, errors=1)])
    store.record_usage("b3", [])
    first, second = store.usage()
    assert (first.model, first.cost_usd, first.name) == ("n", 1.0, "ann")
    assert (second.requests, second.errors, second.prompt_tokens, second.completion_tokens) == (3, 1, 30, 15)
    assert (second.cached_tokens, second.latency_s, second.ttft_s, second.cost_usd) == (6, 1.5, 0.75, 0.375)
    assert store.spent_usd() == {record.id: 1.375}


def test_usage_by_time_key_and_model(store: Store) -> None:
    minute = ROW.window_start // 60 * 60
    rows = [replace(ROW, window_start=minute + 60 * i, key_id=f"key_{i % 2}", model=f"m{i % 3}") for i in range(6)]
    store.record_usage("b", rows)

    def count(**asked: Any) -> int:
        return sum(total.requests for total in store.usage(**asked))

    assert count() == 6
    assert count(since=minute + 120) == 4
    assert count(since=minute + 150) == 4, "a minute that was half over still counts"
    assert count(until=minute + 120) == 2
    assert count(since=minute + 60, until=minute + 120) == 1
    assert count(key_id="key_0") == 3 and count(model="m2") == 2 and count(key_id="key_0", model="m2") == 1
    assert count(key_id="nobody") == 0 and count(model="a\x00b") == 0
    assert {total.name for total in store.usage()} == {""}


def test_large_batches(store: Store) -> None:
    rows = [replace(ROW, key_id=f"key_{i}") for i in range(1200)]
    store.record_usage("b1", rows)
    store.record_usage("b2", rows[::-1])
    assert sum(total.requests for total in store.usage()) == 2400


def test_batch_ids_are_forgotten_after_a_day(store: Store, clock: Clock) -> None:
    store.record_usage("b", [ROW])
    clock.now += 86_000
    store.record_usage("b", [ROW])
    assert store.usage()[0].requests == 1
    clock.now += 500
    store.record_usage("other", [ROW])
    store.record_usage("b", [ROW])
    assert store.usage()[0].requests == 3


def test_sync_says_what_changed(store: Store, clock: Clock) -> None:
    record, _ = store.create_key(KeySpec(name="a", rpm=10, max_parallel=3))
    asks = [
        LeaseRequest(key_id=record.id, kind="requests", want=4),
        LeaseRequest(key_id=record.id, kind="parallel", want=2, gateway_id="g1"),
    ]
    first = store.sync("g1", 0, "s1", [replace(ROW, key_id=record.id)], asks)
    assert first.keys == [record] and first.spent_usd == {record.id: 0.125}
    assert [grant.granted for grant in first.grants] == [4, 2] and first.slots == {record.id: 2}
    again = store.sync("g1", first.revision, "s1", [replace(ROW, key_id=record.id)], asks)
    assert again.grants == first.grants and again.keys is None and again.spent_usd == first.spent_usd
    other = store.sync("g1", first.revision, "s1b", [], asks[:1])
    assert other.grants[0].remaining == 2, "another batch is another lease"
    clock.now += 9
    assert store.sync("g1", first.revision, "s2", []).slots == {record.id: 2}
    clock.now += 9
    assert store.sync("g1", first.revision, "s3", []).slots == {record.id: 2}, "each sync renews"
    clock.now += 11
    assert store.sync("g1", first.revision, "s4", []).slots == {}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "name: is missing"),
        ({"name": " "}, "name:"),
        ({"name": 5}, "name:"),
        ({"name": "a\x00"}, "name:"),
        ({"name": "a", "rpm": 0}, "rpm:"),
        ({"name": "a", "rpm": True}, "rpm:"),
        ({"name": "a", "tpm": 1.5}, "tpm:"),
        ({"name": "a", "max_parallel": -1}, "max_parallel:"),
        ({"name": "a", "priority": "high"}, "priority:"),
        ({"name": "a", "priority": 10**9}, "priority:"),
        ({"name": "a", "models": "m"}, "models:"),
        ({"name": "a", "models": [1]}, "models:"),
        ({"name": "a", "expires_at": float("nan")}, "expires_at:"),
        ({"name": "a", "expires_at": "tomorrow"}, "expires_at:"),
        ({"name": "a", "budget_usd": 0}, "budget_usd:"),
        ({"name": "a", "budget_usd": 10**400}, "budget_usd:"),
        ({"name": "a", "admin": 1}, "admin:"),
        ({"name": "a", "id": "key_mine"}, "id: unknown field"),
    ],
)
def test_wrong_values_are_named(data: dict[str, Any], said: str) -> None:
    with pytest.raises(StoreError) as caught:
        KeySpec.parse(data)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "sqlite:///relative.db", "mysql://a/b", "sqlite:////dev/null/x.db"])
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match=r"^store\.url: "):
        Store(url)


def test_a_database_that_is_away_hides_the_password() -> None:
    with pytest.raises(StoreUnavailable, match="does not answer") as caught:
        Store("postgresql://tidepool:sesame@127.0.0.1:1/none")
    assert "sesame" not in str(caught.value)


def test_default_url_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Store(default_url("run")).close()
    assert (tmp_path / "run" / "tidepool.db").exists()


WRITER = """
import sys
from cluster.ledger import LeaseRequest
from cluster.records import KeySpec, UsageRow
from cluster.store import Store
url, start = sys.argv[1], int(sys.argv[2])
store = Store(url)
for i in range(start, 10**9):
    print("sent", i, flush=True)
    record, _ = store.create_key(KeySpec(name=f"k{i}"))
    rows = [UsageRow(key_id=key, model="m", window_start=60 * i, requests=1, cost_usd=1.0) for key in ("x", "y", record.id)]
    store.record_usage(f"batch-{i}", rows)
    print("kept", i, record.id, flush=True)
"""


def test_kill_9_loses_no_acknowledged_row_and_counts_none_twice(store_url: str) -> None:
    Store(store_url).close()
    sent = -1
    acknowledged: dict[int, str] = {}
    for kill in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, store_url, str(sent + 1)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for lines, line in enumerate(writer.stdout, start=1):
            word, number, *rest = line.split()
            if word == "sent":
                sent = int(number)
            else:
                acknowledged[int(number)] = rest[0]
            # An odd line is "sent": killed inside the write that follows it. What was printed before the kill is still read.
            if lines == 21 + 8 * kill:
                writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
    store = Store(store_url)
    assert len(acknowledged) >= 30
    kept = {record.id: record.name for record in store.list_keys()}
    assert all(kept[key_id] == f"k{number}" for number, key_id in acknowledged.items())
    for batch in range(sent + 1):  # every batch is sent again, as a caller does that was not answered
        rows = [UsageRow(key_id=key, model="m", window_start=60 * batch, requests=1, cost_usd=1.0) for key in ("x", "y")]
        if batch in acknowledged:
            rows.append(UsageRow(key_id=acknowledged[batch], model="m", window_start=60 * batch, requests=1, cost_usd=1.0))
        store.record_usage(f"batch-{batch}", rows)
    totals = {total.key_id: total for total in store.usage()}
    assert totals["x"].requests == totals["y"].requests == sent + 1
    assert all(totals[key_id].requests == 1 for key_id in acknowledged.values())
    spent = store.spent_usd()
    assert all(spent[key_id] == 1.0 for key_id in acknowledged.values())
    store.close()
