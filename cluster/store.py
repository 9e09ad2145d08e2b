"""The store: keys, usage and the quota ledger, in SQLite or PostgreSQL.

What a method returned from is committed; a killed process loses nothing that was acknowledged, and the calls that a caller
may have to repeat (`record_usage`, `lease`, `sync`, `create_key` with a secret) are applied once. It decides no policy
(`cluster.ledger` does the arithmetic) and knows nothing of Ray. Callers: `cluster.store_actor` and tests.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from cluster import ledger
from cluster.database import checked_url, default_url, open_engine
from cluster.errors import StoreError
from cluster.ledger import LeaseGrant, LeaseRequest
from cluster.records import (
    KeyRecord,
    KeySpec,
    StoreUnavailable,
    SyncAnswer,
    UsageRow,
    UsageTotal,
    hash_secret,
    new_secret,
)
from cluster.tables import Base, BucketRow, Key, Setting, SlotRow, Usage, UsageBatch

__all__ = ["KeyRecord", "KeySpec", "Store", "StoreUnavailable", "SyncAnswer", "UsageRow", "UsageTotal", "default_url"]

_BATCH_KEPT_S = 86_400.0
_LEASE_KEPT_S = 600.0
_PRUNE_EVERY_S = 60.0
_SUMS = tuple(field.name for field in fields(UsageRow) if field.name not in ("key_id", "model", "window_start"))
_OPEN_LOCK = 7_303_014  # any number: processes that create the tables at the same time wait for each other


class Store:
    """One open store.

    Args:
        url: `sqlite:////absolute/path` or `postgresql://user@host/database`.
        clock: Unix seconds; tests pass their own.

    Raises:
        StoreError: the URL is not usable.
        StoreUnavailable: the database does not answer (every method may raise it).
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._engine = open_engine(checked_url(url))
        self._insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        self._pruned_at = 0.0
        with self._begin() as session:
            if self._engine.dialect.name == "postgresql":
                session.execute(text(f"SELECT pg_advisory_xact_lock({_OPEN_LOCK})"))
            Base.metadata.create_all(session.connection())
            first = [{"name": "revision", "value": "1"}, {"name": "internal_secret", "value": secrets.token_urlsafe(32)}]
            session.execute(self._insert(Setting).values(first).on_conflict_do_nothing())

    def close(self) -> None:
        """Close the connections; the store is not usable afterwards."""
        self._engine.dispose()

    # Keys

    def create_key(self, spec: KeySpec, secret: str | None = None) -> tuple[KeyRecord, str]:
        """Make a key; returns it and its secret, which is not kept and cannot be read again.

        Args:
            secret: From `records.new_secret`. A caller that may have to repeat the call passes the same one again and gets the
                same key; without it a repeat makes another key.
        """
        secret = secret or new_secret(spec.admin)
        with self._begin() as session:
            return self._create(session, spec, secret), secret

    def list_keys(self) -> list[KeyRecord]:
        """Every key, revoked ones too, oldest first."""
        with self._begin() as session:
            return _all_keys(session)

    def revoke_key(self, key_id: str) -> KeyRecord:
        """Revoke a key for good; a second time changes nothing.

        Raises:
            StoreError: there is no such key.
        """
        with self._begin() as session:
            revision = self._revision(session)
            key = session.get(Key, key_id) if key_id.isprintable() else None
            if key is None:
                raise StoreError(f"key {key_id[:60]!r} does not exist; `keys list` shows those that do")
            if key.revoked_at is None:
                key.revoked_at = self._clock()
                revision.value = str(int(revision.value) + 1)
            return _record(key)

    def find_key(self, secret_hash: str) -> KeyRecord | None:
        """The key with this sha256 hex of its secret, revoked and expired ones too."""
        with self._begin() as session:
            key = session.scalar(select(Key).where(Key.hash == secret_hash))
            return None if key is None else _record(key)

    def keys_since(self, revision: int) -> tuple[int, list[KeyRecord] | None]:
        """The revision of the keys, and every key (revoked ones too), or None when `revision` is still the latest."""
        with self._begin() as session:
            return _keys_since(session, revision)

    def ensure_admin_key(self, secret: str | None = None) -> str | None:
        """Make the first admin key if none is live and return its secret, else None.

        Args:
            secret: As in `create_key`: a repeat with the same one returns it again.
        """
        secret = secret or new_secret(admin=True)
        with self._begin() as session:
            self._revision(session)  # its lock lets one caller at a time look and make
            now = self._clock()
            live = [key for key in _all_keys(session) if key.admin and key.live(now)]
            if any(key.hash == hash_secret(secret) for key in live):
                return secret
            if live:
                return None
            self._create(session, KeySpec(name="admin", admin=True), secret)
            return secret

    def internal_secret(self) -> str:
        """The secret between gateways and engines, made when the store was first opened."""
        with self._begin() as session:
            return session.scalars(select(Setting.value).where(Setting.name == "internal_secret")).one()

    # Usage

    def record_usage(self, batch_id: str, rows: Sequence[UsageRow]) -> None:
        """Add rows to the sums per key, model and minute; a batch id that was recorded in the last day adds nothing."""
        if not rows:
            return
        with self._begin() as session:
            if self._first_time(session, batch_id, _BATCH_KEPT_S):
                self._add_usage(session, rows)

    def usage(
        self, since: float | None = None, until: float | None = None, key_id: str | None = None, model: str | None = None
    ) -> list[UsageTotal]:
        """Totals per key and model, largest cost first, over the minutes that touch [since, until) (unix seconds)."""
        sums = [func.sum(getattr(Usage, name)).label(name) for name in _SUMS]
        query = select(Usage.key_id, Key.name, Usage.model, *sums).outerjoin(Key, Key.id == Usage.key_id)
        query = query.group_by(Usage.key_id, Key.name, Usage.model)
        if since is not None:
            query = query.where(Usage.window_start > since - 60)
        if until is not None:
            query = query.where(Usage.window_start < until)
        for column, wanted in ((Usage.key_id, key_id), (Usage.model, model)):
            if wanted is not None:
                if not wanted.isprintable():  # PostgreSQL refuses NUL in text; nothing has such a name
                    return []
                query = query.where(column == wanted)
        with self._begin() as session:
            totals = [
                # PostgreSQL sums integers to Decimal.
                UsageTotal(
                    key_id=row.key_id,
                    name=row.name or "",
                    model=row.model,
                    requests=int(row.requests),
                    errors=int(row.errors),
                    prompt_tokens=int(row.prompt_tokens),
                    completion_tokens=int(row.completion_tokens),
                    cached_tokens=int(row.cached_tokens),
                    latency_s=float(row.latency_s),
                    ttft_s=float(row.ttft_s),
                    cost_usd=float(row.cost_usd),
                )
                for row in session.execute(query)
            ]
        return sorted(totals, key=lambda total: (-total.cost_usd, total.key_id, total.model))

    def spent_usd(self) -> dict[str, float]:
        """Money spent by key id since the key was made; keys that spent nothing are absent."""
        with self._begin() as session:
            return _spent(session)

    # Quotas

    def lease(self, requests: Sequence[LeaseRequest], now: float, call_id: str | None = None) -> list[LeaseGrant]:
        """Ask the quota ledger; one grant per request, in order. Limits come from the keys' records.

        Args:
            call_id: A repeat within ten minutes under the same id is not applied again and gets the first answer.
        """
        with self._begin() as session:
            return self._lease_once(session, requests, now, call_id)

    def sync(
        self,
        gateway_id: str,
        revision: int,
        batch_id: str,
        rows: Sequence[UsageRow],
        requests: Sequence[LeaseRequest] = (),
        *,
        slot_ttl_s: float = 10.0,
    ) -> SyncAnswer:
        """All that a gateway needs each second, in one transaction.

        Records usage, keeps the gateway's unexpired slots for another `slot_ttl_s`, settles lease requests, and answers what
        changed. A repeat with the same `batch_id` adds no usage and no lease again, and hears of the leases what the first heard.
        """
        now = self._clock()
        with self._begin() as session:
            # A sync with nothing to say writes nothing, so it costs no disk flush.
            if rows and self._first_time(session, batch_id, _BATCH_KEPT_S):
                self._add_usage(session, rows)
            grants = self._lease_once(session, requests, now, f"{batch_id}-leases")
            mine = (SlotRow.gateway_id == gateway_id) & (SlotRow.expires_at > now)
            session.execute(update(SlotRow).where(mine).values(expires_at=now + slot_ttl_s))
            slots = {key_id: count for key_id, count in session.execute(select(SlotRow.key_id, SlotRow.count).where(mine))}
            latest, keys = _keys_since(session, revision)
            return SyncAnswer(revision=latest, keys=keys, spent_usd=_spent(session), grants=grants, slots=slots)

    # Inside a transaction. Locks are taken in one order everywhere: batch, revision, usage, keys, ledger.

    @contextmanager
    def _begin(self) -> Iterator[Session]:
        try:
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                yield session
        except (OperationalError, InterfaceError) as error:
            reason = " ".join(str(error.orig).split())
            raise StoreUnavailable(f"{self._engine.url.render_as_string()}: the database does not answer: {reason}") from error

    def _revision(self, session: Session) -> Setting:
        return session.scalars(select(Setting).where(Setting.name == "revision").with_for_update()).one()

    def _create(self, session: Session, spec: KeySpec, secret: str) -> KeyRecord:
        hashed = hash_secret(secret)
        revision = self._revision(session)
        found = session.scalar(select(Key).where(Key.hash == hashed))
        if found is not None:
            return _record(found)
        values = {field.name: getattr(spec, field.name) for field in fields(KeySpec)} | {"models": list(spec.models)}
        key = Key(
            id=f"key_{secrets.token_hex(6)}", hash=hashed, prefix=secret[:10], created_at=self._clock(), spent_usd=0.0, **values
        )
        session.add(key)
        revision.value = str(int(revision.value) + 1)
        return _record(key)

    def _first_time(self, session: Session, call_id: str, kept_s: float) -> bool:
        """Remember `call_id`; False when it was known. Forgets old ones now and then."""
        now = self._clock()
        new = self._insert(UsageBatch).values(id=call_id, expires_at=now + kept_s).on_conflict_do_nothing()
        first = session.execute(new.returning(UsageBatch.id)).first() is not None
        if now - self._pruned_at > _PRUNE_EVERY_S:
            self._pruned_at = now
            session.execute(delete(UsageBatch).where(UsageBatch.expires_at < now))
        return first

    def _add_usage(self, session: Session, rows: Sequence[UsageRow]) -> None:
        sums: dict[tuple[str, str, int], dict[str, Any]] = {}
        spent: dict[str, float] = {}
        for row in rows:
            spot = (row.key_id, row.model, row.window_start - row.window_start % 60)
            into = sums.setdefault(spot, dict.fromkeys(_SUMS, 0))
            for name in _SUMS:
                into[name] += getattr(row, name)
            spent[row.key_id] = spent.get(row.key_id, 0.0) + row.cost_usd
        # Sorted: two writers that touch the same rows in the same order cannot deadlock.
        values = [
            {"key_id": key, "model": model, "window_start": start} | sums[key, model, start] for key, model, start in sorted(sums)
        ]
        new = self._insert(Usage)
        added = {name: getattr(Usage, name) + getattr(new.excluded, name) for name in _SUMS}
        new = new.on_conflict_do_update(index_elements=["key_id", "model", "window_start"], set_=added)
        # On the connection, so that one compiled statement is run for all rows.
        session.connection().execute(new, values)
        for key_id in sorted(key for key, cost in spent.items() if cost):
            session.execute(update(Key).where(Key.id == key_id).values(spent_usd=Key.spent_usd + spent[key_id]))

    def _lease_once(
        self, session: Session, requests: Sequence[LeaseRequest], now: float, call_id: str | None
    ) -> list[LeaseGrant]:
        if not requests:
            return []
        if call_id is not None and not self._first_time(session, call_id, _LEASE_KEPT_S):
            answer = session.scalars(select(UsageBatch.answer).where(UsageBatch.id == call_id)).one()
            return [LeaseGrant(**grant) for grant in answer or []]
        # The lock on the key's row is what makes a read-then-write of its buckets safe beside other writers.
        ids = sorted({request.key_id for request in requests})
        locked = select(Key).where(Key.id.in_(ids)).order_by(Key.id).with_for_update()
        keys = {key.id: _record(key) for key in session.scalars(locked)}
        buckets = {(row.key_id, row.kind): row for row in session.scalars(select(BucketRow).where(BucketRow.key_id.in_(ids)))}
        slots: dict[str, dict[str, SlotRow]] = {key_id: {} for key_id in ids}
        for row in session.scalars(select(SlotRow).where(SlotRow.key_id.in_(ids))):
            slots[row.key_id][row.gateway_id] = row
        grants = []
        for request in requests:
            key = keys.get(request.key_id)
            if key is None or not key.live(now):
                grants.append(ledger.refused(request))
            elif request.kind == "parallel":
                grants.append(_hold_slots(session, key, slots[key.id], request, now))
            else:
                grants.append(_settle_bucket(session, key, buckets, request, now))
        if call_id is not None:
            answer = [asdict(grant) for grant in grants]
            session.execute(update(UsageBatch).where(UsageBatch.id == call_id).values(answer=answer))
        return grants


