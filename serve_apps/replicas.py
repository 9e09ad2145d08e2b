"""Where a model's engine replicas are: the one file that reaches into Ray Serve, and why.

The gateway asks Serve's own request router (random pairs, prefix affinity, whatever the model's deployment is configured with)
for a replica and then talks HTTP to it directly: no second proxy hop, no router process, no actor call per request. Ray's own
ingress for direct streaming does the same, but in a process of its own that HAProxy calls per request; that call costs about
1.5 ms of CPU, a proxy hop about 40 µs per chunk. `DeploymentHandle.choose_replica` is public; that it may skip reserving a
slot (`_reserve=False`) and the replica's HTTP address (`ReplicaSelection._replica.backend_http_endpoint`) are not.

`RayReplicas` is for the cluster, `FixedReplicas` for a gateway that runs alone (bench, tests). Both are used by `relay.py`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from cluster.config import ModelConfig

AVOID_S = 5.0
RETRY_S = 0.1
AWAKE_S = 0.25


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
        self._app_name = model.app_name
        self._deployment = "EngineServer:" + model.app_name.removeprefix("engine-")
        self._handle: Any = None
        self._path = model.path
        self._by_body = model.routing == "prefix_affinity"
        self._avoided: dict[str, float] = {}
        self._busy: dict[str, int] = {}

    async def pick(self, body: dict[str, Any]) -> Endpoint:
        """Serve's router names one; the less busy of two (as this gateway sees it) where the router itself picks at random."""
        chosen = await self._ask(body)
        if not self._by_body and len(self._busy) > 1 and self._busy.get(chosen.id, 0):
            other = await self._ask(body)
            if self._busy.get(other.id, 0) < self._busy[chosen.id]:
                chosen = other
        self._busy[chosen.id] = self._busy.get(chosen.id, 0) + 1
        return chosen

    def release(self, endpoint: Endpoint) -> None:
        if endpoint.id in self._busy:
            self._busy[endpoint.id] -= 1

    async def _ask(self, body: dict[str, Any]) -> Endpoint:
        from ray.serve.exceptions import DeploymentUnavailableError

        # A body-aware router reads the request's fields as attributes of the first argument.
        args = (SimpleNamespace(**body),) if self._by_body and (body.get("messages") or body.get("prompt")) else ()
        while True:
            try:
                async with asyncio.timeout(AWAKE_S):
                    endpoint = await self._choose(args, reserve=False)
            except TimeoutError:
                # Nobody is there. A reservation that waits is what Serve counts as demand: it wakes the model.
                endpoint = await self._choose(args, reserve=True)
            except (DeploymentUnavailableError, KeyError):  # failed to start, or not deployed yet
                endpoint = None
            if endpoint is not None and self._avoided.get(endpoint.id, 0.0) < time.monotonic():
                return endpoint
            await asyncio.sleep(RETRY_S)

    async def _choose(self, args: tuple[Any, ...], reserve: bool) -> Endpoint | None:
        async with self._found().choose_replica(*args, _reserve=reserve) as selection:
            address = selection._replica.backend_http_endpoint
            name = selection.replica_id
        return Endpoint(name, f"http://{address[0]}:{address[1]}{self._path}") if address else None

    def _found(self) -> Any:
        """The deployment's handle. Raises KeyError while Serve does not know the deployment."""
        from ray import serve

        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, app_name=self._app_name)
        return self._handle

    def avoid(self, endpoint: Endpoint) -> None:
        now = time.monotonic()
        self._avoided = {name: until for name, until in self._avoided.items() if until > now}
        self._avoided[endpoint.id] = now + AVOID_S
        self._busy.pop(endpoint.id, None)


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
