"""Own machines as nodes: a pool of hosts with types, each taken over SSH when Ray wants one and given back when it is idle.

`provider: {type: external, module: cluster.hosts.HostPool}` in a manifest makes Ray's autoscaler call it, on the operator's machine (for
the head) and on the head (for workers). Ray's own `local` provider knows one kind of host without resources, so that a demand for a
GPU never starts one. A type's resources and labels are `available_node_types`', as on a cloud. Which hosts are taken, and their tags,
is a small file (`~/.ray/tidepool-<cluster>.json`) that goes with the last host. A host that does not answer SSH is passed over for a while.
What runs on a host is begun by the manifest's start commands and ended by `provider.stop`.
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider

from cluster.errors import ConfigError, LaunchError

log = logging.getLogger(__name__)
NODE_KIND, NODE_TYPE = "ray-node-type", "ray-user-node-type"  # Ray's tags
BOOTSTRAP_KEY = "~/ray_bootstrap_key.pem"  # where `ray up` puts the operator's key on the head
STATE_FOLDER = Path("~/.ray")
SSH_ANSWER_S = 10
STOP_S, POWER_S = 90.0, 120.0
BOOT_S = 600.0
AVOID_S = 120.0
# Ray asks for these of an `external` provider, whose defaults it does not know.
DEFAULTS: dict[str, Any] = {
    "cluster_synced_files": [],
    "rsync_exclude": [],
    "rsync_filter": [],
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    "docker": {},
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
}


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
        wrong.append("provider.stop: is missing; it is the command that ends what runs on a host, such as `python -m cluster leave`")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def ssh_command(provider: Mapping[str, Any], address: str, command: str) -> list[str]:
    """The words that run a command line on a host as Ray's own launcher does: same user, same key, host keys not kept."""
    auth = provider.get("auth", {})
    key = auth.get("ssh_private_key")
    words = ["ssh", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes"]
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


class HostPool(NodeProvider):  # type: ignore[misc]  # ray is not typed
    """The pool as Ray's node provider; a node's id is its host's address. Safe for several threads and processes."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._hosts = {host.address: host for host in pool(provider_config)}
        self._file = (STATE_FOLDER / f"tidepool-{cluster_name}.json").expanduser()
        self._lock = threading.RLock()
        self._avoid: dict[str, float] = {}
        self._torn_down: set[str] = set()

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Fills in what Ray expects, and lets the provider know how to log in."""
        config = copy.deepcopy(cluster_config)
        for name, value in DEFAULTS.items():
            config.setdefault(name, copy.deepcopy(value))
        config["provider"]["disable_launch_config_check"] = True  # else Ray finds each new host "outdated" and ends it
        config["provider"]["auth"] = dict(config["auth"])
        return config

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """What the head is told: the key where `ray up` puts it, and that the head is one of the taken hosts."""
        provider = cluster_config["provider"]
        if "ssh_private_key" in provider["auth"]:
            provider["auth"]["ssh_private_key"] = BOOTSTRAP_KEY
        heads = self.non_terminated_nodes({NODE_KIND: "head"})
        provider["head"] = {address: self.node_tags(address) for address in heads}
        return cluster_config

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        return [address for address, tags in self._taken().items() if tag_filters.items() <= tags.items()]

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """Every host that may run something of the cluster: the operator's machine does not know which the head has taken."""
        kind = tag_filters.get(NODE_KIND)
        heads = set(self.non_terminated_nodes({NODE_KIND: "head"}))
        known = heads if kind == "head" else set(self._hosts) - heads - self._never_taken(heads)
        return sorted(known - self._torn_down)

    def is_running(self, node_id: str) -> bool:
        return node_id in self._taken()

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        return dict(self._taken().get(node_id, {}))

    def external_ip(self, node_id: str) -> str:
        return node_id

    def internal_ip(self, node_id: str) -> str:
        return node_id

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._change() as taken:
            if node_id in taken:
                taken[node_id].update(tags)

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Takes `count` free hosts of the type in `tags`, powers them on, and looks whether they answer.

        Raises:
            NodeLaunchException: there are not enough; those that were found stay taken and are nodes.
        """
        node_type = tags[NODE_TYPE]
        missing: list[str] = []
        taken: dict[str, Any] = {}
        while len(taken) < count:
            host = self._take(node_type, tags)
            if host is None:
                why = "; ".join(missing) or "all of this type are taken"
                raise NodeLaunchException("HostsMissing", f"no free host of type {node_type}: {why}", None)
            reason = self._wake(host)
            if reason is None:
                taken[host.address] = {}
                continue
            missing.append(f"{host.address}: {reason}")
            log.warning("host %s of type %s is passed over for %g s: %s", host.address, node_type, AVOID_S, reason)
            with self._change() as now:
                now.pop(host.address, None)
                self._avoid[host.address] = time.monotonic() + AVOID_S
        return taken

    def terminate_node(self, node_id: str) -> None:
        """Ends what runs on a host, powers it off where there is a command for it, and gives it back.

        Raises:
            LaunchError: the host answers and the command fails; the host stays taken.
        """
        host = self._hosts.get(node_id)
        if host is None:
            return
        gone = f"rm -f ~/ray_bootstrap_config.yaml {BOOTSTRAP_KEY} {STATE_FOLDER}/{self._file.name}"
        self._stop(host, f"{self.provider_config['stop']}; status=$?; {gone}; exit $status")
        if host.power_off:
            _run(host.power_off, POWER_S)
        with self._change() as taken:
            taken.pop(node_id, None)
            self._torn_down.add(node_id)

    def terminate_nodes(self, node_ids: list[str]) -> None:
        """All at once; every one is tried."""
        with ThreadPoolExecutor(max_workers=min(32, len(node_ids) or 1)) as threads:
            futures = [threads.submit(self.terminate_node, node_id) for node_id in node_ids]
        for future in futures:
            future.result()

    def _stop(self, host: PoolHost, command: str) -> None:
        words = ssh_command(self.provider_config, host.address, f"bash --login -c {shlex.quote(command)}")
        try:
            done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=STOP_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"{host.address}: `{self.provider_config['stop']}` did not end within {STOP_S:g} s") from error
        if done.returncode == 255:  # ssh's own: a host that is off has nothing to stop
            log.warning("%s does not answer, nothing to stop there: %s", host.address, done.stderr.strip()[-300:])
        elif done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise LaunchError(f"{host.address}: `{self.provider_config['stop']}` failed: {said[-1] if said else 'no message'}")

    def _take(self, node_type: str, tags: dict[str, str]) -> PoolHost | None:
        with self._change() as taken:
            for host in self._hosts.values():
                if host.node_type == node_type and host.address not in taken and self._avoid.get(host.address, 0.0) < time.monotonic():
                    taken[host.address] = dict(tags)
                    self._torn_down.discard(host.address)
                    return host
        return None

    def _wake(self, host: PoolHost) -> str | None:
        """Powers a host on and waits for SSH; why it does not answer, or None."""
        if not host.power_on:
            return unreachable(self.provider_config, host.address)
        failed = _run(host.power_on, POWER_S)
        if failed is not None:
            return f"power_on {failed}"
        deadline = time.monotonic() + BOOT_S
        while (reason := unreachable(self.provider_config, host.address)) is not None and time.monotonic() < deadline:
            time.sleep(1.0)
        return reason

    def _never_taken(self, heads: set[str]) -> set[str]:
        """Hosts of the head's type besides the head, which the autoscaler never takes."""
        types = {self._hosts[address].node_type for address in heads if address in self._hosts}
        return {host.address for host in self._hosts.values() if host.node_type in types}

    def _taken(self) -> dict[str, dict[str, str]]:
        with self._lock:
            return self._read()

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            found: dict[str, dict[str, str]] = json.loads(self._file.read_text())
        except FileNotFoundError:
            found = {}
        # The head is told of itself by its manifest: it was taken by the operator's machine.
        told: dict[str, dict[str, str]] = self.provider_config.get("head", {})
        return {address: tags for address, tags in {**told, **found}.items() if address in self._hosts}

    @contextmanager
    def _change(self) -> Iterator[dict[str, dict[str, str]]]:
        """The taken hosts with their tags, to be changed; written when the block ends well."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, _locked(self._file.parent):
            taken = self._read()
            yield taken
            if taken:
                fresh = self._file.with_suffix(".new")
                fresh.write_text(json.dumps(taken))
                fresh.replace(self._file)
            else:
                self._file.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder's own lock: no file stays behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _run(command: str, limit_s: float) -> str | None:
    """A command line on this machine; why it failed, or None."""
    try:
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {limit_s:g} s: {command}"
    said: Sequence[str] = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return None if done.returncode == 0 else f"failed ({said[-1] if said else done.returncode}): {command}"
