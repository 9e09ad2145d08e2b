"""How the other fronts are installed and started: vllm-router, LiteLLM proxy, Ray Serve LLM. Called by `arms`.

The two routers get a virtual environment each below `run/bench/venvs`, made at first use, because their requirements fight
with ours. Ray Serve LLM runs from our own environment in a Ray cluster of its own, on ports and in a folder apart from ours,
started by Ray's own commands. Ray workers run at nice 15 by default; here they get 0, which makes them the harder rivals.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.endpoint import Model
from cluster.errors import LaunchError

VLLM_ROUTER = "vllm-router==0.1.17"
LITELLM = "litellm[proxy]==1.106.2"


@dataclass(frozen=True)
class Rival:
    """A router to start: its command, its address with `/v1`, the key its clients send."""

    argv: list[str]
    url: str
    key: str = ""
    env: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RayServe:
    """Two commands, a Ray head and an application, and where the application answers."""

    head: list[str]
    app: list[str]
    url: str
    gcs_port: int
    env: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)


def venv_program(bench_dir: Path, name: str, requirement: str, program: str) -> Path:
    """The path of `program` in the rival's own virtual environment, which is made when it is missing.

    Raises:
        LaunchError: the package cannot be installed.
    """
    folder = bench_dir / "venvs" / name
    done = folder / "installed.txt"
    if done.exists() and done.read_text() == requirement:
        return folder / "bin" / program
    print(f"installing {requirement} into {folder}", file=sys.stderr, flush=True)
    beside = Path(sys.executable).parent / "uv"
    uv = str(beside) if beside.exists() else shutil.which("uv")
    python = str(folder / "bin" / "python")
    if uv:
        steps = [
            [uv, "venv", "-q", "--clear", "-p", sys.executable, str(folder)],
            [uv, "pip", "install", "-q", "-p", python, requirement],
        ]
    else:
        steps = [[sys.executable, "-m", "venv", "--clear", str(folder)], [python, "-m", "pip", "install", "-q", requirement]]
    for step in steps:
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        if result.returncode:
            raise LaunchError(f"{requirement} cannot be installed into {folder}:\n{result.stderr[-800:]}")
    done.write_text(requirement)
    return folder / "bin" / program


def vllm_router(bench_dir: Path, engine: str, _model: str, port: int) -> Rival:
    """vllm-router before one engine; it takes `port` and the next one (metrics)."""
    program = venv_program(bench_dir, "vllm-router", VLLM_ROUTER, "vllm-router")
    argv = [str(program), "--host", "127.0.0.1", "--port", str(port), "--worker-urls", engine, "--policy", "round_robin"]
    argv += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(port + 1), "--log-level", "warning"]
    return Rival(argv, f"http://127.0.0.1:{port}/v1", notes={"version": VLLM_ROUTER, "policy": "round_robin"})


def litellm(bench_dir: Path, engine: str, model: str, port: int) -> Rival:
    """LiteLLM's proxy with one worker, a master key and no database."""
    program = venv_program(bench_dir, "litellm", LITELLM, "litellm")
    config = bench_dir / "litellm.json"  # JSON is YAML
    entry = {
        "model_name": model,
        "litellm_params": {"model": f"hosted_vllm/{model}", "api_base": f"{engine}/v1", "api_key": "none"},
    }
    config.write_text(json.dumps({"model_list": [entry], "litellm_settings": {"drop_params": False, "telemetry": False}}))
    argv = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    env = {"LITELLM_MASTER_KEY": "sk-bench", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    return Rival(argv, f"http://127.0.0.1:{port}/v1", "sk-bench", env, {"version": LITELLM})


ROUTERS = {"vllm-router": vllm_router, "litellm": litellm}


def ray_serve(bench_dir: Path, model: Model, port: int, *, direct: bool) -> RayServe:
    """Ray Serve LLM's `build_openai_app`, default ingress or direct streaming; it takes `port` and the eleven after it,
    and the 200 from `port` + 300 for workers."""
    env = model.env | {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    name = "ray-direct" if direct else "ray-llm"
    if direct:
        env |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}
        env |= {"RAY_SERVE_HAPROXY_STATS_PORT": str(port + 10), "RAY_SERVE_HAPROXY_METRICS_PORT": str(port + 11)}
    ports = {"port": 1, "dashboard-agent-listen-port": 2, "dashboard-agent-grpc-port": 3, "runtime-env-agent-port": 4}
    ports |= {
        "metrics-export-port": 5,
        "node-manager-port": 6,
        "object-manager-port": 7,
        "ray-client-server-port": 8,
        "dashboard-port": 9,
    }
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    head += [f"--{flag}={port + offset}" for flag, offset in ports.items()]
    head += [f"--min-worker-port={port + 300}", f"--max-worker-port={port + 499}", "--include-dashboard=false", "--num-cpus=16"]
    head += [f"--temp-dir=/tmp/tidepool-{name}-{port}", "--object-store-memory=200000000", "--disable-usage-stats"]
    kwargs = dict(model.engine_kwargs)
    llm: dict[str, Any] = {
        "model_loading_config": {"model_id": model.id, "model_source": str(kwargs.pop("model"))},
        "engine_kwargs": kwargs,
        "runtime_env": {"env_vars": model.env},
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    }
    if "VLLM_CPU_KVCACHE_SPACE" in model.env:
        llm |= {"accelerator_config": {"kind": "cpu"}, "placement_group_config": {"bundles": [{"CPU": 1}]}}
    app = {"name": name, "route_prefix": "/", "import_path": "ray.serve.llm:build_openai_app", "args": {"llm_configs": [llm]}}
    file = bench_dir / f"{name}.json"
    file.write_text(json.dumps({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}))
    run = [sys.executable, "-m", "ray.serve.scripts", "run", f"--address=127.0.0.1:{port + 1}", str(file)]
    return RayServe(head, run, f"http://127.0.0.1:{port}/v1", port + 1, env, {"niceness": "0"})
