"""The doctor on a cluster that is up, and what a head's GCS says to who asks it, with the right token and with a wrong one."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from conftest import CONFIG, Endpoint, cluster_command

from cluster import doctor, gcs, machine, preflight, versions
from cluster.config import Config
from cluster.errors import LaunchError
from cluster.preflight import free_port


@dataclasses.dataclass(frozen=True)
class Head:
    """The shared cluster's head: its settings, its GCS and its token."""

    options: list[str]
    gcs_port: int
    token: str

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gcs_port}"


@pytest.fixture(scope="module")
def head(endpoint: Endpoint) -> Head:
    """Read from what the cluster left in its run directory, so that any cluster will do."""
    state = json.loads((endpoint.run_dir / "state.json").read_text())
    names = preflight.addresses(Config.model_validate({"models": [{"id": "m"}]}).node)
    ports = {name: port for name, (_, port) in zip(names, state["addresses"], strict=True)}
    pairs = [f"{name}={port}" for name, port in ports.items()]
    options = [part for pair in pairs for part in ("--set", pair)]
    token = (endpoint.run_dir / "ray_token").read_text()
    return Head([*options, "--run-dir", str(endpoint.run_dir)], ports["node.gcs_port"], token)


def test_a_head_tells_its_versions(head: Head) -> None:
    before = gcs.head_versions(head.address, head.token, patience_s=0.0)
    assert before["ray"] == versions.installed()["ray"] and before["python"] == versions.installed()["python"]
    gcs.publish_versions(head.address, head.token)
    assert gcs.head_versions(head.address, head.token) == versions.installed()


@pytest.mark.parametrize("ask", [gcs.publish_versions, gcs.head_versions, gcs.head_metrics_port])
def test_a_wrong_token_is_refused_in_one_line(head: Head, ask) -> None:
    with pytest.raises(LaunchError, match="refuses this node's token; give every node") as refused:
        ask(head.address, "0" * 64)
    assert "\n" not in str(refused.value)
    assert head.token not in str(refused.value) and "0" * 64 not in str(refused.value)


def test_no_head_is_one_line_within_seconds(head: Head) -> None:
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"no head answers at 127\.0\.0\.1:.*; start the head first") as silent:
        gcs.head_versions(f"127.0.0.1:{free_port()}", head.token)
    assert time.monotonic() - began < 8.0 and "\n" not in str(silent.value)


def test_a_workers_clock_is_compared_with_the_heads(head: Head) -> None:
    port = gcs.head_metrics_port(head.address, head.token)
    assert port is not None
    offset = machine.clock_offset("127.0.0.1", port)
    assert offset is not None and abs(offset) < machine.CLOCK_WARNING_S


def test_what_a_worker_learns_of_its_head(head: Head, tmp_path) -> None:
    token = tmp_path / "token"
    token.write_text(head.token)
    known, wrong = doctor.ask("127.0.0.1", head.gcs_port, token)
    assert wrong == [] and known is not None and known.clock_port and known.versions["ray"] == versions.installed()["ray"]
    token.write_text("0" * 64)
    known, (finding,) = doctor.ask("127.0.0.1", head.gcs_port, token)
    assert known is None and finding.level == "error" and finding.fix.startswith("give every node the head's")


def test_the_command_looks_at_every_node(head: Head) -> None:
    done = cluster_command("doctor", str(CONFIG), *head.options, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "127.0.0.1 (head):" and lines[-1].startswith("1 node(s): 0 error(s)")
    where = {line.split()[1] for line in lines[1:-1]}
    assert where >= {"versions", "token", "ports", "shared", "run_dir", "/tmp", "open", "gpu"}, done.stdout
    assert f"{head.gcs_port} in use by this cluster" in done.stdout


def test_the_command_names_what_is_wrong_on_a_node(head: Head) -> None:
    """A configuration that wants what this machine cannot have, asked of the cluster that runs."""
    done = cluster_command("doctor", str(CONFIG), *head.options, "--set", "node.object_store_mb=1000000000", timeout_s=120)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  error")]
    assert "shared memory" in line and "node.object_store_mb wants 1000000000" in line and "--shm-size" in line
