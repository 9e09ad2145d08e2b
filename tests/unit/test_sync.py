"""What a gateway keeps in step with the store: usage that outlives a lost answer, keys, quotas while the store is away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.database import default_url
from cluster.errors import ApiError
from cluster.records import KeySpec, StoreUnavailable
from cluster.store import Store
from serve_apps.quota import Reservation
from serve_apps.sync import LocalStore, Syncer
from serve_apps.usage import Tokens


class Flaky(LocalStore):
    """A store that can be away, or lose its answer after it did what was asked."""

    away = lost = False

    async def call(self, method: str, *args: Any) -> Any:
        if self.away:
            raise StoreUnavailable("away")
        answer = await super().call(method, *args)
        if self.lost:
            raise StoreUnavailable("lost")
        return answer


def test_usage_survives_an_absent_store_and_a_lost_answer(tmp_path):
    async def test() -> None:
        store = Store(default_url(tmp_path))
        key, secret = store.create_key(KeySpec(name="k", budget_usd=1.0))
        line = Flaky(store)
        syncer = Syncer(line, 0.5)
        await syncer.sync()
        assert (await syncer.find_key(secret)).id == key.id
        for fault in ("away", "lost"):
            setattr(line, fault, True)
            syncer.usage.add(key.id, "m", 0.0, Tokens(10, 5, 2), 0.2, 1.0, 0.1, False)
            with pytest.raises(StoreUnavailable):
                await syncer.sync()
            syncer.usage.add(key.id, "m", 0.0, Tokens(10, 5, 2), 0.2, 1.0, 0.1, True)
            setattr(line, fault, False)
            await syncer.sync()
        total = store.usage()[0]
        assert (total.requests, total.errors, total.prompt_tokens, total.completion_tokens) == (4, 2, 40, 20)
        syncer.check_budget(key)
        syncer.usage.add(key.id, "m", 0.0, Tokens(10, 5, 2), 0.3, 1.0, 0.1, False)
        with pytest.raises(ApiError) as refused:
            syncer.check_budget(key)
        assert refused.value.status == 429 and refused.value.code == "insufficient_quota"
        store.close()

    asyncio.run(test())


def test_without_a_ledger_limited_keys_wait_and_others_do_not(tmp_path):
    async def test() -> None:
        store = Store(default_url(tmp_path))
        limited, free = (store.create_key(KeySpec(name="k", rpm=rpm))[0] for rpm in (5, None))
        line = Flaky(store)
        syncer = Syncer(line, 0.5)
        await syncer.sync()
        line.away = True
        with pytest.raises(ApiError) as refused:
            await syncer.quotas.reserve(limited, 1)
        assert refused.value.status == 503 and "retry-after" in refused.value.headers
        assert isinstance(await syncer.quotas.reserve(free, 1), Reservation)
        store.close()

    asyncio.run(test())


def test_a_new_key_works_and_a_revoked_one_stops_within_a_sync(tmp_path):
    async def test() -> None:
        store = Store(default_url(tmp_path))
        syncer = Syncer(LocalStore(store), 0.5)
        key, secret = store.create_key(KeySpec(name="k"))
        assert (await syncer.find_key(secret)).id == key.id
        store.revoke_key(key.id)
        await syncer.sync()
        with pytest.raises(ApiError) as refused:
            await syncer.find_key(secret)
        assert refused.value.status == 401 and "revoked" in refused.value.message
        store.close()

    asyncio.run(test())