def _hold_slots(session: Session, key: KeyRecord, rows: dict[str, SlotRow], request: LeaseRequest, now: float) -> LeaseGrant:
    """Settle a `parallel` request; `rows` are those of the key by gateway, kept up to date."""
    if key.max_parallel is None:
        return ledger.unlimited(request)
    for row in [row for row in rows.values() if row.expires_at <= now and row.gateway_id != request.gateway_id]:
        session.delete(rows.pop(row.gateway_id))
    held = [ledger.Slots(row.gateway_id, row.count, row.expires_at) for row in rows.values()]
    slots, grant = ledger.hold(held, request, key.max_parallel, now)
    mine = rows.get(request.gateway_id)
    if mine is None:
        mine = rows[request.gateway_id] = SlotRow(key_id=key.id, gateway_id=request.gateway_id)
        session.add(mine)
    mine.count, mine.expires_at = slots.count, slots.expires_at
    return grant


def _settle_bucket(
    session: Session, key: KeyRecord, rows: dict[tuple[str, str], BucketRow], request: LeaseRequest, now: float
) -> LeaseGrant:
    """Settle a `requests` or `tokens` request; `rows` are the buckets by key and kind, kept up to date."""
    limit = key.rpm if request.kind == "requests" else key.tpm
    if limit is None:
        return ledger.unlimited(request)
    row = rows.get((key.id, request.kind))
    bucket, grant = ledger.settle(None if row is None else ledger.Bucket(row.level, row.updated_at), request, limit, now)
    if row is None:
        row = rows[key.id, request.kind] = BucketRow(key_id=key.id, kind=request.kind)
        session.add(row)
    row.level, row.updated_at = bucket.level, bucket.updated_at
    return grant


def _record(key: Key) -> KeyRecord:
    values = {field.name: getattr(key, field.name) for field in fields(KeyRecord)}
    return KeyRecord(**values | {"models": tuple(key.models)})


def _all_keys(session: Session) -> list[KeyRecord]:
    return [_record(key) for key in session.scalars(select(Key).order_by(Key.created_at, Key.id))]


def _keys_since(session: Session, revision: int) -> tuple[int, list[KeyRecord] | None]:
    latest = int(session.scalars(select(Setting.value).where(Setting.name == "revision")).one())
    # Not "newer": a gateway may know a higher revision of a store that was replaced.
    return latest, None if latest == revision else _all_keys(session)


def _spent(session: Session) -> dict[str, float]:
    return {row.id: row.spent_usd for row in session.execute(select(Key.id, Key.spent_usd).where(Key.spent_usd != 0))}
