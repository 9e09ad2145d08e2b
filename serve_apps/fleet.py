"""How many replicas of each engine and of the gateway itself are running, looked up every two seconds.

A gateway admits its share: the slots of a model's running replicas, divided by the gateways. `Fleet` is the arithmetic and the
loop, `serve_counts` the look at Ray Serve, passed in so that a gateway without Ray can say its own numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from cluster.config import ModelConfig

PERIOD_S = 2.0
GATEWAY_APP = "gateway"
GATEWAY_DEPLOYMENT = "Gateway"

Counts = dict[str, int]


class Fleet:
    """Running replicas by Serve application; 1 each until they are known."""

    def __init__(self, count: Callable[[], Counts], gateways: int = 1) -> None:
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
            counts = self._count()
            if counts != self._counts:
                self._counts = counts
                changed()
            await asyncio.sleep(PERIOD_S)


def serve_counts(models: Iterable[ModelConfig]) -> Callable[[], Counts]:
    """Counts running replicas of these models' engines and of the gateway, from what Serve keeps telling this process."""
    from serve_apps.replicas import Deployment, engine_deployment

    known = {model.app_name: engine_deployment(model) for model in models}
    known[GATEWAY_APP] = Deployment(GATEWAY_DEPLOYMENT, GATEWAY_APP)

    def count() -> Counts:
        return {name: len(deployment.running()) for name, deployment in known.items()}

    return count
