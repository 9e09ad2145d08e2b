"""What must be true of this machine before anything is started: free ports, memory, disk, a folder that can be written.

Each finding is one line that says what is wrong and what to do. Nothing is changed and nothing is started. `launch.up` and
`check` are the callers.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path

from cluster.config import Config, NodeConfig

MIN_FREE_DISK_MB = 1024


def problems(config: Config, run_dir: Path) -> list[str]:
    """Everything that would stop `up`, one line each; empty when all is well."""
    return [*_ports(config.node), *_memory(config.node), *_folder(run_dir)]


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


def _ports(node: NodeConfig) -> list[str]:
    taken: dict[int, str] = {}
    lines = []
    for name, (host, port) in addresses(node).items():
        if port in taken:
            lines.append(f"{name}: port {port} is also {taken[port]}; give each its own")
            continue
        taken[port] = name
        reason = busy(host, port)
        if reason is not None:
            lines.append(f"{name}: {host}:{port} {reason}; stop it, or choose another with --set {name}=<port>")
    first, last = node.replica_ports
    if first < 1024 or first >= last or last > 65535:
        lines.append(f"node.replica_ports: [{first}, {last}] is not a range of ports from 1024 to 65535")
    lines += [f"{name}: port {port} lies in node.replica_ports" for port, name in taken.items() if first <= port <= last]
    return lines


def _memory(node: NodeConfig) -> list[str]:
    free = available_memory_mb()
    if free >= node.min_free_memory_mb:
        return []
    return [f"memory: {free} MiB available, {node.min_free_memory_mb} MiB wanted; free some or lower node.min_free_memory_mb"]


def _folder(run_dir: Path) -> list[str]:
    spot = run_dir
    while not spot.exists():
        spot = spot.parent
    if not spot.is_dir() or not os.access(spot, os.W_OK | os.X_OK):
        return [f"run_dir: {run_dir} cannot be written; choose another with --run-dir"]
    free = shutil.disk_usage(spot).free // 2**20
    if free < MIN_FREE_DISK_MB:
        return [f"run_dir: {free} MiB free on the disk of {run_dir}, {MIN_FREE_DISK_MB} MiB wanted"]
    return []
