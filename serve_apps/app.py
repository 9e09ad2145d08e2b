"""The wiring: from a configuration to Serve applications, and from a Serve application's arguments to running objects.

`serve_config` gives the mapping that `serve deploy`, KubeRay's RayService and our `up` take as it is: one application for the
gateway at `/`, one per model under `/engines/<id>`. `engine` and `gateway` are the import paths in it; Serve calls them on the
cluster. Nothing secret is in that mapping: a store's URL, which may hold a password, travels in TIDEPOOL_STORE_URL.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import Config, GatewayConfig, ModelConfig, TracingConfig
from serve_apps import tracing

if TYPE_CHECKING:
    from ray import serve

GATEWAY_MAX_ONGOING = 100_000
GATEWAY_HEALTH_PERIOD_S = 2.0
STORE_URL = "TIDEPOOL_STORE_URL"
HEAD = "node:__internal_head__"  # a resource that Ray gives to the head alone
ELSEWHERE = os.path.expanduser("~/.tidepool")


def serve_config(config: Config) -> dict[str, Any]:
    """Serve's declarative configuration, as plain data."""
    placed = [tracing.for_engine(_placed(model), config.tracing) for model in config.models]
    models = [model.model_dump(mode="json", exclude_defaults=True) for model in placed]
    gateway_args = {
        "gateway": config.gateway.model_dump(mode="json", exclude_defaults=True),
        "tracing": config.tracing.model_dump(mode="json", exclude_defaults=True),
        "models": models,
    }
    applications: list[dict[str, Any]] = [
        {"name": "gateway", "route_prefix": "/", "import_path": "serve_apps.app:gateway", "args": gateway_args}
    ]
    applications += [
        {"name": model.app_name, "route_prefix": model.path, "import_path": "serve_apps.app:engine", "args": {"model": plain}}
        for model, plain in zip(config.models, copy.deepcopy(models), strict=True)
    ]
    return {
        "proxy_location": {"every_node": "EveryNode", "head_only": "HeadOnly"}[config.node.proxies],
        "http_options": {"host": config.node.host, "port": config.node.port, "keep_alive_timeout_s": 75},
        "logging_config": {"encoding": "TEXT", "enable_access_log": False},
        "applications": applications,
    }


def _placed(model: ModelConfig) -> ModelConfig:
    """The model with local folders as absolute paths: replicas run in another working directory."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if Path(path).is_dir() else path

    adapters = {name: absolute(path) for name, path in model.adapters.items()}
    return model.model_copy(update={"model_source": absolute(model.source), "adapters": adapters})


def engine(args: dict[str, Any]) -> serve.Application:
    """Serve's builder of one model's application. `args`: `{"model": ModelConfig}`."""
    from serve_apps.engine import build

    return build(ModelConfig.model_validate(args["model"]))


def gateway(args: dict[str, Any]) -> serve.Application:
    """Serve's builder of the gateway. `args`: `{"gateway": GatewayConfig, "tracing": TracingConfig, "models": [ModelConfig]}`."""
    from ray import serve

    config = GatewayConfig.model_validate(args.get("gateway", {}))
    longest = max(ModelConfig.model_validate(model).max_generation_s for model in args["models"])
    from serve_apps.fleet import GATEWAY_DEPLOYMENT

    deployment = serve.deployment(
        serve.ingress()(GatewayServer),
        name=GATEWAY_DEPLOYMENT,
        num_replicas=config.replicas,
        max_ongoing_requests=GATEWAY_MAX_ONGOING,
        health_check_period_s=GATEWAY_HEALTH_PERIOD_S,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=longest + config.admission.hold_s + 30.0,
        # On the head: on a GPU host it would keep that from going when its models have gone.
        ray_actor_options={"num_cpus": 0.1, "resources": {HEAD: 0.001}},
    )
    return deployment.bind(args)


class GatewayServer:
    """The gateway as a Serve replica."""

    def __init__(self, args: dict[str, Any]) -> None:
        self._args = args

    async def __serve_build_asgi_app__(self) -> Any:
        import asyncio

        from cluster import metrics_guard, store_actor
        from cluster.database import default_url
        from serve_apps import exporter
        from serve_apps.fleet import Fleet, serve_counts
        from serve_apps.gateway import Gateway
        from serve_apps.replicas import RayReplicas
        from serve_apps.sync import ActorStore

        url = os.environ.get(STORE_URL) or default_url(ELSEWHERE)
        actor = await asyncio.to_thread(store_actor.connect, url)
        models = [ModelConfig.model_validate(model) for model in self._args["models"]]
        self._gateway = Gateway(
            config=GatewayConfig.model_validate(self._args.get("gateway", {})),
            models=models,
            replicas=RayReplicas,
            store=ActorStore(actor),
            secret=await actor.internal_secret.remote(),
            fleet=Fleet(serve_counts(models)),
            echo_request_id=False,
            tracer=tracing.tracer(TracingConfig.model_validate(self._args.get("tracing", {}))),
            metrics_token=metrics_guard.token_here(),
        )
        await self._gateway.start()
        mirror = exporter.gateway_mirror(self._gateway.metrics.registry)
        self._export = asyncio.gather(exporter.run(self._gateway.measure, mirror.push), exporter.watch_nodes())
        return self._gateway

    async def __del__(self) -> None:
        gateway = getattr(self, "_gateway", None)
        if gateway is not None:
            self._export.cancel()
            await gateway.stop()
