"""What must be true of a node, in one order for all: versions, token, ports, memory, disk, route, GPU driver, clock.

`before_head` and `before_worker` look at this node before Ray starts on it (`node` calls them and stops at an error). `doctor` is
the command: on the head of a running cluster it looks at every node (through `checkup`, a driver of its own), else at this one.
Nothing is changed. The checks themselves are in `versions`, `machine`, `preflight`, `tls` and `gcs`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster import gcs, listening, machine, preflight, tls, versions
from cluster.config import Config
from cluster.errors import LaunchError
from cluster.finding import Finding
from cluster.session import Session, environment, read_json, session_of
from cluster.steps import run_step

Say = Callable[[str], None]
# `alone`: a head that only this machine reaches, as `up` on one machine makes it.
Kind = Literal["alone", "head", "worker"]
WORKER_PORTS = ("node.port", "node.stats_port", "node.proxy_metrics_port")
# Ray's autoscaler tells a node's start commands what its type has.
RESOURCES = "RAY_OVERRIDE_RESOURCES"


@dataclass(frozen=True)
class Head:
    """What a worker is compared with.

    Args:
        host: The head's address.
        versions: What is installed there, as `versions.installed` gives it.
        clock_port: Where it speaks HTTP, and so tells the time; None when nobody knows.
    """

    host: str
    versions: Mapping[str, str]
    clock_port: int | None = None


def before_head(config: Config, session: Session) -> list[Finding]:
    """Look at this node before it becomes a head."""
    return checks(config, session.run_dir, "head", token=machine.TOKEN.expanduser(), gpus=planned_gpus())


def before_worker(config: Config, session: Session, head_host: str) -> list[Finding]:
    """Look at this node before it joins the head at `head_host`."""
    token = machine.TOKEN.expanduser()
    head, wrong = ask(head_host, config.node.gcs_port, token)
    return [*wrong, *checks(config, session.run_dir, "worker", token=token, head=head, gpus=planned_gpus())]


def doctor(config: Config, out: Say, head: str | None = None) -> int:
    """Print one line per check and node. Returns 0, or 1 when there is an error.

    Args:
        head: Compare this node with the head at this address, as a worker.

    Raises:
        LaunchError: a cluster runs here, but does not let its nodes be asked.
    """
    session = session_of(config)
    ours = listening.ports(session.run_dir)
    if head is None and config.node.gcs_port in ours:
        return tell(_everywhere(config, session), out)
    return tell({"this node": _here(config, session, head, ours)}, out)


def checks(
    config: Config,
    run_dir: Path,
    kind: Kind,
    *,
    token: Path | None = None,
    head: Head | None = None,
    gpus: float | None = None,
    ours: Collection[int] = (),
) -> list[Finding]:
    """Everything about the node that this process runs on.

    Args:
        token: The file that must hold the cluster's token; None where none is needed.
        head: The head, when this node is a worker and the head answers.
        gpus: GPUs that Ray counts on this node; None when nobody has said.
        ours: Ports that the cluster listens on here already; without any, the node is about to start.
    """
    its = None if head is None else head.versions
    findings = versions.findings(versions.installed(), versions.tested(), its, training=config.train is not None)
    if token is not None:
        findings.append(machine.token_file(token))
    findings += _ports(config, kind, ours)
    if config.node.tls is not None and (kind != "worker" or config.node.proxies == "every_node"):
        findings += tls.findings(config.node.tls) or [Finding("ok", config.node.tls.certificate, "certificate")]
    findings.append(machine.shared_memory(config.node.object_store_mb, running=bool(ours)))
    if not ours:
        # A node that runs has taken its part.
        free = Finding("ok", f"{preflight.available_memory_mb()} MiB available", "memory")
        findings += preflight.memory(config.node) or [free]
    findings += [*machine.disk(run_dir), machine.open_files()]
    if kind != "alone":
        findings += machine.route(None if head is None else head.host)
    findings.append(_gpu(config, gpus))
    if head is not None:
        offset = machine.clock_offset(head.host, head.clock_port) if head.clock_port else None
        findings.append(machine.clock(offset))
    return findings


def ask(host: str, port: int, token: Path) -> tuple[Head | None, list[Finding]]:
    """What the head's GCS says of the head, or what is wrong with asking it."""
    address = f"{host}:{port}"
    try:
        secret = token.read_text().strip()
        return Head(host, gcs.head_versions(address, secret), gcs.head_metrics_port(address, secret)), []
    except OSError:
        # The check of the token's file says it.
        return None, []
    except LaunchError as error:
        what, _, fix = str(error).partition("; ")
        return None, [Finding("error", what, "head", fix)]


