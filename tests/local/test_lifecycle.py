"""`up` and `down`, five times over, with crashes in between: the machine is afterwards as it was before.

One small model that needs no training, ports of its own, and a home directory of its own, so that anything written there is
seen. A cluster of its own, before the one that other tests share.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, settings
from processes import by_kind
from traces import files, listening, related
from traffic import Result, ask

from cluster.processes import marked

PORTS = {"port": 19000, "gcs_port": 19379, "dashboard_port": 19265, "stats_port": 19404, "proxy_metrics_port": 19201}
REPLICA_PORTS = (19500, 19600)
STALL_S = 10.0
ASLEEP = ("--set", "models.0.autoscaling.min_replicas=0")  # without the half minute that an engine takes
CONFIG = f"""
models:
  - id: tiny
    model_source: embedded:random
    device: cpu
    stall_timeout_s: {STALL_S}
    env: {{VLLM_CPU_KVCACHE_SPACE: "1", VLLM_CPU_OMP_THREADS_BIND: nobind, OMP_NUM_THREADS: "1"}}
    engine_kwargs: {{enforce_eager: true, max_model_len: 2048, max_num_seqs: 16, dtype: float32}}
"""


class Machine:
    """One configuration, its run directory and home, and `python -m cluster` on them."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.home = folder / "r", folder / "home"
        self.home.mkdir()
        self.config = folder / "tiny.yaml"
        self.config.write_text(CONFIG)
        self.files = files()
        self.sockets: set[tuple[int, str]] = set()

    def start(self, command: str, *extra: str) -> subprocess.Popen[str]:
        """Begin a command; its output is one pipe."""
        options = ["--run-dir", str(self.run_dir), *settings(PORTS, REPLICA_PORTS), *extra]
        temporary = self.home.parent / "tmp"
        temporary.mkdir(exist_ok=True)
        environ = {**os.environ, "HOME": str(self.home), "TMPDIR": str(temporary)}
        for name in [name for name in environ if name.startswith("XDG_")]:
            del environ[name]
        return subprocess.Popen(
            [sys.executable, "-m", "cluster", command, str(self.config), *options],
            cwd=ROOT,
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, command: str, *extra: str) -> tuple[int, str]:
        """Run a command to its end; status and output."""
        process = self.start(command, *extra)
        output = process.communicate(timeout=600)[0]
        self.sockets |= listening(process.pid for process in marked(self.run_dir))
        return process.returncode, output

    def up(self, *extra: str) -> str:
        status, output = self.run("up", *extra)
        assert status == 0, output
        return output

    def up_until(self, text: str) -> subprocess.Popen[str]:
        """Begin `up` and return as soon as it has printed `text`."""
        process = self.start("up")
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if text in line:
                self.sockets |= listening(process.pid for process in marked(self.run_dir))
                return process
        raise AssertionError("".join(seen))

    def down(self) -> None:
        status, output = self.run("down")
        assert status == 0, output
        self.is_clean()

    def is_clean(self) -> None:
        """Nothing is left of the cluster."""
        assert related(self.run_dir) == []
        named = {*PORTS.values(), *range(REPLICA_PORTS[0], REPLICA_PORTS[1] + 1)}
        assert not [port for port, inode in listening() if port in named or (port, inode) in self.sockets]
        assert not files() - self.files
        assert [str(path) for path in self.home.rglob("*")] == []
        assert [str(path) for path in (self.home.parent / "tmp").rglob("*")] == []
        left = {path.name for path in self.run_dir.iterdir()} if self.run_dir.exists() else set()
        assert not left & {"endpoint.json", "state.json", "ray_token", "h", "ipc", "tmp"}, left


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="tl", dir="/tmp"))
    made = Machine(folder)
    yield made
    made.run("down")
    shutil.rmtree(folder, ignore_errors=True)


