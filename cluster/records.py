"""What the store takes and gives: keys, usage rows and the answer to a gateway, as frozen dataclasses.

Validates what an administrator may say about a key, makes and hashes secrets. Imports neither SQLAlchemy nor Ray, so that
gateways and commands stay light. It keeps nothing: that is `cluster.store`. Callers: the store, gateways, `cluster.admin`.

Times are unix seconds, money is US dollars, limits are per minute.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cluster.errors import StoreError
from cluster.ledger import LeaseGrant

LARGEST_LIMIT = 10**15
LARGEST_PRIORITY = 10**6


class StoreUnavailable(StoreError):
    """The database does not answer now; the same call may succeed later."""


def new_secret(admin: bool = False) -> str:
    """A fresh secret: `tp-` (or `tp-admin-`) and 43 url-safe characters, 256 random bits."""
    return ("tp-admin-" if admin else "tp-") + secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """The only form in which a secret is kept: sha256 in hex (the secret is random, so no salt and no slow hash)."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KeySpec:
    """What an administrator decides about a key. None means no limit; an empty `models` means every model.

    Raises:
        StoreError: a value is not allowed; the text names the field.
    """

    name: str
    admin: bool = False
    models: tuple[str, ...] = ()
    rpm: int | None = None
    tpm: int | None = None
    max_parallel: int | None = None
    priority: int = 0
    expires_at: float | None = None
    budget_usd: float | None = None

    def __post_init__(self) -> None:
        _check_text("name", self.name)
        if not isinstance(self.admin, bool):
            raise StoreError(f"admin: must be true or false, found {self.admin!r}")
        if not isinstance(self.models, tuple):
            raise StoreError(f"models: must be a list of model names, found {self.models!r}")
        for model in self.models:
            _check_text("models", model)
        for field in ("rpm", "tpm", "max_parallel"):
            limit = getattr(self, field)
            if limit is not None and (not _is_int(limit) or not 1 <= limit <= LARGEST_LIMIT):
                raise StoreError(f"{field}: must be a whole number from 1 to {LARGEST_LIMIT}, found {limit!r}")
        if not _is_int(self.priority) or abs(self.priority) > LARGEST_PRIORITY:
            raise StoreError(f"priority: must be a whole number within {LARGEST_PRIORITY} of 0, found {self.priority!r}")
        _check_positive("expires_at", self.expires_at, "unix seconds")
        _check_positive("budget_usd", self.budget_usd, "US dollars")

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> KeySpec:
        """Read a JSON object whose members are the fields above; unknown members are refused with a StoreError."""
        known = {field.name for field in fields(KeySpec)}
        for name in data:
            if name not in known:
                raise StoreError(f"{name}: unknown field; a key has {', '.join(sorted(known))}")
        if "name" not in data:
            raise StoreError("name: is missing")
        values = dict(data)
        if isinstance(values.get("models"), list):
            values["models"] = tuple(values["models"])
        return KeySpec(**values)


@dataclass(frozen=True, kw_only=True)
class KeyRecord(KeySpec):
    """A key as the store keeps it: `hash` is the secret's sha256, `prefix` its first 10 characters, for display."""

    id: str
    hash: str
    prefix: str
    created_at: float
    revoked_at: float | None = None

    def live(self, now: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def public(self) -> dict[str, Any]:
        """JSON for administrators: everything but the hash."""
        shown = asdict(self)
        del shown["hash"]
        return shown


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """What one key did with one model in one minute; `window_start` is that minute in unix seconds, latencies are sums."""

    key_id: str
    model: str
    window_start: int
    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    latency_s: float = 0.0
    ttft_s: float = 0.0
    cost_usd: float = 0.0


@dataclass(frozen=True, kw_only=True)
class UsageTotal:
    """What one key did with one model in a span of time. `name` is the key's, empty for a key the store does not know."""

    key_id: str
    name: str
    model: str
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    latency_s: float
    ttft_s: float
    cost_usd: float


@dataclass(frozen=True, kw_only=True)
class SyncAnswer:
    """What a gateway learns from one `sync`.

    Args:
        revision: Of the set of keys; pass it to the next sync.
        keys: Every key, revoked ones too, or None when the revision the gateway has is the latest.
        spent_usd: Money spent so far by key id.
        grants: One per lease request, in order.
        slots: Parallel slots this gateway holds now, by key id.
    """

    revision: int
    keys: list[KeyRecord] | None
    spent_usd: dict[str, float]
    grants: list[LeaseGrant]
    slots: dict[str, int]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or len(value) > 200 or not value.isprintable():
        raise StoreError(f"{field}: must be 1 to 200 printable characters, found {str(value)[:60]!r}")


def _check_positive(field: str, value: object, unit: str) -> None:
    if value is None:
        return
    # Compared before any conversion: a JSON integer may be too large for a float.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= LARGEST_LIMIT or math.isnan(value):
        raise StoreError(f"{field}: must be a positive number of {unit}, at most {LARGEST_LIMIT}, found {str(value)[:60]}")