def planned_gpus(environ: Mapping[str, str] | None = None) -> float | None:
    """GPUs of this node's type in the manifest, as the autoscaler tells them; None when it started nothing here."""
    told = (os.environ if environ is None else environ).get(RESOURCES)
    try:
        return None if not told else float(json.loads(told).get("GPU", 0))
    except (ValueError, AttributeError):
        return None


def tell(nodes: Mapping[str, Sequence[Finding]], out: Say) -> int:
    """Print what was found, node by node, and how much of it is bad. Returns 0, or 1 when there is an error."""
    for name, findings in nodes.items():
        out(f"{name}:")
        for finding in findings:
            fix = f"; {finding.fix}" if finding.fix else ""
            out(f"  {finding.level:<8} {finding.where:<14} {finding.what}{fix}")
    levels = [finding.level for findings in nodes.values() for finding in findings]
    out(f"{len(nodes)} node(s): {levels.count('error')} error(s), {levels.count('warning')} warning(s)")
    return 1 if "error" in levels else 0


def kind_of(config: Config) -> Kind:
    """What the node with the GCS is."""
    return "alone" if preflight.is_loopback(config.node.host) else "head"


def _here(config: Config, session: Session, head_host: str | None, ours: Collection[int]) -> list[Finding]:
    """This node: a worker of `head_host`, a worker that runs, or a head that could be started."""
    kind: Kind = "worker" if head_host is not None or ours else kind_of(config)
    token = session.token if ours else None if kind == "alone" else machine.TOKEN.expanduser()
    head: Head | None = None
    wrong: list[Finding] = []
    if head_host is not None:
        head, wrong = ask(head_host, config.node.gcs_port, token or machine.TOKEN.expanduser())
    elif kind == "worker":
        wrong = [Finding("warning", "not compared with this node", "head", "run doctor on the head, or give --head ADDRESS")]
    return [*wrong, *checks(config, session.run_dir, kind, token=token, head=head, gpus=planned_gpus(), ours=ours)]


def _everywhere(config: Config, session: Session) -> dict[str, list[Finding]]:
    """Every node of the cluster whose head runs here, by its address."""
    environ = environment(config, session, str((read_json(session.state) or {}).get("run_id", "")))
    asked = {
        "address": f"127.0.0.1:{config.node.gcs_port}",
        "config": config.model_dump_json(),
        "versions": versions.installed(),
    }
    command = [sys.executable, "-m", "cluster.checkup"]
    text = run_step(command, environ, session, "the cluster does not let its nodes be asked", json.dumps(asked))
    answer = json.loads(text.strip().splitlines()[-1])
    return {name: [Finding(**finding) for finding in findings] for name, findings in answer.items()}


def _ports(config: Config, kind: Kind, ours: Collection[int]) -> list[Finding]:
    node = config.node
    names = [*preflight.addresses(node)] if kind != "worker" else [*WORKER_PORTS] if node.proxies == "every_node" else []
    wrong = preflight.ports(node, names, ours)
    ports = {name: preflight.addresses(node)[name][1] for name in names}
    shown = ", ".join(f"{port} {'in use by this cluster' if port in ours else 'free'}" for port in ports.values())
    return wrong or [Finding("ok", shown or "none needed", "ports")]


def _gpu(config: Config, gpus: float | None) -> Finding:
    declared = config.node.num_gpus if gpus is None else gpus
    asks = any(model.device == "gpu" for model in config.models)
    asks = asks or (config.train is not None and config.train.scale.device == "gpu")
    return machine.gpu(asks and declared != 0, "error" if declared else "warning")
