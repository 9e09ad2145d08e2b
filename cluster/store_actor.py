"""The store as one detached Ray actor on the head node: the only process that opens the SQLite file.

It adds to `cluster.store` only what Ray brings: a name, restarts, and the retry of a call whose answer was lost. Ray repeats
such a call when the actor's process dies; each method is safe to repeat (`create_key` when it is given its secret). Calls
run one at a time in one thread. Callers: `launch`, gateways.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.database import checked_url
from cluster.ledger import LeaseGrant, LeaseRequest
from cluster.records import KeyRecord, KeySpec, SyncAnswer, UsageRow, UsageTotal
from cluster.store import Store

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NAME = "tidepool-store"
NAMESPACE = "tidepool"


class StoreActor:
    """`cluster.store.Store` behind Ray calls; the methods mean the same there, and times default to the head's clock.

    A `StoreError` raised here arrives at the caller as an exception that is a `StoreError` too; its `cause` has the bare text.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._opened: Store | None = None

    def _store(self) -> Store:
        # Opened by the first call and not in __init__: Ray gives an actor up for good when its constructor raises, and a
        # database that is away for a moment must not do that to a restart.
        if self._opened is None:
            self._opened = Store(self._url)
        return self._opened

    def open(self) -> int:
        """Open the database if it is not open; returns the process id."""
        self._store()
        return os.getpid()

    def create_key(self, spec: KeySpec, secret: str | None = None) -> tuple[KeyRecord, str]:
        """Pass a `records.new_secret`: a call that Ray repeats then still makes one key."""
        return self._store().create_key(spec, secret)

    def list_keys(self) -> list[KeyRecord]:
        return self._store().list_keys()

    def revoke_key(self, key_id: str) -> KeyRecord:
        return self._store().revoke_key(key_id)

    def find_key(self, secret_hash: str) -> KeyRecord | None:
        return self._store().find_key(secret_hash)

    def keys_since(self, revision: int) -> tuple[int, list[KeyRecord] | None]:
        return self._store().keys_since(revision)

    def ensure_admin_key(self, secret: str | None = None) -> str | None:
        """Pass a `records.new_secret(admin=True)`: else a repeated call may make a key whose secret nobody was told."""
        return self._store().ensure_admin_key(secret)

    def internal_secret(self) -> str:
        return self._store().internal_secret()

    def record_usage(self, batch_id: str, rows: Sequence[UsageRow]) -> None:
        self._store().record_usage(batch_id, rows)

    def usage(
        self, since: float | None = None, until: float | None = None, key_id: str | None = None, model: str | None = None
    ) -> list[UsageTotal]:
        return self._store().usage(since, until, key_id, model)

    def spent_usd(self) -> dict[str, float]:
        return self._store().spent_usd()

    def lease(self, requests: Sequence[LeaseRequest], now: float | None = None) -> list[LeaseGrant]:
        return self._store().lease(requests, time.time() if now is None else now, _call_id())

    def sync(
        self,
        gateway_id: str,
        revision: int,
        batch_id: str,
        rows: Sequence[UsageRow],
        requests: Sequence[LeaseRequest] = (),
        slot_ttl_s: float = 10.0,
    ) -> SyncAnswer:
        return self._store().sync(gateway_id, revision, batch_id, rows, requests, slot_ttl_s=slot_ttl_s)


def connect(url: str) -> ActorHandle:
    """The cluster's store: the actor that runs, or a new one for `url`. Ray must be initialised.

    Args:
        url: See `cluster.store.Store`; not looked at when the actor runs already.

    Raises:
        StoreError: the URL is not usable.
        StoreUnavailable: the database does not answer.
    """
    import ray
    from ray.exceptions import RayTaskError

    checked_url(url)
    actor = (
        ray.remote(StoreActor)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1,
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},
        )
        .remote(url)
    )
    try:
        ray.get(actor.open.remote())
    except RayTaskError as error:
        raise error.cause from None
    return actor


def attach() -> ActorHandle:
    """The store of a cluster that is up, by name only. Raises ValueError where there is none."""
    import ray

    return ray.get_actor(NAME, namespace=NAMESPACE)


def _call_id() -> str:
    """The same when Ray repeats a call whose answer was lost, another for every other call."""
    import ray

    return f"task-{ray.get_runtime_context().get_task_id()}"
