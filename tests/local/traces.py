"""What a cluster could leave on a machine: processes, listening ports, shared memory, files outside its run directory.

Other programs may run beside the tests, so ports are those its own processes listened on, and files those with names that Ray,
vLLM, HAProxy or we would give.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cluster.processes import marked, shared_memory

NAMES = ("ray", "tp-", "haproxy", "vllm", "torch", "triton", "plasma", "psm_", "sem.")
LISTEN = "0A"


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


def listening(pids: Iterable[int] | None = None) -> set[int]:
    """TCP ports that somebody listens on, or that one of `pids` does."""
    sockets: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                sockets[fields[9]] = int(fields[1].rsplit(":", 1)[1], 16)
    if pids is None:
        return set(sockets.values())
    found = set()
    for pid in pids:
        try:
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                inode = os.readlink(handle).removeprefix("socket:[").removesuffix("]")
                if inode in sockets:
                    found.add(sockets[inode])
        except OSError:
            continue
    return found


def fixed(ports: Iterable[int]) -> set[int]:
    """Without those that the kernel gives to whoever asks for any port: another program may have got one of them since."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return {port for port in ports if not first <= port <= last}


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
