"""Where a model's engine replicas are: the one file that reaches into Ray Serve, and why.

The gateway talks HTTP to the engine replicas directly: no second proxy hop, no router process, no actor call per request. Ray's
own ingress for direct streaming picks a replica in a process of its own that HAProxy calls per request; that call costs about
1.5 ms of CPU, a proxy hop about 40 µs per chunk. Serve keeps every deployment handle up to date about the running replicas; this
file reads them from the handle's router (`_router._asyncio_router.request_router.curr_replicas`), with their HTTP addresses
(`backend_http_endpoint`). A model that sleeps, and one with prefix affinity, is asked for with the public
`DeploymentHandle.choose_replica`, which wakes the one and knows the other's caches.

`RayReplicas` is for the cluster, `FixedReplicas` for a gateway that runs alone (bench, tests). `fleet.py`
counts replicas with `Deployment`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from cluster.config import ModelConfig

log = logging.getLogger(__name__)
AVOID_S = 5.0
RETRY_S = 0.1
AWAKE_S = 1.0
UNKNOWN_S = 1.0


@dataclass(frozen=True)
class Endpoint:
    """One engine replica: its id, and the URL below which its routes are."""

    id: str
    url: str


class Replicas(Protocol):
    """A source of replicas of one model."""

    async def pick(self, body: dict[str, Any]) -> Endpoint:
        """A replica for this request, to be released; waits, without limit, while there is none."""
        ...

    def release(self, endpoint: Endpoint) -> None:
        """The request that picked this one is over."""
        ...

    def avoid(self, endpoint: Endpoint) -> None:
        """This one just failed to answer: do not pick it for a while."""
        ...


class RayReplicas:
    """Replicas of a model's Serve application."""

    def __init__(self, model: ModelConfig) -> None:
        self._deployment = engine_deployment(model)
        self._path = model.path
        self._by_body = model.routing == "prefix_affinity"
        self._avoided: dict[str, float] = {}
        self._busy: Counter[str] = Counter()

    async def pick(self, body: dict[str, Any]) -> Endpoint:
        """The least busy replica, as this gateway sees it; or the one that Serve's prefix-aware router names."""
        chosen = None if self._by_body else self._least_busy()
        if chosen is None:
            chosen = await self._ask(body)
        self._busy[chosen.id] += 1
        return chosen

    def release(self, endpoint: Endpoint) -> None:
        self._busy[endpoint.id] -= 1
        if self._busy[endpoint.id] <= 0:
            del self._busy[endpoint.id]

    def avoid(self, endpoint: Endpoint) -> None:
        now = time.monotonic()
        self._avoided = {name: until for name, until in self._avoided.items() if until > now}
        self._avoided[endpoint.id] = now + AVOID_S

    def _usable(self, endpoint: Endpoint) -> bool:
        return self._avoided.get(endpoint.id, 0.0) < time.monotonic()

    def _endpoint(self, name: str, address: tuple[str, int]) -> Endpoint:
        return Endpoint(name, f"http://{address[0]}:{address[1]}{self._path}")

    def _least_busy(self) -> Endpoint | None:
        found = [self._endpoint(name, address) for name, address in self._deployment.running().items()]
        usable = [endpoint for endpoint in found if self._usable(endpoint)]
        random.shuffle(usable)
        return min(usable, key=lambda endpoint: self._busy[endpoint.id], default=None)

    async def _ask(self, body: dict[str, Any]) -> Endpoint:
        """Serve's router names one; while there is none, the request counts as demand and wakes the model."""
        from ray.serve.exceptions import DeploymentUnavailableError

        # A body-aware router reads the request's fields as attributes of the first argument.
        args = (SimpleNamespace(**body),) if self._by_body and (body.get("messages") or body.get("prompt")) else ()
        while True:
            try:
                # A reservation that waits is what Serve counts as demand; where somebody is running, none is needed.
                asleep = not self._deployment.running()
                async with asyncio.timeout(None if asleep else AWAKE_S):
                    async with self._deployment.handle().choose_replica(*args, _reserve=asleep) as selection:
                        name, address = selection.replica_id, selection._replica.backend_http_endpoint
                if address is not None and self._usable(endpoint := self._endpoint(name, address)):
                    return endpoint
            except (DeploymentUnavailableError, KeyError, TimeoutError) as error:
                log.debug("%s: no replica yet: %r", self._path, error)
            await asyncio.sleep(RETRY_S)


class Deployment:
    """A Serve deployment as its handle in this process knows it: kept up to date by Serve, read without a call."""

    def __init__(self, name: str, app_name: str) -> None:
        self._name = name
        self._app_name = app_name
        self._handle: Any = None
        self._ask_at = 0.0

    def handle(self) -> Any:
        """The deployment's handle. Raises KeyError while Serve does not know the deployment."""
        if self._handle is None:
            from ray import serve

            if time.monotonic() < self._ask_at:
                raise KeyError(self._name)
            self._ask_at = time.monotonic() + UNKNOWN_S
            handle = serve.get_deployment_handle(self._name, app_name=self._app_name)
            if not handle.is_initialized:
                handle._init()
            self._handle = handle
        return self._handle

    def running(self) -> dict[str, tuple[str, int]]:
        """Host and port of the HTTP server of each running replica, by its id; empty while none is known."""
        try:
            router = self.handle()._router._asyncio_router.request_router
        except KeyError:
            return {}
        if router is None:
            return {}
        found = {replica.replica_id.unique_id: replica.backend_http_endpoint for replica in router.curr_replicas.values()}
        return {name: address for name, address in found.items() if address is not None}


def engine_deployment(model: ModelConfig) -> Deployment:
    """The deployment of a model's engine; Ray names it after the class and the model's id (see `engine.build`)."""
    return Deployment("EngineServer:" + model.app_name.removeprefix("engine-"), model.app_name)


class FixedReplicas:
    """Replicas at given URLs, in turn."""

    def __init__(self, urls: list[str]) -> None:
        self._endpoints = [Endpoint(url, url.rstrip("/")) for url in urls]
        self._next = 0

    async def pick(self, body: dict[str, Any]) -> Endpoint:
        self._next += 1
        return self._endpoints[self._next % len(self._endpoints)]

    def release(self, endpoint: Endpoint) -> None:
        """Nothing to do: turns do not depend on load."""

    def avoid(self, endpoint: Endpoint) -> None:
        """Nothing to do: the next pick is the next URL."""
