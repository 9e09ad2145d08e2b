"""The doctor's order of checks, what each kind of node is asked, and what is printed; without Ray."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from cluster import doctor, versions
from cluster.__main__ import main
from cluster.config import Config, parse
from cluster.finding import Finding
from cluster.preflight import free_port

PORTS = ("port", "gcs_port", "dashboard_port", "stats_port", "proxy_metrics_port")


def config_with(run_dir: Path, device: str = "cpu", **node) -> Config:
    settings = {**{name: free_port() for name in PORTS}, "min_free_memory_mb": 0, "replica_ports": [20000, 20100], **node}
    return parse({"run_dir": str(run_dir), "node": settings, "models": [{"id": "m", "device": device}]})


def errors(findings: list[Finding]) -> list[str]:
    """What is wrong; a container that runs these tests may have little shared memory."""
    return [str(finding) for finding in findings if finding.level == "error" and finding.where != "shared memory"]


def test_every_check_of_the_list_is_made(tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    head = doctor.Head("127.0.0.1", versions.installed())
    found = doctor.checks(config_with(tmp_path), tmp_path, "worker", token=token, head=head)
    places = {finding.where for finding in found}
    assert places >= {
        "versions",
        "token",
        "ports",
        "shared memory",
        "memory",
        "run_dir",
        "/tmp",
        "open files",
        "route",
        "gpu",
        "clock",
    }
    assert errors(found) == []
    assert "secret" not in str(found)


@pytest.mark.parametrize(("kind", "wrong"), [("alone", 1), ("head", 1), ("worker", 0)])
def test_a_worker_needs_no_port_of_the_head(tmp_path, kind, wrong):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        config = config_with(tmp_path, gcs_port=holder.getsockname()[1])
        found = errors(doctor.checks(config, tmp_path, kind))
    assert len([line for line in found if "node.gcs_port" in line and "is in use" in line]) == wrong


def test_a_worker_without_a_proxy_needs_no_port(tmp_path):
    found = doctor.checks(config_with(tmp_path, proxies="head_only"), tmp_path, "worker")
    assert [finding.what for finding in found if finding.where == "ports"] == ["none needed"]


def test_a_worker_with_another_release_than_its_head_is_named(tmp_path):
    head = doctor.Head("127.0.0.1", {**versions.installed(), "ray": "2.59.0", "torch": "2.12.0+cpu"})
    lines = errors(doctor.checks(config_with(tmp_path), tmp_path, "worker", head=head))
    ray, torch = versions.installed()["ray"], versions.installed()["torch"].partition("+")[0]
    assert [line.split(";")[0] for line in lines if line.startswith("versions")] == [
        f"versions: this node has ray {ray}, the head has 2.59.0",
        f"versions: this node has torch {torch}, the head has 2.12.0",
    ]


def test_a_node_that_runs_is_not_asked_for_what_it_has_taken(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        config = config_with(tmp_path, port=port, min_free_memory_mb=10**9)
        assert len(errors(doctor.checks(config, tmp_path, "alone"))) == 2
        found = doctor.checks(config, tmp_path, "alone", ours=[port])
    assert errors(found) == []
    assert any(f"{port} in use by this cluster" in finding.what for finding in found)


@pytest.mark.parametrize(
    ("device", "gpus", "level"), [("cpu", 1.0, "ok"), ("gpu", 0.0, "ok"), ("gpu", None, "warning"), ("gpu", 1.0, "error")]
)
def test_a_gpu_is_wanted_where_a_model_is_to_run_on_one(tmp_path, device, gpus, level):
    found = doctor.checks(config_with(tmp_path, device), tmp_path, "worker", gpus=gpus)
    seen = next(finding for finding in found if finding.where == "gpu")
    if seen.level != level:
        assert "NVIDIA" in seen.what, "this machine has a GPU of its own"


def test_what_the_autoscaler_says_of_a_node():
    assert doctor.planned_gpus({}) is None
    assert doctor.planned_gpus({doctor.RESOURCES: json.dumps({"CPU": 2, "GPU": 8})}) == 8.0
    assert doctor.planned_gpus({doctor.RESOURCES: '{"CPU": 2}'}) == 0.0
    assert doctor.planned_gpus({doctor.RESOURCES: "not JSON"}) is None


def test_a_head_is_not_asked_without_a_token(tmp_path):
    assert doctor.ask("127.0.0.1", free_port(), tmp_path / "none") == (None, [])


def test_one_line_per_check_and_the_exit_status():
    lines: list[str] = []
    good = Finding("ok", "all well", "clock")
    bad = Finding("error", "torch 9.9.9 is installed", "versions", "install it")
    assert doctor.tell({"a": [good]}, lines.append) == 0
    assert doctor.tell({"a": [good], "b": [bad, Finding("warning", "hm", "route")]}, lines.append) == 1
    assert lines[-1] == "2 node(s): 1 error(s), 1 warning(s)"
    assert "  error    versions       torch 9.9.9 is installed; install it" in lines


def test_the_command_over_a_machine_on_which_nothing_runs(tmp_path, capsys):
    sets = [f"node.{name}={free_port()}" for name in PORTS] + ["node.min_free_memory_mb=0"]
    arguments = ["doctor", "--run-dir", str(tmp_path / "run"), *(part for value in sets for part in ("--set", value))]
    status, printed = main(arguments), capsys.readouterr().out
    wrong = [line for line in printed.splitlines() if line.startswith("  error") and "shared memory" not in line]
    assert printed.startswith("this node:") and wrong == []
    assert status == (1 if "  error" in printed else 0)
    assert not (tmp_path / "run").exists(), "a look leaves nothing"
    assert main([*arguments, "--set", "node.min_free_memory_mb=1000000000"]) == 1
    assert "error    memory" in capsys.readouterr().out
