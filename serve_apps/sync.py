"""Keeps a gateway and the store in step: keys and spending come in, usage and leases go out, once a second.

One `sync` call carries all of it. When the store is away (it restarts by itself) the gateway goes on with the keys and leases
it has, and what it could not deliver waits. `ActorStore` reaches the cluster's store actor, `LocalStore` a Store in this process
for a gateway that runs alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from typing import Any, Protocol

from cluster.errors import ApiError, StoreError
from cluster.ledger import LeaseGrant, LeaseRequest
from cluster.records import KeyRecord, StoreUnavailable, SyncAnswer, UsageRow
from cluster.store import Store
from serve_apps.auth import KeyRing
from serve_apps.quota import Quotas
from serve_apps.usage import UsageBook

log = logging.getLogger(__name__)
CALL_TIMEOUT_S = 10.0
UNKNOWN_KEY_PAUSE_S = 0.2
# A spent budget does not come back by itself: look again when somebody may have raised it.
BUDGET_RETRY_S = 3600.0


class StoreClient(Protocol):
    """Calls a method of `cluster.store.Store`, wherever it lives."""

    async def call(self, method: str, *args: Any) -> Any:
        """Raises StoreUnavailable when the store cannot be reached, StoreError when it refuses."""
        ...


class ActorStore:
    """The cluster's store, a detached Ray actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def call(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return await asyncio.wait_for(getattr(self._actor, method).remote(*args), CALL_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, StoreError):
                raise error.cause from error
            raise
        except (RayError, TimeoutError) as error:
            raise StoreUnavailable(f"the store does not answer: {type(error).__name__}") from error


class LocalStore:
    """A Store in this process."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def call(self, method: str, *args: Any) -> Any:
        return await asyncio.to_thread(getattr(self._store, method), *args)


class Syncer:
    """Owns the gateway's keys, quotas and usage, and the task that keeps them in step with the store."""

    def __init__(self, store: StoreClient, period_s: float) -> None:
        self.gateway_id = uuid.uuid4().hex
        self.keys = KeyRing()
        self.usage = UsageBook()
        self.quotas = Quotas(self.gateway_id, self._lease, time.monotonic)
        self._store = store
        self._period_s = period_s
        self._revision = -1
        self._spent: dict[str, float] = {}
        self._synced = 0.0
        self._lock = asyncio.Lock()
        self._next: asyncio.Task[bool] | None = None
        # What one sync carries stays together until it is acknowledged: the store knows a repeat by the batch's id.
        self._pending: tuple[str, list[UsageRow], list[LeaseRequest]] | None = None

    @property
    def age_s(self) -> float:
        """Seconds since the store last answered; many when it never did."""
        return time.monotonic() - self._synced

    async def run(self) -> None:
        """Sync until cancelled."""
        while True:
            try:
                await self.sync()
            except StoreUnavailable as error:
                log.warning("%s; going on with what is known", error)
            await asyncio.sleep(self._period_s)

    async def sync(self) -> None:
        """One exchange with the store. Raises StoreUnavailable."""
        async with self._lock:
            self._next = None  # who asks from here on needs a later one
            if self._pending is not None:
                await self._exchange(*self._pending)
            self._pending = (uuid.uuid4().hex, self.usage.take(), self.quotas.due())
            await self._exchange(*self._pending)

    async def _exchange(self, batch: str, rows: list[UsageRow], requests: list[LeaseRequest]) -> None:
        # If it fails, usage and leases are sent again. How many slots are held is a state and not a change: an old one must
        # not be told again later.
        self._pending = (batch, rows, [request for request in requests if request.kind != "parallel"])
        answer: SyncAnswer = await self._store.call("sync", self.gateway_id, self._revision, batch, rows, requests)
        self._pending = None
        self.usage.delivered()
        slots = any(request.kind == "parallel" for request in requests)
        self.quotas.take([grant for grant in answer.grants if slots or grant.kind != "parallel"])
        if answer.keys is not None:
            self.keys.replace(answer.keys)
        self._revision = answer.revision
        self._spent = answer.spent_usd
        self._synced = time.monotonic()

    async def find_key(self, secret: str) -> KeyRecord:
        """The live key with this secret; a key made a moment ago is found too. Raises ApiError 401."""
        if not self.keys.knows(secret):
            # One question for all who wait, and few in a second: clients that guess keys cost the store nothing.
            if self._next is None:
                self._next = asyncio.get_running_loop().create_task(self._sync_soon())
            if not await asyncio.shield(self._next) and self._revision < 0:
                text = "The key store is starting. Retry after 1 s."
                raise ApiError(503, text, "store_unavailable", retry_after=1)
        return self.keys.find(secret, time.time())

    async def _sync_soon(self) -> bool:
        """A sync, a pause after the last one. Whether the store answered."""
        await asyncio.sleep(self._synced + UNKNOWN_KEY_PAUSE_S - time.monotonic())
        try:
            await self.sync()
        except StoreUnavailable:
            return False
        return True

    def check_budget(self, key: KeyRecord) -> None:
        """Raises ApiError 429 `insufficient_quota`, when the key's money is spent."""
        if key.budget_usd is None:
            return
        if self._spent.get(key.id, 0.0) + self.usage.pending_cost(key.id) >= key.budget_usd:
            text = f"The budget of this API key, {key.budget_usd:g} US dollars, is spent. Ask an administrator for more."
            raise ApiError(429, text, "insufficient_quota", retry_after=BUDGET_RETRY_S)

    async def store_call(self, method: str, *args: Any) -> Any:
        """A store method for an administrator; errors become HTTP answers."""
        try:
            return await self._store.call(method, *args)
        except StoreUnavailable as error:
            raise ApiError(503, f"{error}. Retry after 2 s.", "store_unavailable", retry_after=2) from error
        except StoreError as error:
            raise ApiError(400, str(error), "invalid_value") from error

    async def _lease(self, requests: list[LeaseRequest]) -> list[LeaseGrant]:
        slots = any(request.kind == "parallel" for request in requests)
        try:
            # A sync on its way says how many slots are held here: asking for more must come after it.
            async with self._lock if slots else contextlib.nullcontext():
                grants: list[LeaseGrant] = await self._store.call("lease", requests, time.time())
        except StoreUnavailable as error:
            text = "The quota ledger does not answer. Retry after 2 s."
            raise ApiError(503, text, "store_unavailable", retry_after=2) from error
        return grants
