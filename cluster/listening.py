"""Which ports the processes of this cluster listen on at this node: those are not in the way, whoever else has one is.

Read from `/proc`: the sockets in state LISTEN, and which of the cluster's processes have them open. `doctor` is the caller.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cluster import processes

PROC = Path("/proc")
LISTEN = "0A"


def ports(run_dir: Path) -> frozenset[int]:
    """TCP ports that processes of the cluster in `run_dir` listen on."""
    return ports_of(process.pid for process in processes.marked(run_dir))


def ports_of(pids: Iterable[int], proc: Path = PROC) -> frozenset[int]:
    """TCP ports that these processes listen on; those of other users are seen by root only."""
    inodes = listeners(proc)
    found: set[int] = set()
    for pid in pids:
        # A process may end while it is looked at.
        with suppress(OSError):
            for handle in (proc / str(pid) / "fd").iterdir():
                with suppress(OSError):
                    name = os.readlink(handle)
                    if name.startswith("socket:["):
                        found |= {port for port in (inodes.get(name[8:-1]),) if port is not None}
    return frozenset(found)


def listeners(proc: Path = PROC) -> dict[str, int]:
    """Ports that are listened on in this network, by the inode of their socket."""
    found = {}
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (proc / "net" / name).read_text().splitlines()[1:]:
                cells = line.split()
                if cells[3] == LISTEN:
                    found[cells[9]] = int(cells[1].rpartition(":")[2], 16)
    return found
