"""A pod's start: `docker/pod.sh` in a shell as KubeRay makes it, and the environment that Ray then gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.pod import exports
from cluster.session import Session

ROOT = Path(__file__).resolve().parents[2]
SHOW = f"{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """A pod's files end with its container, and so nothing takes away the short name of a run directory with a long one."""
    yield
    short = Session(tmp_path / "run").short
    if short.is_symlink():
        short.unlink()


def start(words: str, tmp_path: Path, token: str = "a-token", **more: str) -> subprocess.CompletedProcess[str]:
    """What KubeRay runs: the container's command, `ulimit`, then `ray start`, here a program that shows its environment."""
    command = f" {words} --run-dir {tmp_path / 'run'}  && ulimit -Sn 1024; {SHOW}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **more}
    return subprocess.run(
        ["/bin/bash", "-c", "--", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_ray_gets_the_environment_of_the_project(tmp_path):
    done = start(". docker/pod.sh node configs/qwen3-1gpu.yaml --set store.url=postgresql://tide@db/x", tmp_path, HF_TOKEN="kept")
    assert (done.returncode, done.stderr) == (0, "")
    got = json.loads(done.stdout)
    run_dir = tmp_path / "run"
    assert got["RAY_SERVE_ENABLE_HA_PROXY"] == got["RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"] == "1"
    assert got["TIDEPOOL_RUN_DIR"] == str(run_dir) and got["RAY_AUTH_MODE"] == "token" and got["HF_TOKEN"] == "kept"
    assert Path(got["RAY_SERVE_HAPROXY_BINARY_PATH"]).is_file()
    # The autoscaler's container reads Ray's logs below /tmp/ray.
    assert "TMPDIR" not in got and "RAY_TMPDIR" not in got
    assert Path(got["RAY_AUTH_TOKEN_PATH"]).read_text() == "a-token"
    assert json.loads((run_dir / "state.json").read_text())["run_id"] == got["TIDEPOOL_RUN_ID"]


@pytest.mark.parametrize(
    ("words", "token", "said"),
    [
        (". docker/pod.sh node configs/qwen3-1gpu.yaml", "", "error: RAY_AUTH_TOKEN is empty"),
        (". docker/pod.sh node configs/none.yaml", "a-token", "configs/none.yaml: cannot be read"),
        (". docker/pod.sh node configs/qwen3-1gpu.yaml --set node.host=127.0.0.1", "a-token", "reaches this pod only"),
        (". docker/pod.sh worker configs/qwen3-1gpu.yaml", "a-token", "write head or node, found worker"),
    ],
)
def test_a_mistake_ends_the_pod_before_ray_starts(words, token, said, tmp_path):
    done = start(words, tmp_path, token)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


def test_only_what_differs_is_exported():
    wanted = {"A": "it's", "B": "same", "TMPDIR": "/elsewhere"}
    assert exports(wanted, {"B": "same", "C": "stays"}) == ["""export A='it'"'"'s'"""]
