"""`/healthz` and `/readyz`, open to everyone who reaches the endpoint and saying nothing about anyone; and `/metrics`.

Ready means that every model that should be up has produced a token lately: from real traffic, or made for the question.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from cluster.errors import ApiError
from cluster.metrics import GatewayMetrics
from serve_apps.exchange import Exchange
from serve_apps.fleet import Fleet
from serve_apps.service import ModelService
from serve_apps.sync import Syncer

PROOF_S = 10.0
PROBE_TIMEOUT_S = 10.0


class StatusApi:
    """The handlers of one gateway."""

    def __init__(self, services: dict[str, ModelService], fleet: Fleet, sync: Syncer, metrics: GatewayMetrics) -> None:
        self._services = services
        self._fleet = fleet
        self._sync = sync
        self._metrics = metrics
        self._probes: dict[str, asyncio.Lock] = {name: asyncio.Lock() for name in services}

    async def healthz(self, exchange: Exchange) -> None:
        """This process answers."""
        only_get(exchange)
        await exchange.reply_json({"status": "ok"})

    async def readyz(self, exchange: Exchange) -> None:
        """200 when every model that should be up has made a token in the last seconds, 503 otherwise; each model is listed."""
        only_get(exchange)
        states = await asyncio.gather(*(self._state(service) for service in self._services.values()))
        models = dict(zip(self._services, states, strict=True))
        ready = all(state["ready"] for state in states)
        await exchange.reply_json({"ready": ready, "models": models}, 200 if ready else 503)

    async def metrics(self, exchange: Exchange) -> None:
        """Prometheus text of this gateway replica."""
        only_get(exchange)
        self.measure()
        await exchange.reply(200, self._metrics.text(), b"text/plain; version=0.0.4; charset=utf-8")

    def measure(self) -> None:
        """Bring the gauges up to date: they are looked up, not counted."""
        for name, service in self._services.items():
            self._metrics.running.labels(name).set(service.admission.running)
            self._metrics.queued.labels(name).set(service.admission.queued)
            self._metrics.replicas.labels(name).set(self._fleet.replicas(service.model) or 0)
        self._metrics.store_age.set(self._sync.age_s)

    async def _state(self, service: ModelService) -> dict[str, Any]:
        model = service.model
        # A question must not wake a model that sleeps, nor keep it from sleeping.
        may_sleep = model.autoscaling.min_replicas == 0
        async with self._probes[model.id]:
            if not may_sleep and time.time() - service.last_token > PROOF_S:
                await service.probe(PROBE_TIMEOUT_S)
        age = time.time() - service.last_token if service.last_token else None
        proven = age is not None and age < PROOF_S + PROBE_TIMEOUT_S
        return {
            "ready": proven or may_sleep,
            "replicas": self._fleet.replicas(model),
            "may_sleep": may_sleep,
            "last_token_age_s": None if age is None else round(age, 3),
        }


def only_get(exchange: Exchange) -> None:
    """Refuse every other method. Raises ApiError 405."""
    if exchange.method not in ("GET", "HEAD"):
        raise ApiError(405, f"{exchange.path} takes GET.", "method_not_allowed", headers={"allow": "GET"})
