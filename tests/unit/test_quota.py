"""Quotas held by gateways over one real ledger (SQLite), with the clock passed in."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.database import default_url
from cluster.errors import ApiError
from cluster.ledger import LeaseGrant, LeaseRequest
from cluster.records import KeyRecord, KeySpec
from cluster.store import Store
from serve_apps.quota import IDLE_S, Quotas, Reservation
from serve_apps.sync import LocalStore, Syncer


class World:
    """One store, one clock, and gateways that are kept in step when told."""

    def __init__(self, folder: Path) -> None:
        self.now = 1_000_000.0
        self.store = Store(default_url(folder), clock=lambda: self.now)
        self.leases = 0
        self.gateways: dict[str, Quotas] = {}

    def key(self, **limits: Any) -> KeyRecord:
        return self.store.create_key(KeySpec(name="k", **limits))[0]

    def gateway(self, name: str) -> Quotas:
        async def lease(requests: list[LeaseRequest]) -> list[LeaseGrant]:
            self.leases += 1
            await asyncio.sleep(0)
            return self.store.lease(requests, self.now)

        self.gateways[name] = Quotas(name, lease, lambda: self.now)
        return self.gateways[name]

    def sync(self) -> None:
        for name, quotas in self.gateways.items():
            quotas.take(self.store.sync(name, 0, uuid.uuid4().hex, [], quotas.due()).grants)

    def left(self, key: KeyRecord, kind: str) -> int:
        grant = self.store.lease([LeaseRequest(key_id=key.id, kind=kind)], self.now)[0]  # type: ignore[arg-type]
        assert grant.remaining is not None
        return grant.remaining


@pytest.fixture
def folder():
    """In memory where there is such a place: these tests commit thousands of times and none is about the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as made:
        yield Path(made)


@pytest.fixture
def world(folder):
    made = World(folder)
    yield made
    made.store.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def tried(quotas: Quotas, key: KeyRecord, tokens: int = 1) -> Reservation | ApiError:
    try:
        return await quotas.reserve(key, tokens)
    except ApiError as error:
        return error


def test_a_key_without_limits_never_asks_the_ledger(world):
    async def test() -> None:
        quotas, key = world.gateway("a"), world.key()
        for _ in range(100):
            (await quotas.reserve(key, 10**6)).settle(5)
        assert world.leases == 0 and quotas.headers(key) == {} and quotas.due() == []

    run(test)


