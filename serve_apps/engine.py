"""One model: vLLM's own OpenAI server inside a Ray Serve replica, closed to everyone but the gateway.

`EngineServer` is `ray.serve.llm`'s server with three things added around vLLM's ASGI app: the guard (no route without the
cluster's secret), the meter (tokens of each request, told to the gateway) and the stall watchdog (requests running, no token
for too long: the replica is unhealthy and Serve replaces it). Batching, paged KV, prefix cache, LoRA, tools and structured
output are vLLM's; none of it is here.

`build(model)` turns a ModelConfig into a Serve application. Called by `app.py`; runs on the node of the replica.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import signal
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_llm_deployment, build_openai_app
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.request_router import PrefixCacheAffinityRouter

from cluster import store_actor
from cluster.config import EMBEDDED_PREFIX, ModelConfig
from cluster.errors import ApiError
from serve_apps import exporter, metering
from serve_apps.engine_load import EngineLoad
from serve_apps.lifeline import CPU_NICE, NICE_VARIABLE
from serve_apps.serve_policy import scaling_config
from serve_apps.wire import QUEUED_HEADER, SECRET_HEADER, USAGE_COMMENT, USAGE_HEADER, USAGE_PATH, send_error

log = logging.getLogger("ray.serve")
HEALTH_PERIOD_S = 2.0
CANCELLED_KEPT = 4096
SPARE_ONGOING = 64
OURS = "tidepool"


class EngineServer(LLMServer):  # type: ignore[misc]  # ray is not typed
    """`LLMServer` with the guard, the meter and the watchdog around it.

    Args:
        llm_config: Made by `engine_config`; made again here, on the replica's node, where an `embedded:` source is a folder.
    """

    async def __init__(self, llm_config: LLMConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._model = ModelConfig.model_validate(llm_config.experimental_configs[OURS])
        self._meter = metering.Meter()
        self._load = EngineLoad(self._meter)
        self._client: Any = None
        source = self._model.source
        if source.startswith(EMBEDDED_PREFIX):
            from cluster.embedded import build as build_embedded
            from cluster.embedded import cache_dir

            source = str(await asyncio.to_thread(build_embedded, source, cache_dir()))
        config = engine_config(self._model, source)
        if await asyncio.to_thread(os.path.isdir, source):
            # Nothing to download: the task that would look for it on this node costs an import of vLLM.
            config.get_or_create_callback().ctx.run_init_node = False
        await super().__init__(config)

    async def __serve_build_asgi_app__(self) -> Any:
        app = await super().__serve_build_asgi_app__()
        self._client = app.state.engine_client
        metering.attach(self._client, self._meter)
        speed = exporter.Speed(self._model.id, lambda: self._meter.tokens)
        self._export = asyncio.create_task(exporter.run(exporter.engine_mirror(self._model.id).push, speed.push))
        return Guard(app, await store_actor.attach().internal_secret.remote(), self._load.heard)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for this every few seconds and brings it to the replica policy (`serve_policy.py`)."""
        return self._load.figures()

    async def check_health(self) -> None:
        stalled = self._meter.stalled_for(time.monotonic())
        if stalled > self._model.stall_timeout_s:
            _leave(f"{self._meter.running} requests are running and no token came for {stalled:.0f} s")
        if self._client is not None and self._client.errored:
            _leave("the engine core is dead")
        await super().check_health()


def _leave(why: str) -> None:
    """End this replica now, so that its replacement starts now.

    An engine that is dead or stuck does not come back inside this process. Told by an exception, Serve would ask three times and
    then wait for requests that will never end. The lifeline takes the engine's processes along, stopped ones too.
    """
    log.error("this replica leaves: %s", why)
    logging.shutdown()
    os.kill(os.getpid(), signal.SIGKILL)


