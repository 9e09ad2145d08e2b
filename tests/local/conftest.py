"""One real cluster for all local tests: Ray, Serve, HAProxy, two gateways, vLLM on CPU, started and stopped by our own commands.

`TIDEPOOL_TEST_ENDPOINT=run/endpoint.json pytest tests/local/...` uses a cluster that is up instead, for work on a test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "local-cpu.yaml"
PORTS = {"port": 18000, "gcs_port": 16379, "dashboard_port": 18265, "stats_port": 18404, "proxy_metrics_port": 19101}


@dataclass(frozen=True)
class Endpoint:
    """A cluster that is up, as a client sees it, and its run directory."""

    base_url: str
    api_key: str
    admin_key: str
    models: list[dict[str, Any]]
    run_dir: Path

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")


def settings(ports: dict[str, int], replica_ports: tuple[int, int]) -> list[str]:
    """`--set` arguments that move a cluster to ports of its own."""
    pairs = [f"node.{name}={port}" for name, port in ports.items()]
    pairs.append(f"node.replica_ports=[{replica_ports[0]}, {replica_ports[1]}]")
    return [part for pair in pairs for part in ("--set", pair)]


BABBLES = ["--set", "models.0.model_source=embedded:random"]  # never ends by itself, needs no training

TRACES_PORT = 18490
# Only what a client asks to be traced is; nobody listens there but test_tracing.
TRACED = ["--set", f"tracing.endpoint=http://127.0.0.1:{TRACES_PORT}/v1/traces", "--set", "tracing.sample=0"]


def shared_arguments(run_dir: Path) -> list[str]:
    """Of `python -m cluster up` and `down`, after the file, for the cluster that all tests share; `BABBLES` is its chat model."""
    return ["--run-dir", str(run_dir), *settings(PORTS, (18500, 18600)), "--set", "gateway.replicas=2", *TRACED]


def cluster_command(*args: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run `python -m cluster ...`."""
    command = [sys.executable, "-m", "cluster", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


def read_endpoint(file: Path) -> Endpoint:
    data = json.loads(file.read_text())
    return Endpoint(data["base_url"], data["api_key"], data["admin_key"], data["models"], file.parent.resolve())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with clusters of their own run before the shared one is up, those that kill or change much of it late.

    Last are those that start Ray in this process: its client ends the process, without a word, when it has once looked for a
    cluster that is gone for a minute.
    """
    turn = {"test_lifecycle": 0, "test_chaos": 2, "test_train_assistant": 3, "test_train_journey": 4}
    turn |= {"test_train_tune": 5, "test_train_data_ray": 6}
    items.sort(key=lambda item: turn.get(item.path.stem, 1))


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the default model is trained into, once for all clusters of the session."""
    return Path(os.environ.setdefault("TIDEPOOL_MODEL_CACHE", str(tmp_path_factory.mktemp("model-cache"))))


@pytest.fixture(scope="session")
def endpoint(model_cache: Path) -> Iterator[Endpoint]:
    given = os.environ.get("TIDEPOOL_TEST_ENDPOINT")
    if given:
        yield read_endpoint(Path(given))
        return
    run_dir = Path(tempfile.mkdtemp(prefix="tp"))
    args = [str(CONFIG), *shared_arguments(run_dir)]
    up = cluster_command("up", *args, *BABBLES, timeout_s=900.0)
    try:
        assert up.returncode == 0, f"up failed\n{up.stdout}\n{up.stderr}"
        yield read_endpoint(run_dir / "endpoint.json")
    finally:
        down = cluster_command("down", *args)
        print(down.stdout, down.stderr)
        shutil.rmtree(run_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def trained_endpoint(endpoint: Endpoint) -> Endpoint:
    """The shared cluster with the model that it serves where nobody says otherwise, trained if it has not been."""
    if not os.environ.get("TIDEPOOL_TEST_ENDPOINT"):
        up = cluster_command("up", str(CONFIG), *shared_arguments(endpoint.run_dir), timeout_s=900.0)
        assert up.returncode == 0, f"up failed\n{up.stdout}\n{up.stderr}"
        print(up.stderr)
    return endpoint
