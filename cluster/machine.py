"""Checks of the machine itself: shared memory, disk, GPU, clock, route, open files, the token's file.

Each is a small function that changes nothing, starts nothing but `nvidia-smi`, and gives one `Finding` or several. Ports and
memory are `preflight`'s, versions `versions`'s; `doctor` puts them in order.
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import time
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from cluster.finding import Finding, Level
from cluster.preflight import existing, folder, room

SHM = Path("/dev/shm")
# Where the manifests put the cluster's token on every node; Ray's own place for it.
TOKEN = Path("~/.ray/auth_token")
TMP_FREE_MB = 512
# Ray calls a disk full, and spills no more, above this share.
DISK_FULL = 0.95
FILES_FEW, FILES_TOO_FEW = 8192, 1024
CLOCK_WARNING_S, CLOCK_ERROR_S = 2.0, 30.0
# Never answers and is never asked: connecting a UDP socket sends nothing.
ELSEWHERE = "192.0.2.1"


def shared_memory(wanted_mb: int, path: Path = SHM, running: bool = False) -> Finding:
    """Whether Ray's object store fits into shared memory; else Ray takes a file in /tmp, which is slow.

    Args:
        running: The object store is there already and has its part.
    """
    if not path.is_dir():
        return Finding("error", f"{path} is missing", "shared memory", f"mount a tmpfs of {wanted_mb} MiB or more there")
    usage = shutil.disk_usage(path)
    size, free = usage.total // 2**20, usage.free // 2**20
    if size < wanted_mb:
        fix = "make it larger (a container: --shm-size) or lower node.object_store_mb"
        return Finding("error", f"{path} has {size} MiB, node.object_store_mb wants {wanted_mb}", "shared memory", fix)
    if free < wanted_mb and not running:
        what = f"{path} has {free} of {size} MiB free, node.object_store_mb wants {wanted_mb}"
        return Finding("warning", what, "shared memory", f"remove what old processes left in {path}")
    return Finding("ok", f"{free} of {size} MiB free, the object store takes {wanted_mb}", "shared memory")


def disk(run_dir: Path, tmp: Path = Path("/tmp")) -> list[Finding]:
    """Whether the run directory can be written, and its disk and /tmp have room."""
    wrong = [*folder(run_dir), *room("/tmp", tmp, TMP_FREE_MB)]
    for name, place in (("run_dir", run_dir), ("/tmp", tmp)):
        if any(finding.where == name for finding in wrong):
            continue
        usage = shutil.disk_usage(existing(place))
        full = usage.used / max(usage.total, 1)
        if full > DISK_FULL:
            what = f"the disk of {place} is {full:.0%} full; Ray spills nothing above {DISK_FULL:.0%}"
            wrong.append(Finding("warning", what, name, "make room"))
        else:
            wrong.append(Finding("ok", f"{usage.free // 2**20} MiB free for {place}", name))
    return wrong


def open_files() -> Finding:
    """Every connection, worker and log is an open file; Ray raises the soft limit to the hard one by itself."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    few = hard == resource.RLIM_INFINITY or hard >= FILES_FEW
    if few:
        return Finding("ok", f"at most {'any number' if hard == resource.RLIM_INFINITY else hard}", "open files")
    fix = "raise the hard limit to 65536 in /etc/security/limits.conf or the container's ulimits"
    return Finding("error" if hard < FILES_TOO_FEW else "warning", f"the hard limit is {hard}", "open files", fix)


def token_file(path: Path) -> Finding:
    """Whether the cluster's token is there, is not empty, and is its owner's alone."""
    try:
        state, empty = path.stat(), not path.read_text().strip()
    except OSError as error:
        fix = "a manifest's file_mounts must bring the cluster's token there"
        return Finding("error", f"{path}: {error.strerror}", "token", fix)
    if empty:
        return Finding("error", f"{path} is empty", "token", "it must hold the cluster's token")
    if stat.S_IMODE(state.st_mode) & 0o077:
        what = f"{path} can be read by others (mode {stat.S_IMODE(state.st_mode):04o})"
        return Finding("warning", what, "token", f"chmod 600 {path}")
    return Finding("ok", f"{path}, its owner's alone", "token")


def route(to: str | None = None, table: Path = Path("/proc/net/route")) -> list[Finding]:
    """Whether this node has an address that others can reach; without a default route Ray takes 127.0.0.1.

    Args:
        to: The head, on a worker.
    """
    findings = []
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((to or ELSEWHERE, 9))
            own = str(probe.getsockname()[0])
    except OSError as error:
        what = f"no way to {to}: {error.strerror or error}" if to else "no way out of this machine"
        return [Finding("error", what, "route", "give the node a default route (ip route add default via ...)")]
    if own.startswith("127.") and not (to or "").startswith("127."):
        findings.append(Finding("error", f"its own address is {own}", "route", "give the node an address others reach"))
    rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
    if not any(len(row) > 7 and row[1] == "00000000" and row[7] == "00000000" for row in rows):
        what = "no default route: parts of Ray will take 127.0.0.1 for this node's address"
        findings.append(Finding("warning" if to else "error", what, "route", "ip route add default via <gateway>"))
    return findings or [Finding("ok", f"own address {own}", "route")]