def test_a_busy_port_is_one_line_and_nothing_starts(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", PORTS["dashboard_port"])):
        status, output = machine.run("up")
    assert status == 2
    assert f"node.dashboard_port: 127.0.0.1:{PORTS['dashboard_port']} is in use" in output
    assert "Traceback" not in output and not machine.run_dir.exists()
    machine.is_clean()


def test_too_little_memory_is_one_line_and_nothing_starts(machine: Machine) -> None:
    status, output = machine.run("up", "--set", "node.min_free_memory_mb=100000000")
    assert status == 2
    assert "memory: " in output and "Traceback" not in output and not machine.run_dir.exists()
    machine.is_clean()


@pytest.mark.slow
def test_cycle_1_plain_and_a_stalled_engine(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    _show(capsys, machine.up())
    file = machine.run_dir / "endpoint.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    began = time.monotonic()
    assert "already running" in machine.up()
    assert time.monotonic() - began < 15
    _stall(machine, json.loads(file.read_text()), capsys)
    machine.down()


@pytest.mark.slow
def test_cycle_2_the_driver_is_killed_and_up_works_at_once(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    driver = machine.up_until("starting the applications")
    driver.kill()
    driver.communicate()
    assert marked(machine.run_dir), "the cluster outlives its driver"
    output = machine.up(*ASLEEP)
    assert "an earlier cluster of this run directory is not healthy" in output
    _show(capsys, output)
    machine.down()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["starting Ray", "starting the applications"])
def test_cycle_3_ctrl_c(machine: Machine, text: str) -> None:
    driver = machine.up_until(text)
    driver.send_signal(signal.SIGINT)
    output = driver.communicate(timeout=120)[0]
    assert driver.returncode == 130, output
    assert "Traceback" not in output
    machine.is_clean()


@pytest.mark.slow
def test_cycle_4_driver_raylet_and_gcs_are_killed(machine: Machine) -> None:
    driver = machine.up_until("EngineServer 1 starting")
    driver.kill()
    driver.communicate()
    for process in marked(machine.run_dir):
        if os.path.basename(os.path.realpath(f"/proc/{process.pid}/exe")) in ("raylet", "gcs_server"):
            os.kill(process.pid, signal.SIGKILL)
    machine.down()


@pytest.mark.slow
def test_cycle_5_with_a_model_that_sleeps(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    _show(capsys, machine.up(*ASLEEP))
    machine.down()


def _stall(machine: Machine, endpoint: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """An engine core that stands still with requests running: the replica is replaced, by itself."""
    root, key = endpoint["base_url"].removesuffix("/v1"), endpoint["api_key"]
    (core,) = by_kind(machine.run_dir, "engine-tiny")["core"]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    answers: list[Result] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(root, key, body, "/v1/completions"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    _until(lambda: _running(root, endpoint["admin_key"]) == 2, 30)
    os.kill(core, signal.SIGSTOP)
    stopped = time.monotonic()
    _until(lambda: not os.path.exists(f"/proc/{core}"), STALL_S + 30)
    gone_s = time.monotonic() - stopped
    for thread in threads:
        thread.join()
    after = ask(root, key, {**body, "max_tokens": 4, "stream": False}, "/v1/completions")
    with capsys.disabled():
        print(
            f"stalled engine core: gone after {gone_s:.1f} s, answers again after {time.monotonic() - stopped:.1f} s",
            file=sys.stderr,
        )
    assert {answer.verdict for answer in answers} <= {"ok", "error"}, answers
    assert after.verdict == "ok", after


def _running(root: str, admin_key: str) -> int:
    import urllib.request

    asked = urllib.request.Request(f"{root}/metrics", headers={"Authorization": f"Bearer {admin_key}"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("tidepool_running_requests{")))


def _until(true: Any, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s"
        time.sleep(0.05)


def _show(capsys: pytest.CaptureFixture[str], output: str) -> None:
    with capsys.disabled():
        print("\n" + "\n".join(line for line in output.splitlines() if line.startswith("[")), file=sys.stderr)
