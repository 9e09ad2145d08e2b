"""The front door: one ASGI app that decides who may ask what, and hands the rest to the model's service.

Per request: route, key, body, model, budget, quota, then `ModelService.serve`. It reads the request's JSON once and no JSON
of the answer. Every error a client sees leaves through `Exchange.fail`, in one shape. It knows nothing of Ray: `app.py` gives
it the store, the replicas and the counts. Prompts and answers are never logged.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import time
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import nullcontext
from typing import Any

from cluster.config import GatewayConfig, ModelConfig
from cluster.errors import ApiError
from cluster.metrics import GatewayMetrics
from cluster.metrics_guard import is_bearer
from cluster.records import KeyRecord, StoreUnavailable
from serve_apps.admin_api import AdminApi
from serve_apps.auth import check_admin, check_model, secret_of
from serve_apps.exchange import ClientGone, Exchange
from serve_apps.fleet import Fleet
from serve_apps.relay import Relay
from serve_apps.replicas import Replicas
from serve_apps.requests import ROUTES, check_choices, estimate_tokens, model_name, parse_form
from serve_apps.service import Call, ModelService, Outcome
from serve_apps.status import StatusApi, only_get
from serve_apps.sync import StoreClient, Syncer
from serve_apps.tracing import RequestTrace, Tracer
from serve_apps.usage import cost_usd

log = logging.getLogger(__name__)
GC_THRESHOLD = 20_000
STOP_S = 3.0
UNTRACED = nullcontext()
Handler = Callable[[Exchange], Awaitable[None]]


class Gateway:
    """The ASGI app. `start` must be awaited inside the event loop before the first request, `stop` at the end.

    Args:
        config: The gateway's part of the configuration.
        models: Every model behind it.
        replicas: Makes the source of replicas of a model.
        store: The cluster's store.
        secret: What engines ask for.
        fleet: How many replicas of engines and gateways run.
        echo_request_id: See `Exchange`.
        tracer: Makes a span of each request; closed at the end.
        metrics_token: What `/metrics` asks for where there is no admin key; None leaves it open, for a gateway on its own.
    """

    def __init__(
        self,
        config: GatewayConfig,
        models: Iterable[ModelConfig],
        replicas: Callable[[ModelConfig], Replicas],
        store: StoreClient,
        secret: str,
        fleet: Fleet,
        echo_request_id: bool,
        tracer: Tracer | None = None,
        metrics_token: str | None = None,
    ) -> None:
        self._config = config
        self._tracer = tracer
        self._models = {model.id: model for model in models}
        self._by_name = {name: model for model in self._models.values() for name in model.names}
        self._make_replicas = replicas
        self._secret = secret
        self._fleet = fleet
        self._echo = echo_request_id
        self._metrics_token = metrics_token
        self._tasks: set[asyncio.Task[None]] = set()
        self._created = int(time.time())
        self._sync = Syncer(store, config.sync_s)
        self.metrics = GatewayMetrics()
        for model in self._models.values():
            self.metrics.expect(model.id, model.autoscaling.min_replicas)
        self._services: dict[str, ModelService] = {}

    async def start(self) -> None:
        """Open connections, fetch the keys, begin the background tasks."""
        self._relay = Relay(self._secret, self._config.connect_timeout_s)
        for model in self._models.values():
            self._services[model.id] = ModelService(
                model,
                self._config,
                self._make_replicas(model),
                self._relay,
                self.metrics,
                lambda model=model: self._fleet.share(model),  # type: ignore[misc]
                self._background,
            )
        status = StatusApi(self._services, self._fleet, self._sync, self.metrics)
        self.measure = status.measure
        admin = AdminApi(self._sync)
        self._open: dict[str, Handler] = {"/healthz": status.healthz, "/readyz": status.readyz}
        self._show_metrics = status.metrics
        self._admin = admin.handle
        try:
            await self._sync.sync()
        except StoreUnavailable as error:
            log.warning("%s; keys come with the next sync", error)
        # What exists now lives as long as the process; short-lived objects per chunk are freed by their reference counts.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        self._loops = [asyncio.create_task(self._sync.run()), asyncio.create_task(self._fleet.run(self._refresh))]

    async def stop(self) -> None:
        """End the background tasks, deliver the last usage, close connections."""
        for loop in self._loops:
            loop.cancel()
        # What is left asks engines about cancelled requests.
        await asyncio.wait([*self._tasks, *self._loops], timeout=STOP_S)
        try:
            await self._sync.sync()
        except StoreUnavailable as error:
            log.warning("%s; the last usage is lost", error)
        self._relay.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._answer(Exchange(scope, receive, send, self._echo))
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _answer(self, exchange: Exchange) -> None:
        try:
            await self._route(exchange)
        except ClientGone:
            return
        except ApiError as error:
            await exchange.fail(error)
        except Exception:  # the error renderer: a bug of ours is one shape for the client and a traceback for us
            log.exception("request %s to %s failed", exchange.request_id, exchange.path)
            await exchange.fail(ApiError(500, f"Internal error; request id {exchange.request_id}.", "internal_error"))

    async def _route(self, exchange: Exchange) -> None:
        path = exchange.path
        if path in self._open:
            await self._open[path](exchange)
            return
        if path == "/metrics":
            await self._metrics(exchange)
            return
        if path.startswith("/admin/"):
            await self._admin(exchange, await self._key(exchange))
            return
        if path == "/v1/models" or path.startswith("/v1/models/"):
            await self._list_models(exchange, await self._key(exchange))
            return
        route = ROUTES.get(path)
        if route is None:
            raise ApiError(404, f"There is no {path[:200]!r} here. See /v1/models and docs/api.md.", "not_found")
        if exchange.method != "POST":
            raise ApiError(405, f"{path} takes POST.", "method_not_allowed", headers={"allow": "POST"})
        with self._tracer.request(exchange) if self._tracer is not None else UNTRACED as trace:
            await self._generate(exchange, route, trace)

    async def _metrics(self, exchange: Exchange) -> None:
        """They tell everybody's traffic: for Prometheus, which has the metrics token, and for administrators."""
        only_get(exchange)
        token = self._metrics_token
        if token is not None and not is_bearer(exchange.headers.get(b"authorization", b""), token):
            check_admin(await self._key(exchange))
        await self._show_metrics(exchange)

    async def _key(self, exchange: Exchange) -> KeyRecord:
        return await self._sync.find_key(secret_of(exchange.headers))

    async def _generate(self, exchange: Exchange, tasks: frozenset[str], trace: RequestTrace | None) -> None:
        """One request for a model, from its key to its settling."""
        began = time.monotonic()
        key = await self._key(exchange)
        limit, timeout_s = int(self._config.max_body_mb * 2**20), self._config.body_timeout_s
        content_type = exchange.headers.get(b"content-type", b"application/json").decode("latin-1")
        if content_type.startswith("multipart/form-data"):
            body = await exchange.read_body(limit, timeout_s)
            fields = await parse_form(body, content_type)
        else:
            body, fields = await exchange.read_json(limit, timeout_s)
            content_type = "application/json"
        asked = model_name(fields)
        model = self._model(key, asked)
        check_choices(fields)
        if model.task not in tasks:
            text = f"The model {asked!r} does not answer {exchange.path}; it is made for {model.task!r}."
            raise ApiError(400, text, "model_not_supported", param="model")
        if asked in model.aliases:
            if content_type != "application/json":
                raise ApiError(400, f"Use the model's own name here, {model.id!r}.", "invalid_value", param="model")
            fields["model"] = model.id
            body = json.dumps(fields).encode()
        self._sync.check_budget(key)
        estimate = estimate_tokens(len(body), fields)
        reservation = await self._sync.quotas.reserve(key, estimate)
        exchange.extra.update(self._sync.quotas.headers(key))

        def settle(outcome: Outcome) -> None:
            reservation.settle(outcome.tokens.total)
            self._record(key, model, outcome.status or exchange.status, outcome, time.monotonic() - began)
            if trace is not None:
                trace.settle(outcome)

        stream = fields.get("stream") is True
        traced = trace.serving(asked, model.id, stream) if trace is not None else {}
        call = Call(exchange.path, body, content_type, fields, stream, float(estimate), traced)
        engine_id = f"{exchange.request_id[:64]}-{uuid.uuid4().hex[:8]}"
        await self._until_gone(exchange, self._services[model.id].serve(exchange, key, call, engine_id, settle))

    async def _until_gone(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        """Do the work; when the client leaves meanwhile, cancel it."""
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            await exchange.wait_disconnect()
            gone = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            await work
        except asyncio.CancelledError:
            if gone and not task.uncancel():
                raise ClientGone from None
            raise
        finally:
            watcher.cancel()

    def _model(self, key: KeyRecord, asked: str) -> ModelConfig:
        model = self._by_name.get(asked)
        if model is None:
            text = f"The model {asked[:200]!r} does not exist. GET /v1/models lists those this key may use."
            raise ApiError(404, text, "model_not_found", param="model")
        check_model(key, (model.id, *model.aliases), asked)
        return model

    def _record(self, key: KeyRecord, model: ModelConfig, status: int, outcome: Outcome, latency_s: float) -> None:
        tokens = outcome.tokens
        cost = cost_usd(model.price, tokens)
        self._sync.usage.add(key.id, model.id, time.time(), tokens, cost, latency_s, outcome.ttft_s, outcome.error)
        kinds = (tokens.prompt, tokens.completion, tokens.cached)
        self.metrics.count(model.id, status or 499, kinds, cost, latency_s, outcome.ttft_s)

    async def _list_models(self, exchange: Exchange, key: KeyRecord) -> None:
        if exchange.method != "GET":
            raise ApiError(405, f"{exchange.path} takes GET.", "method_not_allowed", headers={"allow": "GET"})
        wanted = urllib.parse.unquote(exchange.path.removeprefix("/v1/models").removeprefix("/"))
        if wanted:
            await exchange.reply_json(self._card(wanted, self._model(key, wanted)))
            return
        cards = []
        for name, model in self._by_name.items():
            if not key.models or set(key.models) & {name, model.id, *model.aliases}:
                cards.append(self._card(name, model))
        await exchange.reply_json({"object": "list", "data": cards})

    def _card(self, name: str, model: ModelConfig) -> dict[str, Any]:
        card: dict[str, Any] = {"id": name, "object": "model", "created": self._created, "owned_by": "tidepool"}
        card["task"] = model.task
        if name != model.id:
            card["parent" if ":" in name else "alias_of"] = model.id
        return card

    def _refresh(self) -> None:
        """Replicas came or went."""
        for service in self._services.values():
            service.admission.refresh()

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lifespan(self, receive: Any, send: Any) -> None:
        """For a gateway under a plain ASGI server; Serve starts and stops ours itself."""
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return
