"""Finds and stops the processes of one cluster, and nobody else's.

Every process that `up` starts inherits `TIDEPOOL_RUN_ID` and `TIDEPOOL_RUN_DIR`, and so does every process that those start:
Ray's daemons, workers, HAProxy, vLLM's engine cores. Reading that mark from `/proc/<pid>/environ` finds them after any crash and
is safe against recycled pids. `SPT_NOENV=1` in the same environment keeps `setproctitle` from overwriting the mark; children of a
marked process count too. Linux only. `launch` is the caller.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import LaunchError

RUN_ID = "TIDEPOOL_RUN_ID"
RUN_DIR = "TIDEPOOL_RUN_DIR"
SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Process:
    """One live process. `started` (clock ticks since boot) tells two owners of the same pid apart."""

    pid: int
    parent: int
    started: int
    title: str


def marked(run_dir: Path, proc: Path = Path("/proc")) -> list[Process]:
    """The live processes of the cluster whose files are in `run_dir`, this process and its ancestors never among them."""
    mark = f"{RUN_DIR}={run_dir}".encode()
    alive: dict[int, Process] = {}
    ours: set[int] = set()
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        process = _read(entry)
        if process is None:
            continue
        alive[process.pid] = process
        if mark in _environ(entry):
            ours.add(process.pid)
    grew = True
    while grew:
        more = {p.pid for p in alive.values() if p.parent in ours and p.pid not in ours}
        ours |= more
        grew = bool(more)
    own = os.getpid()
    while own in alive:
        ours.discard(own)
        own = alive[own].parent
    return sorted((alive[pid] for pid in ours), key=lambda p: p.pid)


def stop(
    run_dir: Path,
    grace_s: float = 5.0,
    limit_s: float = 30.0,
    told: Callable[[str], None] | None = None,
    since: float | None = None,
) -> int:
    """Stop every process of the cluster: SIGTERM, `grace_s` later SIGKILL, until none is left.

    Shared-memory files that only they had open are removed, and with `since` (unix seconds, the cluster's start) those of
    processes that died before. Returns how many processes were stopped.

    Raises:
        LaunchError: some are still there after `limit_s` (stuck in the kernel).
    """
    begun = time.monotonic()
    seen: set[tuple[int, int]] = set()
    shared: set[int] = set()
    while True:
        left = marked(run_dir)
        if not left:
            break
        for process in left:
            shared |= shared_memory(process.pid)
        elapsed = time.monotonic() - begun
        if elapsed > limit_s:
            names = ", ".join(f"{p.pid} ({p.title})" for p in left[:5])
            raise LaunchError(f"{len(left)} processes do not end: {names}")
        for process in left:
            known = (process.pid, process.started) in seen
            seen.add((process.pid, process.started))
            if elapsed > grace_s:
                _send(process, signal.SIGKILL)
            elif not known:
                _send(process, signal.SIGTERM)
        if told is not None and len(seen) == len(left):
            told(f"stopping {len(left)} processes")
            told = None
        time.sleep(0.1)
    _remove_shared(shared, since)
    return len(seen)


def _read(entry: Path) -> Process | None:
    """One process, or None when it has gone, is a zombie, or is a kernel thread."""
    try:
        stat = (entry / "stat").read_text()
        title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    return Process(int(entry.name), int(fields[1]), int(fields[19]), title[:80])


def _environ(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _send(process: Process, number: signal.Signals) -> None:
    """Signal a process unless its pid has been taken by another since it was read."""
    now = _read(Path("/proc") / str(process.pid))
    if now is None or now.started != process.started:
        return
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return


def shared_memory(pid: int) -> set[int]:
    """Inodes of the files in /dev/shm that a process has mapped or open.

    Inodes, because a semaphore is mapped under a temporary name and linked to its own afterwards.
    """
    found: set[int] = set()
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        found |= {int(line.split(maxsplit=5)[4]) for line in lines if " /dev/shm/" in line}
    with suppress(OSError):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(handle).startswith("/dev/shm/"):
                    found.add(handle.stat().st_ino)
    return found


def _remove_shared(inodes: set[int], since: float | None) -> None:
    """Remove shared-memory files that no live process uses: `inodes`, and what processes killed earlier left behind.

    The latter carry Python's names (`psm_`, `sem.mp-`), not ours. Unused, this user's, and made since the cluster started,
    they are garbage, at worst that of another crashed program.
    """
    left: dict[int, Path] = {}
    for path in SHARED.iterdir():
        with suppress(FileNotFoundError):
            found = path.stat()
            known = since is not None and path.name.startswith(("psm_", "sem.mp-"))
            if found.st_ino in inodes or (known and found.st_uid == os.getuid() and found.st_ctime >= (since or 0)):
                left[found.st_ino] = path
    if not left:
        return
    used: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            used |= shared_memory(int(entry.name))
    for inode, path in left.items():
        if inode not in used:
            path.unlink(missing_ok=True)