class Guard:
    """Pure-ASGI wrapper of vLLM's app: the secret, the request's token count, and nothing about bodies.

    A response tells its tokens to the gateway in a header (`USAGE_HEADER`) when it is one piece, and in a last SSE comment
    (`USAGE_COMMENT`) when it is a stream; those of a request that was cancelled are asked for at `USAGE_PATH/<request id>`.
    """

    def __init__(self, app: Any, secret: str, heard: Callable[[bytes], None]) -> None:
        self._app = app
        self._heard = heard
        self._secret = secret.encode()
        self._cancelled: OrderedDict[str, metering.Tally] = OrderedDict()
        self._open: dict[str, metering.Tally] = {}

    def __getattr__(self, name: str) -> Any:
        """Serve reads `routes`, `state` and the like of the app it serves."""
        return getattr(self._app, name)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(SECRET_HEADER, b""), self._secret):
            if scope["type"] == "websocket":  # vLLM has such routes too
                await send({"type": "websocket.close", "code": 1008})
                return
            await send_error(send, ApiError(403, "This address is internal. Use the endpoint's /v1 routes.", "forbidden"))
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(USAGE_PATH):
            await self._tell(path.removeprefix(USAGE_PATH), send)
            return
        if (queued := headers.get(QUEUED_HEADER)) is not None:
            self._heard(queued)
        await self._count(headers.get(b"x-request-id", b"").decode("latin-1"), scope, receive, send)

    async def _count(self, request_id: str, scope: Any, receive: Any, send: Any) -> None:
        tally = metering.Tally()
        self._open[request_id] = tally
        token = metering.current.set(tally)
        streaming = done = left = False

        async def counted_send(message: Any) -> None:
            nonlocal streaming, done
            if message["type"] == "http.response.start":
                streaming = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in message["headers"])
                if not streaming:
                    message["headers"] = [*message["headers"], (USAGE_HEADER, tally.line().encode())]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                done = True
                if streaming:
                    line = message.get("body", b"") + USAGE_COMMENT + tally.line().encode() + b"\n\n"
                    message = {"type": "http.response.body", "body": line, "more_body": False}
            await send(message)

        async def watched_receive() -> Any:
            nonlocal left
            message = await receive()
            left = left or (message["type"] == "http.disconnect" and not done)
            return message

        try:
            await self._app(scope, watched_receive, counted_send)
        finally:
            metering.current.reset(token)
            self._open.pop(request_id, None)
            if left or not done:
                self._cancelled[request_id] = tally
                while len(self._cancelled) > CANCELLED_KEPT:
                    self._cancelled.popitem(last=False)

    async def _tell(self, request_id: str, send: Any) -> None:
        """Answer what a cancelled request had used; 409 while it is still being stopped, 404 when it is not known."""
        tally = self._cancelled.pop(request_id, None)
        if tally is None:
            running = request_id in self._open
            status, what = (409, "still_running") if running else (404, "not_found")
            await send_error(send, ApiError(status, "No count of a cancelled request with this id.", what))
            return
        headers = [(b"content-type", b"text/plain"), (USAGE_HEADER, tally.line().encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def engine_config(model: ModelConfig, source: str) -> LLMConfig:
    """The `ray.serve.llm` configuration of a model, with defaults that scale, push back and let generations finish.

    `source` is what vLLM loads: a Hugging Face repository, a folder, or a bucket's address.
    """
    kwargs = dict(model.engine_kwargs)
    kwargs.setdefault("disable_uvicorn_access_log", True)
    kwargs.setdefault("enable_prompt_tokens_details", True)
    if model.adapters:
        kwargs["enable_lora"] = True
        kwargs["lora_modules"] = [{"name": f"{model.id}:{name}", "path": path} for name, path in model.adapters.items()]
    deployment: dict[str, Any] = {
        # Gateways keep to the slots; probes, metrics and questions about cancelled requests come on top and must not wait.
        "max_ongoing_requests": model.slots + SPARE_ONGOING,
        # The gateway is the queue; a replica that gets more than its slots for a moment holds them instead of refusing.
        "max_queued_requests": -1,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        # A rollout starts the new replica before it stops the old one.
        "max_surge_percent": 100 if model.surge else 0,
        "graceful_shutdown_timeout_s": model.max_generation_s + 30.0,
        "autoscaling_config": scaling_config(model),
        "ray_actor_options": {"num_cpus": model.cpus_per_replica},
    }
    if model.routing == "prefix_affinity":
        deployment["request_router_config"] = RequestRouterConfig(request_router_class=PrefixCacheAffinityRouter)
    options: dict[str, Any] = {}
    gives_way = {NICE_VARIABLE: str(CPU_NICE)} if model.device == "cpu" else {}
    # vLLM makes gloo groups even where one process talks to nobody else. Their ports ask for no secret: they stay on the host.
    stays_inside = {} if _several_processes(model) else {"GLOO_SOCKET_IFNAME": "lo"}
    if model.device == "cpu":
        options["accelerator_config"] = {"kind": "cpu"}
        options["placement_group_config"] = {"bundles": [{"CPU": 0.01}]}
    elif model.accelerator_type:
        options["accelerator_type"] = model.accelerator_type
    return LLMConfig(
        model_loading_config={"model_id": model.id, "model_source": source},
        engine_kwargs=kwargs,
        deployment_config=deployment,
        runtime_env={"env_vars": {**gives_way, **stays_inside, **model.env}},
        log_engine_metrics=False,  # see exporter.py
        server_cls=EngineServer,
        experimental_configs={OURS: model.model_dump(mode="json")},
        **options,
    )


def _several_processes(model: ModelConfig) -> bool:
    """Whether parts of one replica's engine talk to each other, maybe between hosts."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    return any(model.engine_kwargs.get(name, 1) != 1 for name in sizes)


def build(model: ModelConfig) -> serve.Application:
    """The Serve application of one model, to be deployed under `model.path`.

    The gateway picks replicas itself (`replicas.py`), so the application is the engine's deployment alone. Serve accepts a
    router of its own kind (prefix affinity) on such a deployment only beside its request-router process, hence the other way.
    """
    config = engine_config(model, model.source)
    if model.routing == "prefix_affinity":
        return build_openai_app({"llm_configs": [config]})
    return build_llm_deployment(config, name_prefix="EngineServer:", deployment_cls=serve.ingress()(EngineServer))
