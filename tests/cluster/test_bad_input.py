"""What is wrong with a manifest, a host or a node is one clear line, and then nothing of ours is on any host.

The faults are real: a full file system, a port that a process holds, another release in front of the environment's own. Where
`ray up` would only call `python -m cluster head` or `worker` on the host, that is called here, over SSH too.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lan import Host, Lan
from launcher import CONFIG, ROOT, RUN_DIR, WORKER_TYPE, Launcher, configuration, until

NOBODY = "10.77.0.99"
GCS = 6379
TOKEN = secrets.token_hex(32)
STATE = ("state.json", "ray_token", "endpoint.json")


class Hosts:
    """The hosts and what an operator does on them."""

    def __init__(self, lan: Lan, hosts: dict[str, Host], model_cache: Path) -> None:
        self.lan, self.model_cache = lan, model_cache
        self.head, self.worker, self.outsider = hosts["head"], hosts["worker-1"], hosts["outsider"]

    def give(self, host: Host, token: str = TOKEN, **node: Any) -> None:
        """A configuration and a token, as a manifest's file mounts bring them."""
        config = configuration()
        config["node"] |= node
        home = self.lan.root(host) / "root"
        (home / ".ray").mkdir(exist_ok=True)
        (home / ".ray" / "auth_token").write_text(token)
        (home / ".ray" / "auth_token").chmod(0o600)
        (home / "tidepool.yaml").write_text(yaml.safe_dump(config))

    def cluster(self, host: Host, *words: str, before: str = "", timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """`python -m cluster ...` on a host, by SSH; `before` is a program that runs it, or variables."""
        command, *rest = words
        line = " ".join([before, sys.executable, "-m cluster", command, CONFIG, *rest])
        return self.lan.run(host, f"export TIDEPOOL_MODEL_CACHE={self.model_cache}; cd {ROOT} && {line}", timeout_s)

    def start_worker(self, host: Host, head: Host, before: str = "") -> subprocess.CompletedProcess[str]:
        return self.cluster(host, "worker", "--head", head.address, before=before)

    def other_release(self, host: Host, folder: str) -> None:
        """A torch of another release, as `pip install --target` would leave it there."""
        path = self.lan.root(host) / folder.lstrip("/") / "torch-9.9.9.dist-info"
        path.mkdir(parents=True)
        (path / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")

    def left(self, host: Host) -> list[str]:
        """What of ours is on a host: processes, and what a running cluster has in its run directory."""
        root = self.lan.root(host)
        files = [str(path) for name in STATE if (path := root / RUN_DIR.lstrip("/") / name).exists()]
        return [*self.lan.processes(host).values(), *files]


@pytest.fixture(scope="module")
def on(lan: Lan, hosts: dict[str, Host], model_cache: Path) -> Hosts:
    return Hosts(lan, hosts, model_cache)


@pytest.fixture
def launcher(lan: Lan, hosts: dict[str, Host], model_cache: Path, tmp_path: Path) -> Launcher:
    return Launcher(lan, [hosts["head"], hosts["worker-1"]], tmp_path / "operator", model_cache)


@pytest.fixture
def nothing_left(on: Hosts, lan: Lan) -> Iterator[None]:
    """Nothing of ours on any host, before and after."""
    assert {host.name: on.left(host) for host in lan.hosts if on.left(host)} == {}
    yield
    for host in lan.hosts:
        until(f"nothing is left on {host.name}", lambda host=host: not on.left(host), 10.0, lambda host=host: str(on.left(host)))


@pytest.fixture(scope="module")
def running(on: Hosts) -> Iterator[Host]:
    """A head that is up."""
    on.give(on.head)
    try:
        done = on.cluster(on.head, "head")
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(on.left(on.head)) > 3, "what is left of a cluster is not seen"
        yield on.head
    finally:
        done = on.cluster(on.head, "leave")
        assert done.returncode == 0, done.stdout + done.stderr
        until("the head is gone", lambda: not on.left(on.head), 10.0, lambda: str(on.left(on.head)))


def line_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command said on its standard error."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.mark.usefixtures("nothing_left")
def test_a_manifest_with_an_unknown_key(launcher: Launcher) -> None:
    launcher.change = lambda manifest: manifest.update(idle_timeout_minuts=5)
    line = line_of(launcher.up())
    assert "idle_timeout_minuts" in line and str(launcher.manifest) in line


@pytest.mark.usefixtures("nothing_left")
def test_a_worker_that_nobody_reaches_by_ssh(launcher: Launcher) -> None:
    def add(manifest: dict[str, Any]) -> None:
        manifest["provider"]["hosts"].append({"address": NOBODY, "node_type": WORKER_TYPE})

    launcher.change = add
    line = line_of(launcher.up())
    assert f"{NOBODY} ({WORKER_TYPE}) does not answer SSH" in line and "take it out of provider.hosts" in line


@pytest.mark.usefixtures("nothing_left")
def test_a_full_disk(on: Hosts) -> None:
    on.give(on.head)
    made = on.lan.run(on.head, f"mkdir -p {RUN_DIR} && mount -t tmpfs -o size=64m tmpfs {RUN_DIR}")
    assert made.returncode == 0, made.stderr
    try:
        line = line_of(on.cluster(on.head, "head"))
        assert f"run_dir: 64 MiB free on the disk of {RUN_DIR}, 1024 MiB wanted; make room" in line
        assert list((on.lan.root(on.head) / RUN_DIR.lstrip("/")).iterdir()) == []
    finally:
        on.lan.run(on.head, f"umount {RUN_DIR} && rmdir {RUN_DIR}")


@pytest.mark.usefixtures("nothing_left")
def test_a_port_in_use_on_the_head(on: Hosts) -> None:
    on.give(on.head)
    hold = f"import socket, subprocess, sys; s = socket.create_server((str(), {GCS})); sys.exit(subprocess.call(sys.argv[1:]))"
    line = line_of(on.cluster(on.head, "head", before=f"{sys.executable} -c '{hold}'"))
    assert f"node.gcs_port: 0.0.0.0:{GCS} is in use by another process; stop it, or choose another with --set" in line
    assert not (on.lan.root(on.head) / RUN_DIR.lstrip("/")).exists()


@pytest.mark.usefixtures("nothing_left")
def test_a_worker_whose_head_is_not_there(on: Hosts) -> None:
    on.give(on.worker)
    line = line_of(on.start_worker(on.worker, on.outsider))
    assert f"no head answers at {on.outsider.address}:{GCS}" in line and "start the head first" in line


def test_a_wrong_token_on_a_worker(on: Hosts, running: Host) -> None:
    on.give(on.worker, token="0" * 64)
    line = line_of(on.start_worker(on.worker, running))
    assert f"the head at {running.address}:{GCS} refuses this node's token; give every node the head's ~/.ray/auth_token" in line
    assert on.left(on.worker) == []


def test_another_release_on_a_worker(on: Hosts, running: Host) -> None:
    on.give(on.worker)
    on.other_release(on.worker, "/srv/other")
    line = line_of(on.start_worker(on.worker, running, before="PYTHONPATH=/srv/other"))
    assert "versions: this node has torch 9.9.9, the head has 2.13.0; install torch==2.13.0 or run setup.sh" in line
    assert on.left(on.worker) == []
    seen = on.cluster(on.worker, "doctor", "--head", running.address, before="PYTHONPATH=/srv/other")
    assert seen.returncode == 1 and "torch 9.9.9" in seen.stdout, seen.stdout + seen.stderr


def test_the_doctor_looks_at_every_node(on: Hosts, running: Host) -> None:
    """A worker that joined in order, and into whose environment somebody then installed another release."""
    on.give(on.worker)
    done = on.start_worker(on.worker, running, before="PYTHONPATH=/srv/later")
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        well = on.cluster(running, "doctor")
        assert well.returncode == 0 and "2 node(s): 0 error(s)" in well.stdout, well.stdout + well.stderr
        on.other_release(on.worker, "/srv/later")
        ill = on.cluster(running, "doctor")
    finally:
        left = on.cluster(on.worker, "leave")
    print(f"\n{ill.stdout}")
    assert ill.returncode == 1, ill.stdout + ill.stderr
    of_head, of_worker = ill.stdout.split(f"{on.worker.address} (worker ")
    assert of_head.startswith(f"{running.address} (head):") and "  error" not in of_head
    (line,) = [line for line in of_worker.splitlines() if line.startswith("  error")]
    assert "this node has torch 9.9.9, the head has 2.13.0; install torch==2.13.0" in line
    assert left.returncode == 0 and on.left(on.worker) == [], left.stdout + left.stderr
