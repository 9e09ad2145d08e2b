"""Hosts on one machine: network namespaces on a bridge, each with processes, files and an sshd of its own.

A host is a process namespace whose first process keeps it alive: when that one is killed, everything on the host ends.
`/root`, `/tmp`, `/srv`, `/run` and `/dev/shm` are private and in memory; below them the paths that the project needs
(repository, Python, what the caller names) are mounted back in. Hosts know each other's names, ask no name server, and let in
who has the operator's key. The first host may run on every core, the others share them out, so that a busy engine on one host
leaves the core on which another host starts. `sweep` removes what a run that was killed left behind. Root only; `why_not` says
where the kernel forbids it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "tplan-"
FOLDERS = Path("/var/tmp")
BRIDGE = "tplan0"
LINK = "tpl-"
NETWORK = "10.77.0"
# Each with the mode of its top.
PRIVATE = {"/root": "700", "/tmp": "1777", "/srv": "755", "/run": "755", "/dev/shm": "1777"}
PAUSE = "sleep 3600"
SSHD = (
    *("PidFile=none", "UsePAM=no", "UseDNS=no", "PasswordAuthentication=no", "KbdInteractiveAuthentication=no"),
    *("PermitRootLogin=prohibit-password", "AuthorizedKeysFile=/root/.ssh/authorized_keys", "StrictModes=no"),
    *("MaxStartups=100", "Subsystem='sftp internal-sftp'"),
)
TOOLS = ("ip", "taskset", "unshare", "nsenter", "mount", "sshd", "ssh", "ssh-keygen", "rsync", "setpriv")


@dataclass(frozen=True)
class Host:
    """One host; `pid` is its first process as the machine counts."""

    name: str
    address: str
    pid: int


def why_not() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "test hosts need root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return f"missing programs: {', '.join(missing)}; apt-get install iproute2 util-linux openssh-server rsync"
    tried = _try("unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "--mount-proc", "true")
    if tried.returncode != 0:
        return f"the kernel forbids namespaces: {tried.stderr.strip()}"
    return None


class Lan:
    """Hosts `names`, there from `__enter__` to `__exit__`.

    Args:
        names: Of the hosts, at most 200.
        keep: Paths that every host sees although they lie below a private one.
    """

    def __init__(self, names: Sequence[str], keep: Sequence[Path] = ()) -> None:
        self._names = list(names)
        self._keep = _outermost([ROOT, Path(sys.base_prefix), Path(sys.prefix), *keep])
        self.hosts: list[Host] = []

    @property
    def key(self) -> Path:
        """The operator's private key."""
        return self.folder / "key"

    def __enter__(self) -> Lan:
        sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=FOLDERS))
        whole = False
        try:
            self._make()
            whole = True
        finally:
            if not whole:
                self.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop every host and take everything away."""
        sweep()
        self.hosts = []

    def run(self, host: Host, command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command line over SSH, as the operator does."""
        return self.ssh(host, command, timeout_s, "-i", str(self.key))

    def ssh(self, host: Host, command: str, timeout_s: float, *options: str) -> subprocess.CompletedProcess[str]:
        """SSH with these options only; without `-i` nobody should be let in."""
        quiet = [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "BatchMode=yes",
            "ConnectTimeout=5",
        ]
        words = [part for option in [*quiet, "IdentitiesOnly=yes", "IdentityAgent=none"] for part in ("-o", option)]
        return subprocess.run(
            ["ssh", "-F", "none", *words, *options, f"root@{host.address}", command],
            capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def enter(self, host: Host, *words: str, timeout_s: float = 60.0, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program on a host without a login; `text` is its standard input."""
        command = ["nsenter", "-t", str(host.pid), "--all", "--wd=/", "setpriv", "--pdeathsig", "KILL", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, input=text)

    def root(self, host: Host) -> Path:
        """The host's files as this machine sees them."""
        return Path(f"/proc/{host.pid}/root")

    def read(self, host: Host, path: str) -> str | None:
        """A file of a host, or None when there is none."""
        try:
            return (self.root(host) / path.lstrip("/")).read_text(errors="replace")
        except OSError:
            return None

    def processes(self, host: Host) -> dict[int, str]:
        """Command lines of what runs on a host, by this machine's pid; sshd and the first process are not among them."""
        space = os.readlink(f"/proc/{host.pid}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if os.readlink(entry / "ns/pid") != space or int(entry.name) == host.pid:
                    continue
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            if line and not line.startswith(("sshd", "/usr/sbin/sshd", PAUSE)):
                found[int(entry.name)] = line
        return found

    def _make(self) -> None:
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "host_key"))
        addresses = {name: f"{NETWORK}.{10 + number}" for number, name in enumerate(self._names)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "resolv.conf").write_text("")
        (self.folder / "bashrc").write_text("export PATH=$PATH:/usr/sbin:/sbin\n")
        _do("ip", "link", "add", BRIDGE, "type", "bridge")
        _do("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        _do("ip", "link", "set", BRIDGE, "up")
        for (name, address), cores in zip(addresses.items(), _share_cores(len(addresses)), strict=True):
            self.hosts.append(self._host(name, address, cores))
        for host in self.hosts:
            _until(f"sshd of {host.name}", lambda host=host: self.run(host, "true", 10.0).returncode == 0)  # type: ignore[misc]

    def _host(self, name: str, address: str, cores: Sequence[int]) -> Host:
        space = f"{PREFIX}{name}"
        _do("ip", "netns", "add", space)
        _do("ip", "link", "add", f"{LINK}{name}", "type", "veth", "peer", "name", "eth0", "netns", space)
        _do("ip", "link", "set", f"{LINK}{name}", "master", BRIDGE, "up")
        for words in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            # Ray takes 127.0.0.1 for its address on a host without a default route.
            ["route", "add", "default", "via", f"{NETWORK}.1"],
        ):
            _do("ip", "-n", space, *words)
        script = self.folder / f"{name}.sh"
        script.write_text(self._script(name, address))
        ready = self.folder / f"{name}.ready"
        # Two shells: the outer is the host's life line for this process, the inner is the first process of its process space.
        child = subprocess.Popen(
            ["ip", "netns", "exec", space, "taskset", "-c", ",".join(map(str, cores)),
             "unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "--propagation", "private", "--kill-child=KILL",
             "/bin/sh", str(script)],
            stdin=subprocess.DEVNULL, stdout=(self.folder / f"{name}.log").open("w"), stderr=subprocess.STDOUT,
            start_new_session=True, env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        )  # fmt: skip
        _until(f"host {name}", ready.exists, lambda: (self.folder / f"{name}.log").read_text())
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        return Host(name, address, int(children[0]))

    def _script(self, name: str, address: str) -> str:
        """What a host does first: its own files, then sshd; then it waits for the end of its children."""
        folder = self.folder
        lines = ["set -e", f"hostname {name}", "mount --make-rprivate /", "mkdir -p /run/sshd"]
        stash = f"{folder}/stash-{name}"
        for number, path in enumerate(self._keep):
            lines += [f"mkdir -p {stash}/{number}", f"mount --bind {path} {stash}/{number}"]
        lines += [f"mount -t tmpfs -o size=4g,mode={mode} tmpfs {path}" for path, mode in PRIVATE.items()]
        for number, path in enumerate(self._keep):
            if any(path.is_relative_to(private) for private in PRIVATE):
                lines += [f"mkdir -p {path}", f"mount --bind {stash}/{number} {path}"]
        options = " ".join(f"-o {option}" for option in (f"ListenAddress={address}", *SSHD))
        lines += [
            "mount -t proc proc /proc",
            f"mount --bind {folder}/hosts /etc/hosts",
            f"mount --bind {folder}/resolv.conf /etc/resolv.conf",
            f"cp {folder}/bashrc /root/.bashrc",
            "mkdir -p /run/sshd /root/.ssh",
            "chmod 700 /root/.ssh",
            f"cp {folder}/key.pub /root/.ssh/authorized_keys",
            "chmod 600 /root/.ssh/authorized_keys",
            f"/usr/sbin/sshd -f /dev/null -h {folder}/host_key {options}",
            f": > {folder}/{name}.ready",
            # The first process must reap what its host's daemons leave, and a shell does while it waits.
            f"while :; do {PAUSE} & wait $!; done",
        ]
        return "\n".join(lines) + "\n"


def sweep() -> None:
    """Take away the hosts of this and of any earlier run: processes, network, folders."""
    spaces = [line.split()[0] for line in _try("ip", "netns", "list").stdout.splitlines() if line.startswith(PREFIX)]
    for space in spaces:
        for pid in _try("ip", "netns", "pids", space).stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        _until(f"the end of {space}", lambda space=space: not _try("ip", "netns", "pids", space).stdout.split())  # type: ignore[misc]
        _try("ip", "netns", "del", space)
    # The ends of a network that is gone go a moment later, but not before the next run asks for the same names.
    for line in _try("ip", "-o", "link", "show", "type", "veth").stdout.splitlines():
        name = line.split(": ")[1].partition("@")[0]
        if name.startswith(LINK):
            _try("ip", "link", "del", name)
    _try("ip", "link", "del", BRIDGE)
    for folder in FOLDERS.glob(f"{PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _share_cores(hosts: int) -> list[list[int]]:
    """The cores of each host: all for the first, for the others an equal part, or one in turn where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    parts = max(1, min(len(cores), hosts - 1))
    return [cores, *(cores[host % parts :: parts] for host in range(hosts - 1))]


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """Each path once, without those below another."""
    found: list[Path] = []
    for path in sorted({path.resolve() for path in paths}):
        if not any(path.is_relative_to(other) for other in found):
            found.append(path)
    return found


def _try(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def _do(*words: str) -> None:
    done = _try(*words)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


def _until(what: str, check: Callable[[], bool], why: Callable[[], str] = lambda: "", timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {timeout_s:g} s: {what}\n{why()}")
        time.sleep(0.05)
