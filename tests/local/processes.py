"""The processes of a cluster by what they do, for tests that kill one of them or look for what is left.

They are found by the mark of the run directory (`cluster.processes`) and told apart by their titles and parents, so a test of
one cluster never sees another's.
"""

from __future__ import annotations

from pathlib import Path

from cluster.processes import marked

KINDS = ("gateway", "replica", "core", "worker", "haproxy", "manager", "fallback", "controller", "store")
TITLES = {
    "ray::ServeReplica:gateway": "gateway",
    "VLLM::EngineCore": "core",
    "VLLM::Worker": "worker",
    "ray::HAProxyManager": "manager",
    "ray::ProxyActor": "fallback",
    "ray::ServeController": "controller",
    "ray::StoreActor": "store",
}


def by_kind(run_dir: Path, model_app: str) -> dict[str, list[int]]:
    """Pids of each of `KINDS`, oldest first; engine processes are those of one model's application.

    A title is set a moment after a process starts: one that has none yet is not seen.
    """
    alive = marked(run_dir)
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    parents = {process.pid: process.parent for process in alive}
    for process in sorted(alive, key=lambda p: p.started):
        if process.title.startswith(f"ray::ServeReplica:{model_app}"):
            found["replica"].append(process.pid)
        elif _program(process.pid) == "haproxy":
            found["haproxy"].append(process.pid)
        else:
            for start, kind in TITLES.items():
                if process.title.startswith(start):
                    found[kind].append(process.pid)
    others = {p.pid for p in alive if p.title.startswith("ray::ServeReplica:engine-")} - set(found["replica"])
    cores = [pid for pid in found["core"] if parents.get(pid) not in others]
    strangers = set(found["core"]) - set(cores)
    workers = [pid for pid in found["worker"] if parents.get(pid) not in strangers]
    return {**found, "core": cores, "worker": workers}


def counts(found: dict[str, list[int]]) -> dict[str, int]:
    """How many there are of each kind."""
    return {kind: len(pids) for kind, pids in found.items()}


def _program(pid: int) -> str:
    """The name of the file that a process runs."""
    try:
        return Path(f"/proc/{pid}/exe").resolve().name
    except OSError:
        return ""
