"""The gateway without Ray: one process, engines at fixed URLs, keys and usage in memory.

The same ASGI app as on the cluster, under uvicorn. For `bench`, for tests of load and faults, and for engines run by hand; it
starts no engine and keeps nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.config import GatewayConfig, ModelConfig
from cluster.records import KeySpec
from cluster.store import Store
from serve_apps.fleet import Counts, Fleet
from serve_apps.gateway import Gateway
from serve_apps.replicas import FixedReplicas
from serve_apps.sync import LocalStore


def make(
    engines: dict[str, list[str]], store: Store, secret: str, slots: int, config: GatewayConfig | None = None, gateways: int = 1
) -> Gateway:
    """A gateway over engines by model id; `gateways` is how many share them."""
    models = [ModelConfig(id=name, device="cpu", max_ongoing_requests=slots) for name in engines]

    async def count() -> Counts:
        return {"gateway": gateways, **{model.app_name: len(engines[model.id]) for model in models}}

    def replicas(model: ModelConfig) -> FixedReplicas:
        return FixedReplicas(engines[model.id])

    return Gateway(config or GatewayConfig(), models, replicas, LocalStore(store), secret, Fleet(count), echo_request_id=True)


def run(engines: dict[str, list[str]], host: str, port: int, key: str, secret: str, slots: int) -> None:
    """Serve until interrupted; prints `ready` when the port is open."""
    import uvicorn

    store = Store("sqlite://")
    store.create_key(KeySpec(name="alone"), key)

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            print("ready", flush=True)

    gateway = make(engines, store, secret, slots)
    config = uvicorn.Config(gateway, host=host, port=port, access_log=False, log_level="warning", loop="uvloop")
    asyncio.run(Announcing(config).serve())
