"""`python -m cluster status` where little or nothing answers: no cluster, and one whose processes are there and silent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import parse
from cluster.preflight import free_port
from cluster.processes import RUN_DIR, RUN_ID
from cluster.session import session_of
from cluster.status import gateway_addresses, look

ROOT = Path(__file__).resolve().parents[2]


def status(run_dir: Path, *options: str) -> subprocess.Popen[str]:
    ports = ("port", "gcs_port", "dashboard_port")
    settings = [part for name in ports for part in ("--set", f"node.{name}={free_port()}")]
    command = [
        sys.executable,
        "-m",
        "cluster",
        "status",
        "configs/local-cpu.yaml",
        "--run-dir",
        str(run_dir),
        *settings,
        *options,
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """A run directory with one process of its cluster, which answers nobody."""
    environ = {**os.environ, RUN_DIR: str(tmp_path), RUN_ID: "x"}
    process = subprocess.Popen([sys.executable, "-c", "input()"], env=environ, stdin=subprocess.PIPE)
    yield tmp_path
    process.kill()
    process.wait()


def test_no_cluster(tmp_path: Path) -> None:
    process = status(tmp_path / "none")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err == ""
    assert out.startswith(f"run directory  {tmp_path / 'none'}\nprocesses      0")


def test_nobody_answers(silent: Path) -> None:
    process = status(silent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err == ""
    assert "ready          no  no answer" in out and "NODES  ?" in out and "tidepool-chat" in out


def test_json_and_watch(silent: Path) -> None:
    process = status(silent, "--json", "--watch")
    assert process.stdout is not None
    for _ in range(2):
        seen = json.loads(process.stdout.readline())
        assert seen["processes"] == 1 and seen["nodes"] is None and [model["running"] for model in seen["models"]] == [None, None]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_looking_takes_no_time_where_nothing_runs(tmp_path: Path) -> None:
    config = parse({"run_dir": str(tmp_path), "models": [{"id": "m", "device": "cpu"}]})
    began = time.monotonic()
    assert look(config, session_of(config)).processes == 0 and time.monotonic() - began < 1


def test_gateways_are_where_haproxy_was_told(tmp_path: Path) -> None:
    session = session_of(parse({"run_dir": str(tmp_path), "models": [{"id": "m", "device": "cpu"}]}))
    assert gateway_addresses(session) == []
    folder = session.run_dir / "h" / "the-nodes-id"
    folder.mkdir(parents=True)
    servers = [
        "gateway-Gateway-a 10.0.0.1:30001 check",
        "gateway-Gateway-b 10.0.0.2:30001 check",
        "engine-m-E-c 10.0.0.2:30002 check",
    ]
    (folder / "haproxy.cfg").write_text("".join(f"    server SERVE_REPLICA_{line}\n" for line in servers))
    assert gateway_addresses(session) == ["10.0.0.1:30001", "10.0.0.2:30001"]
