"""Starting a server, waiting until it answers, and stopping it with everything it started. Called by the arms.

Each server is the leader of a session of its own and carries a marker in its environment. Stopping goes by pid only: the
server's descendants, the members of its session and the processes with its marker, first politely, then with SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import cpu
from cluster import tls
from cluster.errors import LaunchError

MARKER = "TIDEPOOL_BENCH_SERVER"
SCRATCH = ("TMPDIR", "VLLM_RPC_BASE_PATH", "TORCHINDUCTOR_CACHE_DIR")


@dataclass
class Server:
    """A started server: its process, its log and its marker's value."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    mark: str

    def pids(self) -> set[int]:
        """Everything that belongs to it and lives."""
        table = list(cpu.processes())
        roots = {self.process.pid} | cpu.marked(MARKER, self.mark) | session_members(self.process.pid, table)
        return cpu.descendants(roots, table)

    def tail(self) -> str:
        """The last lines of its log, for an error message."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])


def session_members(session: int, table: Sequence[cpu.Process]) -> set[int]:
    """Pids whose session is `session`."""
    found = set()
    for process in table:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session:
                found.add(process.pid)
    return found


def start(name: str, argv: Sequence[str], log_dir: Path, env: dict[str, str] | None = None) -> Server:
    """Start `argv` with our environment plus `env`; its output goes to `log_dir/<name>.log`."""
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{name}.log"
    mark = uuid.uuid4().hex
    _scratch(mark).mkdir(mode=0o700)
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {name: str(_scratch(mark)) for name in SCRATCH} | (env or {}) | {MARKER: mark},
            start_new_session=True,
        )
    return Server(name, process, log, mark)


def wait_until(ready: Callable[[], bool], server: Server | None, what: str, timeout_s: float) -> None:
    """Ask `ready` five times a second.

    Raises:
        LaunchError: the server ended or the time is over; the message has the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        if server is not None and server.process.poll() is not None:
            raise LaunchError(f"{what} ended with code {server.process.returncode}; {server.log}:\n{server.tail()}")
        if time.monotonic() > deadline:
            where = f"; {server.log}:\n{server.tail()}" if server else ""
            raise LaunchError(f"{what} did not answer within {timeout_s:.0f} s{where}")
        time.sleep(0.2)


def answers(url: str, key: str = "", body: bytes | None = None, certificate: str | None = None) -> bool:
    """Whether a GET (or a POST of `body`) is answered with 200; over TLS by the server that has this certificate."""
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    if key:
        request.add_header("authorization", f"Bearer {key}")
    try:
        trust = None if certificate is None else tls.trust(certificate)
        with urllib.request.urlopen(request, timeout=30, context=trust) as response:
            response.read()
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def stop(server: Server, grace_s: float = 10.0) -> None:
    """End the server and all that it started; returns when they are gone."""
    pids = server.pids()
    if server.process.poll() is None:
        server.process.terminate()
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and (server.process.poll() is None or living(pids)):
        time.sleep(0.1)
    pids |= server.pids()
    for pid in living(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(5)
    deadline = time.monotonic() + 5
    while living(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(_scratch(server.mark), ignore_errors=True)


def _scratch(mark: str) -> Path:
    """Where a server keeps sockets and temporary files, removed with it; short, for a socket's path has 107 bytes."""
    return Path(tempfile.gettempdir()) / f"tpb-{mark[:8]}"


def living(pids: set[int]) -> set[int]:
    """Those of `pids` that still run; a zombie does not."""
    alive = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if state != "Z":
            alive.add(pid)
    return alive
