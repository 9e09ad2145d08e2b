"""A Ray cluster of this project's own kind without Serve, with nodes that come and go, and commands that train on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import processes
from cluster.config import Config, parse
from cluster.preflight import free_port
from cluster.session import Session, environment, session_of, start_command

ROOT = Path(__file__).resolve().parents[2]
WORKER = "ray::RayTrainWo"  # titles are cut


def until(what: str, wanted: Callable[[], Any], limit_s: float = 240.0, process: subprocess.Popen[str] | None = None) -> Any:
    """Wait for something to be there; returns it. Ends early when `process`, a command that should bring it, has ended."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found = wanted()
        if found:
            return found
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the command ended before {what}:\n{''.join(process.communicate())[-3000:]}")
        time.sleep(0.2)
    raise AssertionError(f"waited {limit_s:.0f} s for {what}")


def write_config(path: Path, run_dir: Path, train: dict[str, Any], node: dict[str, Any] | None = None) -> Path:
    """A configuration file, in JSON, which is YAML too."""
    path.write_text(json.dumps({"run_dir": str(run_dir), "node": node or {}, "train": train}))
    return path


def command(*args: str) -> subprocess.Popen[str]:
    """`python -m train ...`, started."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "train", *args], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def done(process: subprocess.Popen[str], timeout_s: float = 400.0) -> tuple[int, str, str]:
    """Wait for a command: status, standard output, standard error."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, out, err


def book(folder: Path) -> dict[str, Any]:
    """run.json; empty before it is there."""
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    path = folder / "log" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest_step(folder: Path) -> int:
    """Of the whole checkpoints; 0 when there is none."""
    return max((int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*/index.json")), default=0)


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    return Path(f"/proc/{pid}").exists()


def title(pid: int) -> str:
    """What a process calls itself; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def descendants(pid: int) -> set[int]:
    """All processes below one."""
    parents = {int(entry.name): _parent(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found, grew = {pid}, True
    while grew:
        more = {child for child, above in parents.items() if above in found} - found
        found, grew = found | more, bool(more)
    return found - {pid}


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Cluster:
    """Two nodes of one CPU each on this machine."""

    def __init__(self, run_dir: Path) -> None:
        self.node = {"gcs_port": free_port(), "dashboard_port": free_port(), "num_cpus": 1, "object_store_mb": 100}
        model = {"id": "never-served", "model_source": "embedded:random", "device": "cpu"}
        self.config: Config = parse({"run_dir": str(run_dir), "node": self.node, "models": [model]})
        self.session: Session = session_of(self.config)
        self.environ: dict[str, str] = {}

    def start(self) -> None:
        """The head, as `python -m cluster up` starts it."""
        self.session.prepare()
        self.environ = {**environment(self.config, self.session, "test"), "HF_HUB_OFFLINE": "1"}
        # One machine only, says the launcher of a cluster on 127.0.0.1; here it is to have two nodes.
        self.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
        self._ray(start_command(self.config, self.session))
        self.session.state.write_text(json.dumps({"run_id": "test", "started": time.time()}))

    def join(self) -> int:
        """A second node; the pid of its raylet."""
        before = self.pids("raylet/raylet ")
        self._ray([
            sys.executable, "-m", "ray.scripts.scripts", "start", f"--address=127.0.0.1:{self.node['gcs_port']}",
            "--node-ip-address=127.0.0.1", "--num-cpus=1", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats",
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        ])  # fmt: skip
        (pid,) = until("the second raylet", lambda: self.pids("raylet/raylet ") - before)
        return int(pid)

    def pids(self, title: str) -> set[int]:
        """Processes of this cluster whose command line holds `title`."""
        found = set()
        for process in processes.marked(self.session.run_dir):
            try:
                line = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if title in line:
                found.add(process.pid)
        return found

    def kill(self, pid: int) -> None:
        """As a crash does it."""
        os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """What `python -m cluster down` does."""
        processes.stop(self.session.run_dir)
        self.session.unlink()

    def _ray(self, line: list[str]) -> None:
        log = self.session.run_dir / "up.log"
        with log.open("ab") as file:
            done = subprocess.run(line, env=self.environ, stdout=file, stderr=file, timeout=180, start_new_session=True)
        assert done.returncode == 0, log.read_text()[-3000:]
