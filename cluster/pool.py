"""The hosts of a pool as a manifest lists them, and how one is reached by SSH. Nothing is started here.

`hosts.HostPool` takes and gives back such hosts; `ray_up` and `manifest` look at them before anything is started.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

SSH_ANSWER_S = 10
MODULE = "cluster.hosts.HostPool"  # a manifest's provider.module


@dataclass(frozen=True)
class PoolHost:
    """One host of the pool, as `provider.hosts` names it.

    Args:
        address: Name or address, the same for the operator and for the nodes among each other.
        node_type: One of `available_node_types`.
        power_on, power_off: Commands run where the provider runs: before the first SSH, and after the last.
    """

    address: str
    node_type: str
    power_on: str = ""
    power_off: str = ""


def pool(provider: Mapping[str, Any]) -> list[PoolHost]:
    """The hosts of a provider section.

    Raises:
        ConfigError: one line per mistake.
    """
    found, wrong = [], []
    known = set(PoolHost.__dataclass_fields__)
    hosts = provider.get("hosts")
    if not isinstance(hosts, list) or not hosts:
        raise ConfigError("provider.hosts: list the machines, each {address: ..., node_type: ...}")
    for number, entry in enumerate(hosts):
        where = f"provider.hosts.{number}"
        if not isinstance(entry, dict):
            wrong.append(f"{where}: write {{address: ..., node_type: ...}}, found {entry!r}")
            continue
        wrong += [f"{where}.{name}: unknown key; known are {', '.join(sorted(known))}" for name in sorted(set(entry) - known)]
        wrong += [f"{where}.{name}: is missing" for name in ("address", "node_type") if not entry.get(name)]
        if not wrong:
            found.append(PoolHost(**{name: str(value) for name, value in entry.items()}))
    for address in {host.address for host in found}:
        if sum(host.address == address for host in found) > 1:
            wrong.append(f"provider.hosts: {address} is listed twice")
    if not provider.get("stop"):
        wrong.append(
            "provider.stop: is missing; write the command that ends what runs on a host, such as `python -m cluster leave`"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def ssh_command(provider: Mapping[str, Any], address: str, command: str) -> list[str]:
    """The words that run a command line on a host as Ray's own launcher does: same user, same key, host keys not kept."""
    auth = provider.get("auth", {})
    key = auth.get("ssh_private_key")
    words = [
        "ssh",
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "LogLevel=ERROR",
        "-o",
        "BatchMode=yes",
    ]
    words += ["-o", f"ConnectTimeout={SSH_ANSWER_S}"]
    if key:
        words += ["-o", "IdentitiesOnly=yes", "-i", str(Path(key).expanduser())]
    return [*words, f"{auth['ssh_user']}@{address}", command]


def unreachable(provider: Mapping[str, Any], address: str) -> str | None:
    """Why a host does not answer SSH, in one line, or None when it does."""
    try:
        done = subprocess.run(
            ssh_command(provider, address, "true"),
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SSH_ANSWER_S + 10, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {SSH_ANSWER_S + 10} s"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"ssh ends with status {done.returncode}")
