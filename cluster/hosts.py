"""Own machines as nodes: a pool of hosts with types, each taken over SSH when Ray wants one and given back when it is idle.

`provider: {type: external, module: cluster.hosts.HostPool}` in a manifest makes Ray's launcher and autoscaler call it: on the
operator's machine for the head, on the head for workers. Ray's own `local` provider knows one kind of host without resources,
so that a demand for a GPU never starts one. A type's resources and labels stand in `available_node_types`, as on a cloud.
Which hosts are taken, and their tags, is a small file (`~/.ray/tidepool-<cluster>.json`) that goes with the last of them. A
host that does not answer SSH is passed over for a while. What runs on a host is begun by the manifest's start commands and
ended by `provider.stop`.
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import secrets
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider

from cluster.errors import LaunchError
from cluster.pool import PoolHost, pool, ssh_command, unreachable

log = logging.getLogger(__name__)
NODE_KIND, NODE_TYPE = "ray-node-type", "ray-user-node-type"  # Ray's tags
BOOTSTRAP_KEY = "~/ray_bootstrap_key.pem"  # where `ray up` puts the operator's key on the head
STATE_FOLDER = Path("~/.ray")
STOP_S, POWER_S = 90.0, 120.0
SSH_FAILED = 255  # ssh's own status, whatever the command
BOOT_S = 600.0
AVOID_S = 120.0


class HostPool(NodeProvider):  # type: ignore[misc]  # ray is not typed
    """The pool as Ray's node provider. Safe for several threads and processes.

    A node's id is its host's address and a part that is new each time the host is taken: Ray's autoscaler takes an id that comes
    back at once for the node that it is just ending.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._hosts = {host.address: host for host in pool(provider_config)}
        self._file = (STATE_FOLDER / f"tidepool-{cluster_name}.json").expanduser()
        self._on_head = f"{STATE_FOLDER}/{self._file.name}"  # the same file in another home
        self._lock = threading.RLock()
        self._avoid: dict[str, float] = {}

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Lets the provider know how to log in."""
        config = copy.deepcopy(cluster_config)
        config["provider"]["disable_launch_config_check"] = True  # else Ray finds each new host "outdated" and ends it
        config["provider"]["auth"] = dict(config["auth"])
        return config

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """What the head is told: the key where `ray up` puts it, and that the head is one of the taken hosts."""
        provider = cluster_config["provider"]
        if "ssh_private_key" in provider["auth"]:
            provider["auth"]["ssh_private_key"] = BOOTSTRAP_KEY
        heads = self.non_terminated_nodes({NODE_KIND: "head"})
        provider["head"] = {node_id: self.node_tags(node_id) for node_id in heads}
        return cluster_config

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        return [node_id for node_id, tags in self._taken().items() if tag_filters.items() <= tags.items()]

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """What `ray down` ends. The operator's machine knows the head only, and the head knows which workers it has taken."""
        heads = self.non_terminated_nodes({NODE_KIND: "head"})
        if tag_filters.get(NODE_KIND) == "head":
            return sorted(heads)
        for address in heads:
            self._learn_from(address)
        return sorted(set(self._taken()) - set(heads))

    def is_running(self, node_id: str) -> bool:
        return node_id in self._taken()

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        return dict(self._taken().get(node_id, {}))

    def external_ip(self, node_id: str) -> str:
        return address_of(node_id)

    def internal_ip(self, node_id: str) -> str:
        return address_of(node_id)

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
            node_id = self._take(node_type, tags)
            if node_id is None:
                why = "; ".join(missing) or "all of this type are taken"
                raise NodeLaunchException("HostsMissing", f"no free host of type {node_type}: {why}", None)
            host = self._hosts[address_of(node_id)]
            reason = self._wake(host)
            if reason is None:
                taken[node_id] = {}
                continue
            missing.append(f"{host.address}: {reason}")
            log.warning("host %s of type %s is passed over for %g s: %s", host.address, node_type, AVOID_S, reason)
            with self._change() as now:
                now.pop(node_id, None)
                self._avoid[host.address] = time.monotonic() + AVOID_S
        return taken

    def terminate_node(self, node_id: str) -> None:
        """Ends what runs on a host, powers it off where there is a command for it, and gives it back.

        Raises:
            LaunchError: the host answers and the command fails; the host stays taken.
        """
        if not self.is_running(node_id):
            return  # given back, and maybe taken again under another id
        host = self._hosts[address_of(node_id)]
        self._stop(host)
        if self.node_tags(node_id).get(NODE_KIND) == "head":
            self._learn_from(node_id)  # it may have taken another one meanwhile; now it takes no more
        self._ssh(host.address, f"rm -f ~/ray_bootstrap_config.yaml {BOOTSTRAP_KEY} {self._on_head}")
        if host.power_off:
            failed = _run(host.power_off, POWER_S)
            if failed is not None:
                log.warning("%s stays on: power_off %s", host.address, failed)
        with self._change() as taken:
            taken.pop(node_id, None)

    def terminate_nodes(self, node_ids: list[str]) -> None:
        """The head first, for it could start others again; then all at once. Every one is tried."""
        heads = set(self.non_terminated_nodes({NODE_KIND: "head"}))
        for together in ([node for node in node_ids if node in heads], [node for node in node_ids if node not in heads]):
            with ThreadPoolExecutor(max_workers=32) as threads:
                futures = [threads.submit(self.terminate_node, node_id) for node_id in together]
            for future in futures:
                future.result()

    def _stop(self, host: PoolHost) -> None:
        """Runs `provider.stop` on a host; one that was never started has nothing to stop, and one that is off neither."""
        stop = self.provider_config["stop"]
        done = self._ssh(host.address, f"test ! -e ~/.ray/auth_token || {{ {stop}; }}")
        if done.returncode == SSH_FAILED:
            log.warning("%s does not answer, nothing to stop there: %s", host.address, done.stderr.strip()[-300:])
        elif done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise LaunchError(f"{host.address}: `{stop}` failed: {said[-1] if said else 'no message'}")

    def _learn_from(self, head: str) -> None:
        """Note the nodes that a head has made; all hosts where it does not say."""
        done = self._ssh(address_of(head), f"cat {self._on_head} 2>/dev/null || echo {{}}")
        try:
            said: dict[str, dict[str, str]] = json.loads(done.stdout)
        except ValueError:
            log.warning("the head %s does not say which hosts it has taken, so all are looked at", head)
            said = {new_id(address): {NODE_KIND: "worker"} for address in self._hosts if address != address_of(head)}
        with self._change() as taken:
            taken |= {node_id: tags for node_id, tags in said.items() if node_id not in taken}

    def _ssh(self, address: str, command: str) -> subprocess.CompletedProcess[str]:
        words = ssh_command(self.provider_config, address, f"bash --login -c {shlex.quote(command)}")
        try:
            return subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=STOP_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"{address}: did not end within {STOP_S:g} s: {command}") from error

    def _take(self, node_type: str, tags: dict[str, str]) -> str | None:
        with self._change() as taken:
            busy = {address_of(node_id) for node_id in taken}
            for host in self._hosts.values():
                if (
                    host.node_type == node_type
                    and host.address not in busy
                    and self._avoid.get(host.address, 0.0) < time.monotonic()
                ):
                    node_id = new_id(host.address)
                    taken[node_id] = dict(tags)
                    return node_id
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
        return {node_id: tags for node_id, tags in {**told, **found}.items() if address_of(node_id) in self._hosts}

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


def new_id(address: str) -> str:
    """An id for a node on the host at this address."""
    return f"{address}-{secrets.token_hex(3)}"


def address_of(node_id: str) -> str:
    """The address of the host behind a node's id."""
    return node_id.rpartition("-")[0]


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
