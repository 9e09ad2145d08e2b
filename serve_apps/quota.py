"""What a key may still use, held by each gateway as small leases from the store's ledger.

A gateway leases a few requests, tokens and parallel slots at a time, spends them locally, settles what a request really used,
and gives back what lies idle. So no request waits for the store as long as its lease lasts, and all gateways together never
hand out more than the limit: the ledger is exact, a gateway's error is at most its lease. A dead gateway's leases count as spent.

`Quotas.reserve` and `Reservation.settle` are called per request by the gateway, `Quotas.due` and `Quotas.take` by `sync.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from cluster.errors import ApiError
from cluster.ledger import Kind, LeaseGrant, LeaseRequest
from cluster.records import KeyRecord

LEASE_SHARE = 50
IDLE_S = 2.0
SLOT_TTL_S = 10.0
LARGEST_PAUSE_S = 1.0

Lease = Callable[[list[LeaseRequest]], Awaitable[list[LeaseGrant]]]


@dataclass
class _Account:
    """One key at this gateway: units leased and not spent (tokens below zero are owed), and requests in progress."""

    requests: int = 0
    tokens: int = 0
    slots: int = 0
    asking: int = 0
    in_use: int = 0
    last_used: float = 0.0
    grants: dict[Kind, LeaseGrant] = field(default_factory=dict)
    refused_until: dict[Kind, float] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Reservation:
    """Room for one request. `settle` must be called once."""

    def __init__(self, account: _Account, tokens: int, metered: bool) -> None:
        self._account = account
        self._tokens = tokens
        self._metered = metered

    def settle(self, used_tokens: int) -> None:
        """The request is over and used this many tokens, prompt and completion together."""
        if self._metered:
            self._account.tokens += self._tokens - used_tokens
        self._account.in_use -= 1


class Quotas:
    """All limited keys at this gateway.

    Args:
        gateway_id: Names this gateway in the ledger.
        lease: Asks the ledger.
        clock: Seconds, only ever compared with itself.
    """

    def __init__(self, gateway_id: str, lease: Lease, clock: Callable[[], float]) -> None:
        self._gateway_id = gateway_id
        self._lease = lease
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    async def reserve(self, key: KeyRecord, tokens: int) -> Reservation:
        """Take one request, `tokens` tokens (an estimate, settled later) and a parallel slot.

        Raises:
            ApiError: 429 with `Retry-After`, when a limit is reached.
        """
        account = self._accounts.setdefault(key.id, _Account())
        # A request larger than a whole minute's tokens passes when the bucket is full, and leaves the key in debt.
        tokens = min(tokens, key.tpm) if key.tpm else 0
        account.asking += 1  # also while waiting for the lock: an account that somebody waits for must not be forgotten
        try:
            async with account.lock:
                wanted = self._wanted(key, account, tokens)
                for request in wanted:
                    self._refuse_early(key, account, request.kind)
                if wanted:
                    for grant in await self._lease(wanted):
                        self._credit(account, grant)
                self._refuse_short(key, account, tokens)
                account.requests -= 1 if key.rpm else 0
                account.tokens -= tokens
                account.in_use += 1
                account.last_used = self._clock()
        finally:
            account.asking -= 1
        return Reservation(account, tokens, key.tpm is not None)

    def headers(self, key: KeyRecord) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` response headers; empty for a key without limits."""
        account = self._accounts.get(key.id)
        if account is None:
            return {}
        shown = {}
        for kind, local in (("requests", account.requests), ("tokens", account.tokens)):
            grant = account.grants.get(kind)  # type: ignore[call-overload]
            if grant is not None and grant.limit is not None:
                shown[f"x-ratelimit-limit-{kind}"] = str(grant.limit)
                shown[f"x-ratelimit-remaining-{kind}"] = str(max(0, min(grant.limit, (grant.remaining or 0) + local)))
                shown[f"x-ratelimit-reset-{kind}"] = f"{grant.reset_s:.3f}s"
        return shown

    def due(self) -> list[LeaseRequest]:
        """What to tell the ledger now: debts, idle leases to give back, slots to keep. `sync.py` sends it, then calls `take`."""
        now = self._clock()
        due = []
        for key_id, account in list(self._accounts.items()):
            asking = account.asking > 0  # a request counts on what is here and waits for the ledger: leave it alone
            idle = account.in_use == 0 and not asking and now - account.last_used > IDLE_S
            if account.tokens < 0:
                due.append(LeaseRequest(key_id=key_id, kind="tokens", charge=-account.tokens))
                account.tokens = 0
            elif idle and account.tokens > 0:
                due.append(LeaseRequest(key_id=key_id, kind="tokens", refund=account.tokens))
                account.tokens = 0
            if idle and account.requests > 0:
                due.append(LeaseRequest(key_id=key_id, kind="requests", refund=account.requests))
                account.requests = 0
            if account.slots:
                if not asking:
                    account.slots = account.in_use  # the ledger may lend the others to another gateway from now on
                due.append(self._slots(key_id, account.slots))
            if idle and not due:
                del self._accounts[key_id]
        return due

    def take(self, grants: list[LeaseGrant]) -> None:
        """The ledger's answers to `due`."""
        for grant in grants:
            account = self._accounts.get(grant.key_id)
            if account is not None:
                self._credit(account, grant)

    def _wanted(self, key: KeyRecord, account: _Account, tokens: int) -> list[LeaseRequest]:
        wanted = []
        if key.rpm and account.requests < 1:
            wanted.append(LeaseRequest(key_id=key.id, kind="requests", want=max(1, key.rpm // LEASE_SHARE)))
        if key.tpm and account.tokens < tokens:
            missing = tokens - account.tokens
            wanted.append(LeaseRequest(key_id=key.id, kind="tokens", want=max(missing, key.tpm // LEASE_SHARE), need=missing))
        if key.max_parallel and account.in_use >= account.slots:
            wanted.append(self._slots(key.id, account.in_use + 1))
        return wanted

    def _slots(self, key_id: str, want: int) -> LeaseRequest:
        return LeaseRequest(key_id=key_id, kind="parallel", want=want, gateway_id=self._gateway_id, ttl_s=SLOT_TTL_S)

    def _credit(self, account: _Account, grant: LeaseGrant) -> None:
        account.grants[grant.kind] = grant
        if grant.retry_after_s > 0:
            account.refused_until[grant.kind] = self._clock() + min(grant.retry_after_s, LARGEST_PAUSE_S)
        if grant.kind == "requests":
            account.requests += grant.granted
        elif grant.kind == "tokens":
            account.tokens += grant.granted
        else:
            account.slots = grant.granted

    def _refuse_early(self, key: KeyRecord, account: _Account, kind: Kind) -> None:
        """A limit that was reached a moment ago is not asked about again: a client in a loop costs the store nothing."""
        if kind != "parallel" and account.refused_until.get(kind, 0.0) > self._clock():
            raise self._over(key, account, kind)

    def _refuse_short(self, key: KeyRecord, account: _Account, tokens: int) -> None:
        if key.rpm and account.requests < 1:
            raise self._over(key, account, "requests")
        if key.tpm and account.tokens < tokens:
            raise self._over(key, account, "tokens")
        if key.max_parallel and account.in_use >= account.slots:
            raise self._over(key, account, "parallel")

    def _over(self, key: KeyRecord, account: _Account, kind: Kind) -> ApiError:
        what = {
            "requests": f"{key.rpm} requests per minute",
            "tokens": f"{key.tpm} tokens per minute",
            "parallel": f"{key.max_parallel} requests at a time",
        }[kind]
        grant = account.grants.get(kind)
        wait = max(1.0, grant.retry_after_s if grant else 1.0)
        text = f"Rate limit reached: this API key may use {what}. Retry after {wait:.0f} s."
        return ApiError(429, text, "rate_limit_exceeded", retry_after=wait, headers=self.headers(key))
