"""The gateway without Ray: one process, engines at fixed URLs, keys and usage in a database file.

The same ASGI app as on the cluster, under uvicorn. For `bench`, for tests of load and faults, and for engines run by hand; it
starts no engine. Several of them that are given the same store share keys and quotas as the replicas on a cluster do.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.config import Config, ModelConfig
from cluster.database import default_url
from cluster.records import KeySpec
from cluster.store import Store
from serve_apps import tracing
from serve_apps.fleet import Counts, Fleet
from serve_apps.gateway import Gateway
from serve_apps.replicas import FixedReplicas
from serve_apps.sync import LocalStore


@dataclass(frozen=True)
class Engines:
    """Where the engines are.

    Args:
        urls: By model id.
        secret: What they ask for.
        gateways: How many gateways share them; each takes its part of the slots.
    """

    urls: dict[str, list[str]]
    secret: str = ""
    gateways: int = 1


def make(config: Config, engines: Engines, store: Store) -> Gateway:
    """A gateway over these engines; `config` names the same models."""

    def count() -> Counts:
        return {"gateway": engines.gateways, **{model.app_name: len(engines.urls[model.id]) for model in config.models}}

    def replicas(model: ModelConfig) -> FixedReplicas:
        return FixedReplicas(engines.urls[model.id])

    fleet = Fleet(count, engines.gateways)
    traces = tracing.tracer(config.tracing)
    return Gateway(config.gateway, config.models, replicas, LocalStore(store), engines.secret, fleet, True, traces)


def run(config: Config, engines: Engines, key: str, store_url: str | None = None) -> None:
    """Serve on the configured host and port until interrupted; prints `ready` when the port is open.

    Args:
        key: An API key without limits, made when the store does not have it.
        store_url: See `cluster.store.Store`; default: a file that is removed at the end.
    """
    import uvicorn
    import uvloop

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            print("ready", flush=True)

    # uvicorn closes the gateway on a signal and raises the signal again: that must leave through here, past the store's file.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), _store(store_url) as store:
        store.create_key(KeySpec(name="alone"), key)
        gateway = make(config, engines, store)
        node = config.node
        settings = uvicorn.Config(
            gateway, host=node.host, port=node.port, access_log=False, log_level="warning", loop="uvloop", backlog=4096
        )
        uvloop.run(Announcing(settings).serve())


@contextlib.contextmanager
def _store(url: str | None) -> Iterator[Store]:
    with contextlib.ExitStack() as stack:
        url = url or default_url(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidepool-gateway-")))
        yield stack.enter_context(contextlib.closing(Store(url)))