@pytest.mark.parametrize("rpm", [1, 7, 60, 600])
def test_requests_per_minute_are_exact_over_two_gateways(world, rpm):
    async def test() -> None:
        gateways, key = [world.gateway("a"), world.gateway("b")], world.key(rpm=rpm)
        passed = 0
        for number in range(2 * rpm + 10):
            got = await tried(gateways[number % 2], key)
            if isinstance(got, Reservation):
                got.settle(0)
                passed += 1
        lease = max(1, rpm // 50)
        assert rpm - lease < passed <= rpm
        world.now += 30
        more = 0
        for number in range(rpm + 10):
            got = await tried(gateways[number % 2], key)
            more += isinstance(got, Reservation)
        assert passed + more <= rpm + rpm / 2 and passed + more >= rpm + rpm // 2 - 2 * lease

    run(test)


def test_the_answer_over_the_limit(world):
    async def test() -> None:
        quotas, key = world.gateway("a"), world.key(rpm=2)
        for _ in range(2):
            (await quotas.reserve(key, 1)).settle(1)
        error = await tried(quotas, key)
        assert isinstance(error, ApiError) and error.status == 429 and error.code == "rate_limit_exceeded"
        assert b'"type": "rate_limit_error"' in error.body() and "2 requests per minute" in error.message
        assert 1 <= int(error.headers["retry-after"]) <= 30
        assert error.headers["x-ratelimit-limit-requests"] == "2" and error.headers["x-ratelimit-remaining-requests"] == "0"
        asked = world.leases
        for _ in range(50):
            assert isinstance(await tried(quotas, key), ApiError)
        assert world.leases == asked, "a client in a loop costs the store nothing"
        world.now += int(error.headers["retry-after"])
        assert isinstance(await tried(quotas, key), Reservation), "Retry-After is enough"

    run(test)


def test_headers_tell_what_is_left(world):
    async def test() -> None:
        quotas, key = world.gateway("a"), world.key(rpm=100, tpm=1000)
        assert quotas.headers(key) == {}
        (await quotas.reserve(key, 100)).settle(100)
        shown = quotas.headers(key)
        assert shown["x-ratelimit-limit-requests"] == "100" and shown["x-ratelimit-remaining-requests"] == "99"
        assert shown["x-ratelimit-limit-tokens"] == "1000" and shown["x-ratelimit-remaining-tokens"] == "900"
        assert shown["x-ratelimit-reset-tokens"].endswith("s")

    run(test)


def test_tokens_are_settled_by_what_was_used(world):
    async def test() -> None:
        quotas, key = world.gateway("a"), world.key(tpm=600)
        reservation = await quotas.reserve(key, 500)
        assert isinstance(await tried(quotas, key, 200), ApiError), "reserved is not there for another"
        reservation.settle(50)
        world.now += 1.1
        (await quotas.reserve(key, 400)).settle(400)
        world.now += IDLE_S + 1
        world.sync()
        assert world.left(key, "tokens") == pytest.approx(600 - 50 - 400 + 41, abs=2)

    run(test)


def test_tokens_used_beyond_the_estimate_become_debt(world):
    async def test() -> None:
        first, second, key = world.gateway("a"), world.gateway("b"), world.key(tpm=600)
        (await first.reserve(key, 100)).settle(1100)
        world.sync()
        error = await tried(second, key, 10)
        assert isinstance(error, ApiError) and "600 tokens per minute" in error.message
        world.now += 45  # 1,100 used of 600: 500 owed, refilled at 10 per second
        assert isinstance(await tried(second, key, 10), ApiError)
        world.now += 10
        assert isinstance(await tried(second, key, 10), Reservation)

    run(test)


def test_a_request_larger_than_the_limit_passes_when_the_bucket_is_full(world):
    async def test() -> None:
        quotas, key = world.gateway("a"), world.key(tpm=100)
        (await quotas.reserve(key, 5000)).settle(5000)
        world.sync()
        assert isinstance(await tried(quotas, key, 1), ApiError)

    run(test)


def test_idle_leases_go_back(world):
    async def test() -> None:
        quotas, key = world.gateway("a"), world.key(rpm=1000, tpm=100_000)
        (await quotas.reserve(key, 10)).settle(10)
        world.sync()
        assert world.left(key, "requests") == 1000 - 1000 // 50, "busy a moment ago: the lease stays"
        world.now += IDLE_S + 0.5
        world.sync()
        assert world.left(key, "requests") == 1000 and world.left(key, "tokens") == 100_000
        world.sync()
        assert quotas.headers(key) == {}, "forgotten"

    run(test)


def test_parallel_slots_move_between_gateways(world):
    async def test() -> None:
        first, second, key = world.gateway("a"), world.gateway("b"), world.key(max_parallel=3)
        held = [await first.reserve(key, 1) for _ in range(3)]
        error = await tried(second, key)
        assert isinstance(error, ApiError) and error.status == 429 and "3 requests at a time" in error.message
        held.pop().settle(1)
        assert isinstance(await tried(second, key), ApiError), "not given back yet"
        world.sync()
        other = await second.reserve(key, 1)
        assert isinstance(await tried(first, key), ApiError)
        for reservation in [*held, other]:
            reservation.settle(1)
        world.sync()
        assert [isinstance(await tried(second, key), Reservation) for _ in range(4)] == [True, True, True, False]

    run(test)


def test_slots_given_back_are_not_used_before_the_ledger_was_asked_again(world):
    async def test() -> None:
        first, second, key = world.gateway("a"), world.gateway("b"), world.key(max_parallel=2)
        for reservation in [await first.reserve(key, 1) for _ in range(2)]:
            reservation.settle(1)
        due = first.due()  # on its way to the store
        grants = world.store.sync("a", 0, "x", [], due).grants
        assert [isinstance(await tried(second, key), Reservation) for _ in range(2)] == [True, True]
        assert isinstance(await tried(first, key), ApiError)
        first.take(grants)
        assert isinstance(await tried(first, key), ApiError)

    run(test)


def test_a_request_that_asks_the_ledger_keeps_what_is_left_here(world):
    async def test() -> None:
        key = world.key(tpm=1000)
        quotas = world.gateway("a")
        (await quotas.reserve(key, 100)).settle(50)
        world.now += IDLE_S + 1
        asking = asyncio.create_task(quotas.reserve(key, 200))
        await asyncio.sleep(0)
        world.sync()
        assert isinstance(await asking, Reservation)

    run(test)


@pytest.mark.parametrize("seed", range(3))
def test_concurrent_requests_never_exceed_any_limit(world, seed):
    async def test() -> None:
        dice = random.Random(seed)
        gateways = [world.gateway(name) for name in "abc"]
        key = world.key(rpm=120, tpm=6000, max_parallel=5)
        running = most = passed = used = 0
        began = world.now

        async def request() -> None:
            nonlocal running, most, passed, used
            got = await tried(dice.choice(gateways), key, 50)
            if isinstance(got, ApiError):
                return
            running += 1
            passed += 1
            most = max(most, running)
            for _ in range(dice.randrange(6)):
                await asyncio.sleep(0)
            tokens = dice.randrange(51)
            used += tokens
            running -= 1
            got.settle(tokens)

        for _ in range(40):
            await asyncio.gather(*(request() for _ in range(12)))
            world.now += 0.5
            world.sync()
        minutes = (world.now - began) / 60
        assert 1 <= most <= 5
        assert passed <= 120 + 120 * minutes and used <= 6000 + 6000 * minutes
        assert passed >= 0.8 * (120 + 120 * minutes), "and what the limits allow is given"

    run(test)


def test_an_account_that_a_request_waits_for_is_not_forgotten():
    """Else the one who waits and the one who comes later count in two accounts, and both get the only slot."""

    async def test() -> None:
        key = KeyRecord(id="k", hash="h", prefix="p", created_at=0.0, name="k", max_parallel=1)
        answer, asked = asyncio.Event(), 0

        async def lease(requests: list[LeaseRequest]) -> list[LeaseGrant]:
            nonlocal asked
            asked += 1
            granted = 0 if asked == 1 else 1
            await answer.wait()
            rest = {"limit": 1, "remaining": 0, "retry_after_s": 0.0, "reset_s": 0.0}
            return [LeaseGrant(key_id="k", kind="parallel", granted=granted, **rest) for _ in requests]

        quotas = Quotas("here", lease, lambda: 1000.0)

        async def refused() -> ApiError:
            with pytest.raises(ApiError) as caught:
                await quotas.reserve(key, 1)
            quotas.due()  # between the end of one request and the turn of the one that waits
            return caught.value

        first, second = asyncio.create_task(refused()), asyncio.create_task(tried(quotas, key))
        await asyncio.sleep(0)
        answer.set()
        assert (await first).status == 429 and isinstance(await second, Reservation)
        assert isinstance(await tried(quotas, key), ApiError)

    run(test)


def test_slots_hold_while_gateways_sync_with_a_real_store(folder):
    """Syncs and leases from two gateways in threads, in whatever order the database takes them."""

    async def test() -> None:
        store = Store(default_url(folder))
        key = store.create_key(KeySpec(name="k", max_parallel=4))[0]
        syncers = [Syncer(LocalStore(store), 0.01) for _ in range(2)]
        running = most = passed = 0

        async def client(syncer: Syncer) -> None:
            nonlocal running, most, passed
            for _ in range(40):
                got = await tried(syncer.quotas, key)
                if isinstance(got, Reservation):
                    running, passed = running + 1, passed + 1
                    most = max(most, running)
                    await asyncio.sleep(0.002)
                    running -= 1
                    got.settle(1)
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(syncer.run()) for syncer in syncers]
        await asyncio.gather(*(client(syncer) for syncer in syncers for _ in range(5)))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        store.close()
        assert most <= 4 and passed > 50

    run(test)
