"""CPU seconds per group of processes, read from `/proc` at two moments.

A group is who burned the time: the proxy, the gateway, the engine's HTTP side, its core, the router under test. A process
belongs to an arm when it is a descendant of one of the arm's root processes or of one that carries the arm's marker in
its environment; Ray's workers rewrite their own environment block when they set their title, so the marker alone is not
enough. Resolution is the kernel's tick, usually 10 ms per process. Time of a process that died between the moments
is lost. Called by the suites.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

RUN_MARKER = "TIDEPOOL_RUN_ID"
"""Environment variable that every process of our cluster is started with."""

_RAY_SYSTEM = (
    "raylet",
    "gcs_server",
    "/ray/autoscaler/",
    "/ray/_private/",
    "/ray/dashboard/",
    "log_monitor",
    "runtime_env_agent",
    "ray::ProxyActor",
    "ray::ServeController",
)


@dataclass(frozen=True)
class Process:
    """One line of `/proc`: `cpu_s` is user plus system time of all its threads, `rss` resident bytes."""

    pid: int
    ppid: int
    cmdline: str
    cpu_s: float
    rss: int


@dataclass(frozen=True)
class Moment:
    """A reading: group and CPU seconds of every process of the arms, and busy seconds of the whole machine."""

    groups: dict[int, str]
    cpu_s: dict[int, float]
    rss: dict[int, int]
    machine_s: float


def parse_stat(text: str, cmdline: str, ticks: int, page: int) -> Process:
    """A `/proc/<pid>/stat` line. The name in parentheses may itself hold spaces and parentheses."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    pid, _, name = head.partition(" (")
    return Process(
        pid=int(pid),
        ppid=int(fields[1]),
        cmdline=cmdline or name,
        cpu_s=(int(fields[11]) + int(fields[12])) / ticks,
        rss=int(fields[21]) * page,
    )


def processes(proc: Path = Path("/proc")) -> Iterator[Process]:
    """Every process that can be read; one that ends meanwhile is left out."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            cmdline = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            yield parse_stat((folder / "stat").read_text(errors="replace"), cmdline, ticks, page)
        except (OSError, ValueError, IndexError):
            continue


def marked(name: str, value: str | None = None, proc: Path = Path("/proc")) -> set[int]:
    """Pids whose starting environment has `name` (equal to `value`, when given)."""
    wanted = name.encode() + b"=" + (value or "").encode()
    found = set()
    for folder in proc.iterdir():
        if folder.name.isdigit():
            try:
                entries = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(entry == wanted if value is not None else entry.startswith(wanted) for entry in entries):
                found.add(int(folder.name))
    return found


def descendants(roots: Iterable[int], table: Iterable[Process]) -> set[int]:
    """The roots that live and everything below them."""
    children: dict[int, list[int]] = {}
    alive = set()
    for process in table:
        alive.add(process.pid)
        children.setdefault(process.ppid, []).append(process.pid)
    found: set[int] = set()
    open_ = [pid for pid in roots if pid in alive]
    while open_:
        pid = open_.pop()
        if pid not in found:
            found.add(pid)
            open_.extend(children.get(pid, ()))
    return found


def group(cmdline: str, arm: str) -> str:
    """Who a process is, from its command line (Ray and vLLM write titles); `arm` names what is not recognised."""
    title = cmdline.split(" ", 1)[0]
    if "haproxy" in title.rsplit("/", 1)[-1]:
        return "haproxy"
    if title.startswith("VLLM::"):
        return "engine http" if "APIServer" in title else "engine core"
    if title.startswith("ray::ServeReplica:"):
        app, _, deployment = title.removeprefix("ray::ServeReplica:").partition(":")
        if app == "gateway":
            return "gateway replica"
        return "ingress replica" if "ingress" in deployment.lower() else "engine replica"
    if title.startswith("ray::") and "store" in title.lower():
        return "store"
    if title.startswith("ray::") or any(name in cmdline for name in _RAY_SYSTEM):
        return "ray system"
    if "vllm.entrypoints" in cmdline:
        return "engine http"
    return arm


def machine_busy(text: str, ticks: int) -> float:
    """Busy CPU seconds of the machine since it started, from the first line of `/proc/stat`."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(value) for value in text.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / ticks


def moment(arms: dict[str, set[int]], proc: Path = Path("/proc")) -> Moment:
    """Read now. `arms` maps a name to root pids; a process below several roots belongs to the first arm named."""
    table = list(processes(proc))
    by_pid = {process.pid: process for process in table}
    groups: dict[int, str] = {}
    for arm, roots in arms.items():
        for pid in descendants(roots, table):
            groups.setdefault(pid, group(by_pid[pid].cmdline, arm))
    return Moment(
        groups,
        {pid: by_pid[pid].cpu_s for pid in groups},
        {pid: by_pid[pid].rss for pid in groups},
        machine_busy((proc / "stat").read_text(), os.sysconf("SC_CLK_TCK")),
    )


def spent(before: Moment, after: Moment) -> dict[str, float]:
    """CPU seconds per group between two moments, largest first; `machine` is everything that ran, ours or not."""
    total: dict[str, float] = {}
    for pid, name in after.groups.items():
        seconds = after.cpu_s[pid] - before.cpu_s.get(pid, 0.0)
        total[name] = total.get(name, 0.0) + max(0.0, seconds)
    total = {name: seconds for name, seconds in sorted(total.items(), key=lambda item: -item[1]) if seconds > 0}
    return total | {"machine": after.machine_s - before.machine_s}
