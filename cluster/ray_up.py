"""`up`, `down` and commands on the head for a cluster of several machines, by a manifest of Ray's cluster launcher.

Ray's own `ray up` and `ray down` do the work; before it, what can be said without starting anything is said: mistakes in the
manifest (`manifest`), hosts of a pool that do not answer SSH (`pool`). A start that fails is taken back, so that no head is
left that costs and does not serve. What runs on a node is `node`'s. Caller: `python -m cluster`, when the file it is given is
a manifest.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster import manifest, pool
from cluster.errors import ConfigError, LaunchError
from cluster.machine import TOKEN

Say = Callable[[str], None]
NEW_HEAD = "Launched a new head node"  # what `ray up` says when it was not there before
OWN_START = re.compile(r"-m cluster head\b")


def up(path: Path, out: Say) -> int:
    """Make the cluster of a manifest what it says. Returns 0.

    Raises:
        ConfigError: the manifest has mistakes, one line each; nothing was started.
        LaunchError: a host does not answer, or the head did not start; a head that was not there before is gone again.
    """
    described = manifest.load_to_start(path)
    _all_answer(described)
    if make_token():
        out(f"made the cluster's token, {TOKEN.expanduser()}")
    told, status = _run(manifest.up_command(path), out)
    if status != 0:
        if NEW_HEAD in told:
            out("the head did not start; taking it back")
            _run(manifest.down_command(path), out)
        raise LaunchError(f"`ray up` failed: {_reason(told)}")
    out(f"Ray runs and the head deploys its configuration; see it come: python -m cluster status {path}")
    return 0


def down(path: Path, out: Say) -> int:
    """End every node of a manifest's cluster. Returns 0.

    Raises:
        LaunchError: `ray down` failed, with its reason.
    """
    manifest.load(path)
    told, status = _run(manifest.down_command(path), out)
    if status != 0:
        raise LaunchError(f"`ray down` failed: {_reason(told)}")
    return 0


def on_head(path: Path, command: str, options: Sequence[str] = ()) -> int:
    """Run `python -m cluster <command>` on the head, with the configuration it was started with. Returns its exit status.

    Raises:
        LaunchError: there is no head.
    """
    line = " ".join([head_line(manifest.load(path), command), *map(shlex.quote, options)])
    found = subprocess.run(
        [*manifest.ray_command("get-head-ip"), str(path)], env=environment(), capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        raise LaunchError(f"{path}: no head of this cluster runs ({_reason(found.stdout + found.stderr)}); `up` starts it")
    return subprocess.run([*manifest.ray_command("exec"), str(path), line], env=environment(), check=False).returncode


def head_line(described: dict[str, Any], command: str) -> str:
    """The head's start command with another of our commands in place of `head`.

    Raises:
        ConfigError: the manifest starts its head in another way.
    """
    for line in described["head_start_ray_commands"]:
        if OWN_START.search(line):
            return OWN_START.sub(f"-m cluster {command}", line, count=1)
    raise ConfigError("head_start_ray_commands: no `python -m cluster head` in it, so commands on this head cannot be derived")


def make_token(path: Path | None = None) -> bool:
    """Make the operator's token where there is none, mode 0600; whether it was made."""
    path = (path or TOKEN).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return True


def environment() -> dict[str, str]:
    """For Ray's launcher: no colours, no usage reports, and the project importable whatever the folder."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_UP_enable_autoscaler_v2": "1",
    }


def _all_answer(described: dict[str, Any]) -> None:
    """Each host of a pool that is expected to be on, by SSH.

    Raises:
        LaunchError: a line for each that does not answer.
    """
    if described["provider"].get("module") != pool.MODULE:
        return
    provider = {**described["provider"], "auth": described["auth"]}
    expected = [host for host in pool.pool(provider) if not host.power_on]
    with ThreadPoolExecutor(max_workers=32) as threads:
        reasons = list(threads.map(lambda host: pool.unreachable(provider, host.address), expected))
    silent = [
        f"{host.address} ({host.node_type}) does not answer SSH: {reason}; start it, or take it out of provider.hosts"
        for host, reason in zip(expected, reasons, strict=True)
        if reason is not None
    ]
    if silent:
        raise LaunchError("cannot start: " + (silent[0] if len(silent) == 1 else "".join(f"\n  {line}" for line in silent)))


def _run(command: list[str], out: Say) -> tuple[str, int]:
    """Run one of Ray's commands, showing its lines as they come; what it said, and its exit status."""
    process = subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            out(line.rstrip("\n"))
        return "".join(lines), process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _reason(told: str) -> str:
    """The line of Ray's output that says most: one of ours, else the last."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(("error:", "cannot start"))]
    ours = ours or [line for line in lines if line.startswith("Error message: ")]
    return (ours or lines or ["it said nothing"])[-1][:400]
