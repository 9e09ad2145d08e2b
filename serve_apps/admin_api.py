"""`/admin/keys` and `/admin/usage`, for admin keys only. `python -m cluster keys` and `usage` are its clients.

POST /admin/keys makes a key and shows its secret once, GET lists, DELETE /admin/keys/<id> revokes. GET /admin/usage sums
requests, tokens, latency and money per key and model.
"""

from __future__ import annotations

import dataclasses
import urllib.parse
from typing import Any

from cluster.errors import ApiError, StoreError
from cluster.records import KeyRecord, KeySpec, new_secret
from serve_apps.auth import check_admin
from serve_apps.exchange import Exchange
from serve_apps.sync import Syncer

MAX_BODY = 2**16
BODY_TIMEOUT_S = 10.0
USAGE_PARAMS = frozenset({"since", "until", "key", "model"})


class AdminApi:
    """The handlers, over the gateway's line to the store."""

    def __init__(self, sync: Syncer) -> None:
        self._sync = sync

    async def handle(self, exchange: Exchange, key: KeyRecord) -> None:
        """Answer one `/admin/...` request. Raises ApiError."""
        check_admin(key)
        path, method = exchange.path, exchange.method
        if path == "/admin/keys" and method == "POST":
            await self._create(exchange)
        elif path == "/admin/keys" and method == "GET":
            keys = await self._sync.store_call("list_keys")
            await exchange.reply_json({"object": "list", "data": [record.public() for record in keys]})
        elif path.startswith("/admin/keys/") and method == "DELETE":
            await self._revoke(exchange, path.removeprefix("/admin/keys/"))
        elif path == "/admin/usage" and method == "GET":
            await self._usage(exchange)
        elif path in ("/admin/keys", "/admin/usage") or path.startswith("/admin/keys/"):
            raise ApiError(405, f"{path} does not take {method}.", "method_not_allowed")
        else:
            raise ApiError(404, f"There is no {path[:200]!r} here. See docs/api.md.", "not_found")

    async def _create(self, exchange: Exchange) -> None:
        _, fields = await exchange.read_json(MAX_BODY, BODY_TIMEOUT_S)
        try:
            spec = KeySpec.parse(fields)
        except StoreError as error:
            raise ApiError(400, str(error), "invalid_value") from None
        record, secret = await self._sync.store_call("create_key", spec, new_secret(spec.admin))
        await exchange.reply_json({"key": secret, **record.public()}, 201)

    async def _revoke(self, exchange: Exchange, key_id: str) -> None:
        known = {record.id for record in await self._sync.store_call("list_keys")}
        if key_id not in known:
            raise ApiError(404, f"There is no key {key_id[:100]!r}.", "not_found")
        record = await self._sync.store_call("revoke_key", key_id)
        await exchange.reply_json(record.public())

    async def _usage(self, exchange: Exchange) -> None:
        params = dict(urllib.parse.parse_qsl(exchange.query.decode("latin-1")))
        for name in params:
            if name not in USAGE_PARAMS:
                known = ", ".join(sorted(USAGE_PARAMS))
                raise ApiError(400, f"{name[:100]}: unknown parameter; there are {known}.", "invalid_value", param=name[:100])
        since, until = (_seconds(params, name) for name in ("since", "until"))
        totals = await self._sync.store_call("usage", since, until, params.get("key"), params.get("model"))
        data: list[dict[str, Any]] = [dataclasses.asdict(total) for total in totals]
        total_usd = sum(total.cost_usd for total in totals)
        await exchange.reply_json({"object": "list", "data": data, "total_usd": round(total_usd, 9)})


def _seconds(params: dict[str, str], name: str) -> float | None:
    if name not in params:
        return None
    try:
        return float(params[name])
    except ValueError:
        raise ApiError(400, f"{name} must be unix seconds.", "invalid_value", param=name) from None
