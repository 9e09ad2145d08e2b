"""What a cluster could leave on a machine: processes, listening ports, shared memory, files outside its run directory.

Other programs may run beside the tests, so ports are those its own processes listened on, and files those with names that Ray,
vLLM, HAProxy or we would give.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cluster.listening import listeners, ports_of
from cluster.processes import marked, shared_memory

NAMES = ("ray", "tp-", "haproxy", "vllm", "torch", "triton", "plasma", "psm_", "sem.")


def related(run_dir: Path) -> list[str]:
    """Processes that carry the mark, or mention the run directory in their arguments or environment; not the caller's own."""
    needle = os.fsencode(run_dir)
    found = [f"{process.pid} {process.title}" for process in marked(run_dir)]
    known = {int(line.split()[0]) for line in found} | _ancestors(os.getpid())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in known:
            try:
                arguments = (entry / "cmdline").read_bytes()
                if needle in arguments or needle in (entry / "environ").read_bytes():
                    found.append(f"{entry.name} {arguments[:80]!r}")
            except OSError:
                continue
    return found


def listening(pids: Iterable[int] | None = None) -> set[tuple[int, str]]:
    """Sockets that somebody listens on, or that one of `pids` does, each as its TCP port and its inode.

    A port that was free may be anybody's a moment later; the inode tells that it is another socket.
    """
    sockets = {(port, inode) for inode, port in listeners().items()}
    if pids is None:
        return sockets
    ours = ports_of(pids)
    return {(port, inode) for port, inode in sockets if port in ours}


def files() -> set[str]:
    """Entries of /tmp and /dev/shm with a name that could be ours, and not in use by a process of somebody else's."""
    found = {str(path) for folder in ("/tmp", "/dev/shm") for path in Path(folder).iterdir() if path.name.startswith(NAMES)}
    if Path("/tmp/ray").exists():
        found |= {str(path) for path in Path("/tmp/ray").iterdir()}
    used: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            used |= shared_memory(int(entry.name))
    return {path for path in found if not (path.startswith("/dev/shm/") and _inode(path) in used) and not _lives(path)}


def _lives(path: str) -> bool:
    """Whether it is the short name of a run directory in which a cluster runs: another test's, where the caller's is down."""
    return os.path.islink(path) and bool(marked(Path(os.readlink(path))))


def _inode(path: str) -> int:
    return os.stat(path).st_ino if os.path.exists(path) else 0


def _ancestors(pid: int) -> set[int]:
    found = set()
    while pid > 0:
        found.add(pid)
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat[stat.rindex(")") + 2 :].split()[1])
    return found
