"""What must be true of this machine before anything is started: free ports, memory, disk, a folder that can be written.

Each finding is one line that says what is wrong and what to do; without one all is well. Nothing is changed and nothing started.
`launch.up`, `doctor` and `check` are the callers.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Collection
from pathlib import Path

from cluster import tls
from cluster.config import Config, NodeConfig
from cluster.finding import Finding

MIN_FREE_DISK_MB = 1024


def problems(config: Config, run_dir: Path) -> list[str]:
    """Everything that would stop `up`, one line each; empty when all is well."""
    certificate = [finding for finding in tls.findings(config.node.tls) if finding.level == "error"]
    return [str(finding) for finding in (*ports(config.node), *certificate, *memory(config.node), *folder(run_dir))]


def addresses(node: NodeConfig) -> dict[str, tuple[str, int]]:
    """Every fixed address the cluster listens on, by its name in the configuration."""
    inner = "127.0.0.1" if is_loopback(node.host) else "0.0.0.0"
    return {
        "node.port": (node.host, node.port),
        "node.gcs_port": (inner, node.gcs_port),
        "node.dashboard_port": ("127.0.0.1", node.dashboard_port),
        "node.stats_port": ("127.0.0.1", node.stats_port),
        "node.proxy_metrics_port": ("127.0.0.1", node.proxy_metrics_port),
    }


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine only."""
    return host in ("localhost", "::1") or host.startswith("127.")


def busy(host: str, port: int) -> str | None:
    """Why an address cannot be bound, or None when it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose old connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is in use by another process"
            return f"cannot be bound: {error.strerror or error}"
    return None


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def available_memory_mb() -> int:
    """Memory the kernel could give out now, MiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def ports(node: NodeConfig, only: Collection[str] | None = None, ours: Collection[int] = ()) -> list[Finding]:
    """What is wrong with the ports.

    Args:
        only: Those that this kind of node listens on, by their names in the configuration; default all.
        ours: Ports on which this cluster listens already.
    """
    taken: dict[int, str] = {}
    found = []
    for name, (host, port) in addresses(node).items():
        if only is not None and name not in only:
            continue
        if port in taken:
            found.append(Finding("error", f"port {port} is also {taken[port]}", name, "give each its own"))
            continue
        taken[port] = name
        reason = None if port in ours else busy(host, port)
        if reason is not None:
            fix = f"stop it, or choose another with --set {name}=<port>"
            found.append(Finding("error", f"{host}:{port} {reason}", name, fix))
    first, last = node.replica_ports
    if first < 1024 or first >= last or last > 65535:
        what = f"[{first}, {last}] is not a range of ports from 1024 to 65535"
        found.append(Finding("error", what, "node.replica_ports", "give a first and a last one"))
    for port, name in taken.items():
        if first <= port <= last:
            found.append(Finding("error", f"port {port} lies in node.replica_ports", name, "move one of them"))
    return found


def memory(node: NodeConfig) -> list[Finding]:
    """Too little memory."""
    free = available_memory_mb()
    if free >= node.min_free_memory_mb:
        return []
    what = f"{free} MiB available, {node.min_free_memory_mb} MiB wanted"
    return [Finding("error", what, "memory", "free some or lower node.min_free_memory_mb")]


def folder(run_dir: Path) -> list[Finding]:
    """A run directory that cannot be written, or has too little room."""
    spot = existing(run_dir)
    if not spot.is_dir() or not os.access(spot, os.W_OK | os.X_OK):
        return [Finding("error", f"{run_dir} cannot be written", "run_dir", "choose another with --run-dir")]
    return room("run_dir", run_dir, MIN_FREE_DISK_MB)


def room(where: str, folder: Path, wanted_mb: int) -> list[Finding]:
    """Too little room on a folder's disk."""
    free = shutil.disk_usage(existing(folder)).free // 2**20
    if free >= wanted_mb:
        return []
    what = f"{free} MiB free on the disk of {folder}, {wanted_mb} MiB wanted"
    return [Finding("error", what, where, "make room, or mount a larger disk there")]


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path
