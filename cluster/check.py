"""`python -m cluster check`: what a configuration would run on this machine and what is wrong with it, without starting anything.

Errors are what would certainly fail (a missing folder, a busy port, an unknown engine argument); warnings are what this machine
lacks but another may have (a GPU). The configuration itself was validated when it was read. The names of vLLM's arguments come
from vLLM, whose import takes seconds: `fast` leaves that out.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import embedded, preflight, processes, tls
from cluster.config import EMBEDDED_PREFIX, Config, ModelConfig
from cluster.session import DEFAULT_CPUS, session_of

Say = Callable[[str], None]


def check(config: Config, out: Say, *, fast: bool = False) -> int:
    """Print the plan and the findings. Returns 0, or 2 when there is an error."""
    session = session_of(config)
    gpus = visible_gpus()
    for line in plan(config):
        out(line)
    errors = [line for model in config.models for line in model_errors(model)]
    warnings = machine_warnings(config, gpus)
    if processes.marked(session.run_dir):
        warnings.append(f"a cluster of {session.run_dir} is running now; its ports and memory were not checked")
    else:
        errors += preflight.problems(config, session.run_dir)
    if not fast:
        out("reading the names of vLLM's arguments (some seconds; --fast leaves this out)")
        errors += unknown_arguments(config, engine_arguments())
    for line in warnings:
        out(f"warning: {line}")
    for line in errors:
        out(f"error: {line}")
    out(f"{len(errors)} errors, {len(warnings)} warnings")
    return 2 if errors else 0


def plan(config: Config) -> list[str]:
    """One line per thing that would run."""
    node = config.node
    ports = ", ".join(f"{name.removeprefix('node.')} {port}" for name, (_, port) in preflight.addresses(node).items())
    scheme = "http" if node.tls is None else "https"
    gpus_told = "as found" if node.num_gpus is None else f"{node.num_gpus:g}"
    lines = [
        f"endpoint   {scheme}://{node.host}:{node.port}/v1, {config.gateway.replicas} gateway replica(s)",
        f"ray        {node.num_cpus or DEFAULT_CPUS:g} logical CPUs, GPUs {gpus_told}; {ports}",
    ]
    for model in config.models:
        scaling, gpus = model.autoscaling, gpus_per_replica(model)
        each = f"{gpus} GPU(s)" if gpus else f"{model.cpus_per_replica:g} CPU(s)"
        lines.append(f"model      {model.id} from {model.source} ({model.task}) at {model.path}")
        lines.append(
            f"           {scaling.min_replicas} to {scaling.max_replicas} replica(s) of {each}, {model.slots} requests each"
        )
        lines += [f"           adapter {model.id}:{name} from {folder}" for name, folder in model.adapters.items()]
    return lines


def gpus_per_replica(model: ModelConfig) -> int:
    """GPUs that one replica takes: tensor times pipeline parallel, none on CPU."""
    if model.device == "cpu":
        return 0
    sizes = (model.engine_kwargs.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
    product = 1
    for size in sizes:
        product *= size if isinstance(size, int) else 1
    return product


def model_errors(model: ModelConfig) -> list[str]:
    """What is wrong with one model on this machine."""
    where = f"models: {model.id}"
    lines = []
    if model.source.startswith(EMBEDDED_PREFIX):
        if model.source not in embedded.SOURCES:
            lines.append(f"{where}: model_source: {model.source!r} is not built in; there are {' and '.join(embedded.SOURCES)}")
    elif _is_local(model.source) and not (Path(model.source).expanduser() / "config.json").is_file():
        lines.append(f"{where}: model_source: {model.source} is not a folder with a config.json")
    for name, folder in model.adapters.items():
        if "://" not in folder and not (Path(folder).expanduser() / "adapter_config.json").is_file():
            lines.append(f"{where}: adapters.{name}: {folder} is not a folder with an adapter_config.json")
    if model.adapters and model.engine_kwargs.get("enable_lora") is False:
        lines.append(f"{where}: adapters need engine_kwargs.enable_lora: true")
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = model.engine_kwargs.get(name, 1)
        if not isinstance(size, int) or size < 1:
            lines.append(f"{where}: engine_kwargs.{name}: must be a whole number from 1, found {size!r}")
    return lines


def machine_warnings(config: Config, gpus: int) -> list[str]:
    """What this machine lacks."""
    lines = []
    declared = gpus if config.node.num_gpus is None else int(config.node.num_gpus)
    for model in config.models:
        need = gpus_per_replica(model)
        if need > declared:
            lines.append(f"models: {model.id}: a replica takes {need} GPU(s), this machine has {declared}")
    busy = sum(gpus_per_replica(model) * model.autoscaling.min_replicas for model in config.models)
    if busy > declared and not lines:
        lines.append(f"the smallest number of replicas takes {busy} GPU(s) together, this machine has {declared}")
    if not preflight.is_loopback(config.node.host):
        open_ = "opens the endpoint and Ray's ports to the network"
        plain = ", the endpoint without TLS; set node.tls, or put something with TLS in front" if config.node.tls is None else ""
        lines.append(f"node.host: {config.node.host} {open_}{plain}")
    lines += [str(finding) for finding in tls.findings(config.node.tls) if finding.level == "warning"]
    return lines


def unknown_arguments(config: Config, known: set[str]) -> list[str]:
    """Names in `engine_kwargs` that vLLM does not have, with the nearest that it has."""
    import difflib

    lines = []
    for model in config.models:
        for name in model.engine_kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                lines.append(f"models: {model.id}: engine_kwargs.{name}: vLLM has no such argument{hint}")
    return lines


def engine_arguments() -> set[str]:
    """Every argument of vLLM's engine and of its OpenAI server. Imports vLLM.

    The server's have no public name; they are the dataclass behind `vllm serve --help`.
    """
    import dataclasses

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    fields: list[Any] = [*dataclasses.fields(AsyncEngineArgs), *dataclasses.fields(FrontendArgs)]
    return {field.name for field in fields}


def visible_gpus() -> int:
    """GPUs of this machine, by nvidia-smi; 0 without it."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([part for part in chosen.split(",") if part.strip() not in ("", "-1")])
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0


def _is_local(source: str) -> bool:
    return source.startswith(("/", "./", "../", "~"))
