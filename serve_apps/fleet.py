"""How many replicas of each engine and of the gateway itself are running, looked up every two seconds.

A gateway admits its share: the slots of a model's running replicas, divided by the gateways. `Fleet` is the arithmetic and the
loop, `serve_counts` the look at Ray Serve, passed in so that a gateway without Ray can say its own numbers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cluster.config import ModelConfig

log = logging.getLogger(__name__)
PERIOD_S = 2.0
GATEWAY_APP = "gateway"

Counts = dict[str, int]


class Fleet:
    """Running replicas by Serve application; 1 each until they are known."""

    def __init__(self, count: Callable[[], Awaitable[Counts]], gateways: int = 1) -> None:
        self._count = count
        self._counts: Counts = {GATEWAY_APP: gateways}

    def replicas(self, model: ModelConfig) -> int | None:
        """Running replicas of a model; None while unknown."""
        return self._counts.get(model.app_name)

    def share(self, model: ModelConfig) -> int:
        """Requests of this model that one gateway may have at its engines; a sleeping model counts as one replica."""
        engines = max(1, self._counts.get(model.app_name, 1))
        gateways = max(1, self._counts.get(GATEWAY_APP, 1))
        return max(1, -(-engines * model.slots // gateways))

    async def run(self, changed: Callable[[], None]) -> None:
        """Look until cancelled; `changed` is called when numbers are new."""
        while True:
            counts = await self._count()
            if counts and counts != self._counts:
                self._counts = counts
                changed()
            await asyncio.sleep(PERIOD_S)


async def serve_counts() -> Counts:
    """Running replicas of every Serve application's ingress; empty while the controller is away."""
    return await asyncio.to_thread(_serve_counts)


def _serve_counts() -> Counts:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        status = serve.status()
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("Serve's controller does not answer: %s", type(error).__name__)
        return {}
    counts: Counts = {}
    for name, app in status.applications.items():
        counts[name] = sum(deployment.replica_states.get("RUNNING", 0) for deployment in app.deployments.values())
    return counts
