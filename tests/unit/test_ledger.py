"""Quotas: the arithmetic alone with its clock passed in, then the ledger in the store under threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.ledger import Bucket, LeaseRequest, Slots, hold, refill, settle
from cluster.records import KeySpec
from cluster.store import Store

NOW = 1_700_000_000.0


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url, lambda: NOW)
    yield opened
    opened.close()


def ask(want: int = 0, *, need: int = 1, refund: int = 0, charge: int = 0) -> LeaseRequest:
    return LeaseRequest(key_id="k", kind="tokens", want=want, need=need, refund=refund, charge=charge)


def test_a_new_bucket_is_full_and_refills_to_the_limit_only() -> None:
    assert refill(None, 60, NOW) == Bucket(60.0, NOW)
    assert refill(Bucket(0.0, NOW), 60, NOW + 10).level == pytest.approx(10)
    assert refill(Bucket(0.0, NOW), 60, NOW + 1e6).level == 60
    assert refill(Bucket(5.0, NOW), 60, NOW - 100) == Bucket(5.0, NOW)


def test_a_grant_says_what_is_left_and_when_there_is_more() -> None:
    bucket, grant = settle(None, ask(45), 60, NOW)
    assert (grant.granted, grant.limit, grant.remaining, grant.retry_after_s) == (45, 60, 15, 0.0)
    assert grant.reset_s == pytest.approx(45)
    bucket, grant = settle(bucket, ask(20, need=20), 60, NOW)
    assert grant.granted == 15 and grant.retry_after_s == pytest.approx(5)
    bucket, grant = settle(bucket, ask(20), 60, NOW + 0.25)
    assert grant.granted == 0 and grant.retry_after_s == pytest.approx(0.75)
    _, grant = settle(bucket, ask(1), 60, NOW + 0.25 + grant.retry_after_s)
    assert grant.granted == 1 and grant.retry_after_s == 0


def test_more_than_the_limit_can_never_be_had() -> None:
    bucket, _ = settle(None, ask(60), 60, NOW)
    _, grant = settle(bucket, ask(500, need=500), 60, NOW)
    assert grant.granted == 0 and grant.retry_after_s == pytest.approx(60)


def test_debt_is_paid_before_anything_is_granted() -> None:
    bucket, grant = settle(None, ask(charge=90), 60, NOW)
    assert bucket.level == -30 and grant.remaining == 0 and grant.reset_s == pytest.approx(90)
    bucket, grant = settle(bucket, ask(1), 60, NOW + 30)
    assert grant.granted == 0 and grant.retry_after_s == pytest.approx(1)
    _, grant = settle(bucket, ask(10), 60, NOW + 35)
    assert grant.granted == 5


def test_a_refund_never_fills_over_the_limit() -> None:
    bucket, _ = settle(None, ask(10), 60, NOW)
    bucket, _ = settle(bucket, ask(refund=4), 60, NOW)
    assert bucket.level == 54
    bucket, _ = settle(bucket, ask(refund=1000), 60, NOW)
    assert bucket.level == 60


def test_any_schedule_stays_within_one_bucket_and_its_refill() -> None:
    chance = random.Random(7)
    for limit in (1, 7, 60, 90_001):
        bucket, now, granted = refill(None, limit, NOW), NOW, 0
        for _ in range(3000):
            now += chance.choice((0.0, 0.001, 0.1, 1.0, -0.5))
            bucket, grant = settle(bucket, ask(chance.randrange(limit + 2)), limit, now)
            granted += grant.granted
            # The clock that went back and came again adds nothing: only its furthest point counts.
            assert granted <= limit * (1 + (bucket.updated_at - NOW) / 60) + 1e-3


def test_wrong_requests_are_refused() -> None:
    for wrong in ({"want": -1}, {"refund": -1}, {"kind": "parallel"}, {"kind": "weather"}):
        with pytest.raises(ValueError):
            LeaseRequest(**({"key_id": "k", "kind": "tokens"} | wrong))


def test_slots_are_shared_and_expire() -> None:
    want = LeaseRequest(key_id="k", kind="parallel", want=3, gateway_id="g2")
    held = [Slots("g1", 2, NOW + 5)]
    slots, grant = hold(held, want, 4, NOW)
    assert (slots.count, grant.granted, grant.remaining) == (2, 2, 0) and grant.retry_after_s == 0
    _, grant = hold(held, want, 2, NOW)
    assert grant.granted == 0 and grant.retry_after_s > 0
    slots, grant = hold(held, want, 4, NOW + 5)
    assert grant.granted == 3 and slots.expires_at == NOW + 15


def test_ledger_never_gives_more_than_the_limit_to_8_threads(store: Store) -> None:
    record, _ = store.create_key(KeySpec(name="a", rpm=100, tpm=5000))
    requests = [
        LeaseRequest(key_id=record.id, kind="requests", want=3),
        LeaseRequest(key_id=record.id, kind="tokens", want=170),
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: store.lease(requests, NOW), range(64)))
    assert sum(answer[0].granted for answer in answers) == 100
    assert sum(answer[1].granted for answer in answers) == 5000
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: store.lease(requests, NOW + 6), range(16)))
    assert sum(answer[0].granted for answer in answers) == 10
    assert sum(answer[1].granted for answer in answers) == 500


def test_ledger_slots_never_above_the_limit_under_8_threads(store: Store) -> None:
    record, _ = store.create_key(KeySpec(name="a", max_parallel=5))

    def hold_slots(number: int) -> int:
        want = LeaseRequest(key_id=record.id, kind="parallel", want=2, gateway_id=f"g{number}")
        return store.lease([want], NOW)[0].granted

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(hold_slots, range(8))) == 5
    # A dead gateway's slots come back when they expire, and one that gives its slots up frees them at once.
    late = LeaseRequest(key_id=record.id, kind="parallel", want=4, gateway_id="late")
    assert store.lease([late], NOW + 9.9)[0].granted == 0
    assert store.lease([late], NOW + 10)[0].granted == 4
    rest = LeaseRequest(key_id=record.id, kind="parallel", want=5, gateway_id="rest")
    assert store.lease([rest], NOW + 11)[0].granted == 1
    none = LeaseRequest(key_id=record.id, kind="parallel", want=0, gateway_id="late")
    assert [grant.granted for grant in store.lease([none, rest], NOW + 11)] == [0, 5]


def test_ledger_outlives_its_process(store: Store, store_url: str) -> None:
    record, _ = store.create_key(KeySpec(name="a", rpm=10))
    ask_all = [LeaseRequest(key_id=record.id, kind="requests", want=10)]
    assert store.lease(ask_all, NOW)[0].granted == 10
    again = Store(store_url)
    assert again.lease(ask_all, NOW)[0].granted == 0
    assert again.lease(ask_all, NOW + 30)[0].granted == 5
    again.close()


def test_a_repeated_call_takes_once_and_hears_the_same(store: Store) -> None:
    record, _ = store.create_key(KeySpec(name="a", rpm=10))
    take = [LeaseRequest(key_id=record.id, kind="requests", want=6)]
    first = store.lease(take, NOW, "call-1")
    assert store.lease(take, NOW + 1, "call-1") == first and first[0].granted == 6
    give = [LeaseRequest(key_id=record.id, kind="requests", refund=2)]
    store.lease(give, NOW, "call-2")
    store.lease(give, NOW, "call-2")
    assert store.lease(take, NOW, "call-3")[0].granted == 6
    assert store.lease(take, NOW, "call-4")[0].granted == 0


def test_keys_without_limits_and_keys_that_are_gone(store: Store) -> None:
    free, _ = store.create_key(KeySpec(name="free"))
    gone, _ = store.create_key(KeySpec(name="gone", rpm=5))
    old, _ = store.create_key(KeySpec(name="old", rpm=5, expires_at=NOW - 1))
    store.revoke_key(gone.id)
    ids = (free.id, gone.id, old.id, "key_unknown")
    grants = store.lease([LeaseRequest(key_id=key_id, kind="requests", want=7) for key_id in ids], NOW)
    assert [(grant.granted, grant.limit) for grant in grants] == [(7, None), (0, 0), (0, 0), (0, 0)]
