"""The arithmetic of quotas: token buckets and leased slots, as pure functions with the clock passed in.

A bucket per (key, kind) holds at most one minute of the limit and is refilled at limit/60 per second; gateways lease units
from it, so whatever dies, no more than the bucket held is ever handed out. Slots bound what runs in parallel: a gateway
holds some of a key's slots until they expire. Nothing here keeps state or reads a clock. Caller: `cluster.store`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["requests", "tokens", "parallel"]

# Rounding of floats must not turn "one unit" into 0.9999999; what it gives too early is taken back from the level.
_ROUNDING = 1e-6
# When a slot comes free is not known; an expiry is at most this far when a gateway syncs.
_SLOT_RETRY_S = 1.0


@dataclass(frozen=True)
class Bucket:
    """State of one bucket: units in it at `updated_at` (unix seconds). Below zero is debt."""

    level: float
    updated_at: float


@dataclass(frozen=True)
class Slots:
    """Parallel slots of one key that one gateway holds until `expires_at`."""

    gateway_id: str
    count: int
    expires_at: float


@dataclass(frozen=True, kw_only=True)
class LeaseRequest:
    """What a gateway asks of the ledger.

    Args:
        key_id: Whose quota; the limit comes from that key's record.
        kind: `requests` (rpm), `tokens` (tpm) or `parallel` (max_parallel).
        want: Units to take. For `parallel`: the slots this gateway wants to hold in all, so asking again changes nothing and
            asking for fewer gives some back.
        need: Fewer than this are of no use; `retry_after_s` is when this many can be had.
        refund: Leased units that were not spent; never fills the bucket over the limit.
        charge: Units spent beyond what was leased; may take the level below zero.
        gateway_id: Who asks; `parallel` only.
        ttl_s: How long slots are held without a renewal; `parallel` only.
    """

    key_id: str
    kind: Kind
    want: int = 0
    need: int = 1
    refund: int = 0
    charge: int = 0
    gateway_id: str = ""
    ttl_s: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in ("requests", "tokens", "parallel"):
            raise ValueError(f"kind: {self.kind!r} is not requests, tokens or parallel")
        if min(self.want, self.need, self.refund, self.charge) < 0:
            raise ValueError("want, need, refund and charge must not be negative")
        if self.kind == "parallel" and not self.gateway_id:
            raise ValueError("gateway_id: slots are held by a gateway, name it")


@dataclass(frozen=True, kw_only=True)
class LeaseGrant:
    """What the ledger answers; `limit` and `remaining` are None for a key without that limit.

    Args:
        granted: Units handed out, 0 to `want`. For `parallel`: the slots this gateway holds now.
        limit: Of the key, per minute (or slots). 0 when the key is unknown, revoked or expired.
        remaining: Units left for anyone after this grant.
        retry_after_s: 0 when at least `need` was granted, else when that many can be had; with `need` above the limit, when
            the bucket is full.
        reset_s: When the bucket is full again.
    """

    key_id: str
    kind: Kind
    granted: int
    limit: int | None
    remaining: int | None
    retry_after_s: float
    reset_s: float


def refill(bucket: Bucket | None, limit: int, now: float) -> Bucket:
    """The bucket at `now`: full when it is new, never over `limit`. A clock that went back adds nothing and loses nothing."""
    if bucket is None:
        return Bucket(float(limit), now)
    passed = max(0.0, now - bucket.updated_at)
    return Bucket(min(float(limit), bucket.level + passed * limit / 60), max(now, bucket.updated_at))


def settle(bucket: Bucket | None, request: LeaseRequest, limit: int, now: float) -> tuple[Bucket, LeaseGrant]:
    """Refund, charge, then take what `request` asks, of `requests` or `tokens`. Returns the new state and the answer."""
    full = refill(bucket, limit, now)
    level = min(float(limit), full.level + request.refund) - request.charge
    granted = max(0, min(request.want, math.floor(level + _ROUNDING)))
    level -= granted
    rate = limit / 60
    short = min(request.need, request.want, limit) - granted
    return Bucket(level, full.updated_at), LeaseGrant(
        key_id=request.key_id,
        kind=request.kind,
        granted=granted,
        limit=limit,
        remaining=max(0, math.floor(level + _ROUNDING)),
        retry_after_s=max(0.0, (short - level) / rate) if short > 0 else 0.0,
        reset_s=max(0.0, (limit - level) / rate),
    )


def hold(held: Iterable[Slots], request: LeaseRequest, limit: int, now: float) -> tuple[Slots, LeaseGrant]:
    """Slots for the asking gateway beside what live gateways hold: in all never above `limit`.

    Args:
        held: What each gateway holds of this key, expired ones and the asking one too.
    """
    others = sum(slots.count for slots in held if slots.gateway_id != request.gateway_id and slots.expires_at > now)
    free = max(0, limit - others)
    granted = min(request.want, free)
    return Slots(request.gateway_id, granted, now + request.ttl_s), LeaseGrant(
        key_id=request.key_id,
        kind=request.kind,
        granted=granted,
        limit=limit,
        remaining=free - granted,
        retry_after_s=_SLOT_RETRY_S if granted < min(request.need, request.want) else 0.0,
        reset_s=0.0,
    )


def unlimited(request: LeaseRequest) -> LeaseGrant:
    """The answer for a key without that limit: all of it, and nothing is remembered."""
    return _plain(request, request.want, None)


def refused(request: LeaseRequest) -> LeaseGrant:
    """The answer for a key that is unknown, revoked or expired."""
    return _plain(request, 0, 0)


def _plain(request: LeaseRequest, granted: int, limit: int | None) -> LeaseGrant:
    return LeaseGrant(
        key_id=request.key_id, kind=request.kind, granted=granted, limit=limit, remaining=limit, retry_after_s=0.0, reset_s=0.0
    )