def gpu(wanted: bool, if_missing: Level = "error", nvidia_smi: str | None = None) -> Finding:
    """Whether there is a GPU where one is wanted, and a driver that is new enough for the installed torch.

    Args:
        wanted: The configuration has a model on a GPU and this node is to run it.
        if_missing: `warning` where nobody knows what this node is for.
        nvidia_smi: The program that is asked; default the one in PATH.
    """
    fix = "install NVIDIA's driver (a container: --gpus all), or run its models elsewhere or with device: cpu"
    missing = Finding(if_missing, "no GPU answers nvidia-smi", "gpu", fix)
    nvidia_smi = nvidia_smi or shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return missing if wanted else Finding("ok", "none, none wanted", "gpu")
    query = _run([nvidia_smi, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    rows = [[cell.strip() for cell in line.split(",")] for line in query.splitlines() if line.count(",") == 2]
    if not rows:
        return missing if wanted else Finding("ok", "none answers, none wanted", "gpu")
    return driver_fits(f"{len(rows)} x {rows[0][0]}, driver {rows[0][1]}", wanted, torch_cuda(), driver_cuda(_run([nvidia_smi])))


def driver_fits(shown: str, wanted: bool, built: tuple[int, int] | None, driver: tuple[int, int] | None) -> Finding:
    """Whether the installed torch can use the GPU that is there; minor releases of CUDA go with each other.

    Args:
        shown: The GPU, for the reader.
        built: The CUDA release that torch is built for; None is CPU.
        driver: The newest that the driver knows; None when it does not say.
    """
    if built is None:
        if not wanted:
            return Finding("ok", f"{shown}; torch is built for CPU, no GPU wanted", "gpu")
        return Finding("error", f"{shown}, but torch is built for CPU", "gpu", "run setup.sh with TIDEPOOL_DEVICE=gpu")
    if driver is not None and driver[0] < built[0]:
        what = f"{shown}, knows CUDA {driver[0]}.{driver[1]}, torch is built for CUDA {built[0]}.{built[1]}"
        return Finding("error" if wanted else "warning", what, "gpu", f"install a driver for CUDA {built[0]} or newer")
    return Finding("ok", f"{shown}, torch for CUDA {built[0]}.{built[1]}", "gpu")


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA release torch is built for, from its files; None for CPU, or without torch. An import would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    return _pair(re.search(r"^cuda\b[^=]*= *'(\d+)\.(\d+)", file.read_text(), re.MULTILINE)) if file.exists() else None


def driver_cuda(text: str) -> tuple[int, int] | None:
    """The newest CUDA release a driver knows, from what `nvidia-smi` prints; None when it does not say."""
    return _pair(re.search(r"CUDA (?:UMD )?Version: *(\d+)\.(\d+)", text))


def clock_offset(host: str, port: int, timeout_s: float = 3.0) -> float | None:
    """Seconds by which this node's clock is ahead of a server's, to about one second; None when it does not say.

    The `Date` header of any HTTP answer will do, a refusal too.
    """
    connection = HTTPConnection(host, port, timeout=timeout_s)
    before = time.time()
    try:
        connection.request("HEAD", "/")
        date = connection.getresponse().headers["Date"]
        # The header has whole seconds: on average it is half a second old.
        return (before + time.time()) / 2 - (parsedate_to_datetime(date).timestamp() + 0.5)
    except (OSError, HTTPException, TypeError, ValueError):
        return None
    finally:
        connection.close()


def clock(offset_s: float | None) -> Finding:
    """Tokens, certificates, usage by the minute and leases want one time on all nodes."""
    if offset_s is None:
        return Finding("ok", "nothing to compare with", "clock")
    away = abs(offset_s)
    what = f"{away:.1f} s {'ahead of' if offset_s > 0 else 'behind'} the head"
    if away <= CLOCK_WARNING_S:
        return Finding("ok", what, "clock")
    fix = "let the node follow NTP (systemd-timesyncd, chrony)"
    return Finding("error" if away > CLOCK_ERROR_S else "warning", what, "clock", fix)


def _pair(found: re.Match[str] | None) -> tuple[int, int] | None:
    return (int(found[1]), int(found[2])) if found else None


def _run(command: list[str]) -> str:
    try:
        environ = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
