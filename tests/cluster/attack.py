"""From a host without token and key: every open port of every node of a cluster is tried, and nothing may be had.

What listens is known twice: by `ss` inside each host, and by the intruder's own scan of all ports, which finds what the first
missed. `run` gives an entry per port; a `breach` is something that ran or was read. Used by `test_ray_up.py`, from whose entries
`ports.write` makes the table of docs/security.md, and by hand:

    python tests/cluster/attack.py <address> ...       addresses of your own cluster only, from a machine outside it
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lan import Host, Lan

INTRUDER = Path(__file__).with_name("intruder.py")
LIMIT_S = 150.0
# The first that fits a command line names who listens.
KINDS = (
    (r"gcs_server", "gcs_server"),
    (r"raylet/raylet\b", "raylet"),
    (r"dashboard/agent\.py|ray::DashboardAgent", "dashboard agent"),
    (r"runtime_env/agent|ray::RuntimeEnvAgent", "runtime environment agent"),
    (r"dashboard/dashboard\.py|ray-dashboard", "dashboard"),
    (r"autoscaler/.*monitor\.py", "autoscaler"),
    (r"ray\.util\.client\.server", "Ray client server"),
    (r"haproxy\b.* -f |/haproxy -", "haproxy"),
    (r"ray::ServeReplica:gateway", "gateway replica"),
    (r"ray::ServeReplica:engine", "engine replica"),
    (r"ray::ProxyActor", "Serve's fallback proxy"),
    (r"VLLM::", "vLLM engine"),
    (r"ray::StoreActor", "store"),
    (r"ray::(ServeController|HAProxyManager)", "Serve's own actors"),
    (r"ray::", "Ray worker"),
    (r"sshd", "sshd"),
)


@dataclass(frozen=True)
class Entry:
    """One port of one host, and what a stranger got from it.

    Args:
        bound: The address it listens on, as `ss` says it; empty when only the scan found it.
        reached: Whether the stranger could connect.
    """

    host: str
    port: int
    kind: str
    bound: str
    reached: bool
    speaks: str
    answer: str
    breach: str

    def __str__(self) -> str:
        where = f"{self.host} {self.bound or '?'}:{self.port} {self.kind}"
        return f"{where}, {self.speaks}: {self.answer}" + (f"; BREACH: {self.breach}" if self.breach else "")


def run(lan: Lan, outsider: Host, hosts: Sequence[Host], model: str) -> list[Entry]:
    """Attack `hosts` from `outsider`.

    Args:
        model: The id of a model that the cluster serves, for the paths of its engine.

    Raises:
        AssertionError: the attack itself could not be made, or something ran what the intruder sent.
    """
    canary = f"/tmp/owned-{uuid.uuid4().hex[:8]}"
    listening = {host.name: _listening(lan, host) for host in hosts}
    with ThreadPoolExecutor(len(hosts)) as pool:
        found = [item for part in pool.map(lambda host: _attack(lan, outsider, host, model, canary), hosts) for item in part]
    owned = [host.name for host in [*hosts, outsider] if (lan.root(host) / canary.lstrip("/")).exists()]
    names = {host.address: host.name for host in hosts}
    entries = []
    for item in found:
        host = names[item["address"]]
        kind, bound = listening[host].pop(item["port"], ("unknown", ""))
        entries.append(Entry(host, item["port"], kind, bound, True, item["speaks"], item["answer"], item["breach"]))
    for host, rest in listening.items():
        # Not taken by the scan: bound to the loopback, or it began or ended meanwhile.
        entries += [Entry(host, port, kind, bound, False, "-", "not reached", "") for port, (kind, bound) in rest.items()]
    assert not owned, f"what the intruder sent was run on {owned}: {[str(entry) for entry in entries]}"
    return sorted(entries, key=lambda entry: (entry.host, entry.kind, entry.port))


def _attack(lan: Lan, outsider: Host, host: Host, model: str, canary: str) -> list[dict[str, str]]:
    asked = json.dumps({"addresses": [host.address], "model": model, "canary": canary})
    # Nothing of this process's environment, so no token that a test has in it.
    clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", sys.executable, str(INTRUDER)]
    done = lan.enter(outsider, *clean, timeout_s=LIMIT_S, text=asked)
    assert done.returncode == 0, f"the intruder failed: {done.stderr[-2000:]}"
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def _listening(lan: Lan, host: Host) -> dict[int, tuple[str, str]]:
    """By port: who listens on a host and on which address; the widest where there are several."""
    done = lan.enter(host, "ss", "-H", "-ltnp")
    assert done.returncode == 0, done.stderr
    found: dict[int, tuple[str, str]] = {}
    for line in done.stdout.splitlines():
        bound, _, port = line.split()[3].rpartition(":")
        pid = re.search(r"pid=(\d+)", line)
        command = (lan.read(host, f"/proc/{pid[1]}/cmdline") or "").replace("\0", " ") if pid else ""
        if int(port) not in found or found[int(port)][1].startswith("127."):
            found[int(port)] = (kind_of(command), bound)
    return found


def kind_of(command: str) -> str:
    """Who a command line is."""
    return next((kind for pattern, kind in KINDS if re.search(pattern, command)), "other")


def main() -> None:
    asked = json.dumps({"addresses": sys.argv[1:], "model": "tidepool-chat", "canary": f"/tmp/owned-{uuid.uuid4().hex[:8]}"})
    done = subprocess.run([sys.executable, str(INTRUDER)], input=asked, capture_output=True, text=True, check=True)
    for item in json.loads(done.stdout):
        breach = f"; BREACH: {item['breach']}" if item["breach"] else ""
        print(f"{item['address']}:{item['port']} {item['speaks']}: {item['answer']}{breach}")


if __name__ == "__main__":
    main()
