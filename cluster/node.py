"""One node of a cluster that `ray up` made: `head`, `worker`, `leave`, `deploy`, which the manifests' start commands call.

On one machine `launch` does all of it in one go. Here Ray's autoscaler starts the nodes, each by the same configuration: the
environment of `session`, the checks of `doctor`, a private run directory, then `ray start`. The head returns as soon as Ray runs;
a process that outlives the command (`deploy`, its output in `deploy.log`) brings the models up while nodes come, so that a head
that is started again serves again without anybody's help. `leave` stops what this run directory runs on this node, nothing else.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster import doctor, gcs, launch, processes
from cluster.config import Config
from cluster.errors import LaunchError
from cluster.finding import Finding
from cluster.machine import TOKEN
from cluster.preflight import free_port, is_loopback
from cluster.session import Session, environment, read_json, session_of
from cluster.steps import clock, run_step, serve, write_state

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
Say = Callable[[str], None]


def head(config: Config, config_path: Path, out: Say, overrides: Sequence[str] = ()) -> int:
    """Start this node as the cluster's head and leave a process behind that deploys the configuration. Returns 0.

    Args:
        config: The configuration, as read from `config_path` with `overrides`.
        overrides: The `--set` and `--run-dir` options, for that process.
        out: Takes each line of progress.

    Raises:
        LaunchError: a check failed or Ray did not start; nothing of it is left running.
    """
    session, say = session_of(config), clock(out)
    if is_loopback(config.node.host):
        raise LaunchError(f"node.host: {config.node.host} reaches this machine only; a head needs 0.0.0.0 or its address")
    token = read_token()
    _empty(session, out)
    _stop_at(doctor.before_head(config, session), say)
    bootstrap = BOOTSTRAP.expanduser()
    with _whole_or_nothing(session, out):
        session.prepare(token)
        run_id = uuid.uuid4().hex
        environ = environment(config, session, run_id)
        write_state(config, config_path, session, run_id)
        say("starting Ray's head")
        command = [*_start(config, session), "--head", f"--port={config.node.gcs_port}", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-port={config.node.dashboard_port}", f"--ray-client-server-port={free_port()}"]
        if bootstrap.exists():
            command.append(f"--autoscaling-config={bootstrap}")
        run_step(command, environ, session, "Ray did not start")
        gcs.publish_versions(f"127.0.0.1:{config.node.gcs_port}", token)
        _detach(config_path, overrides, session, environ)
    say(f"Ray runs; the configuration is being deployed, see {session.run_dir / 'deploy.log'}")
    return 0


def worker(config: Config, config_path: Path, head_host: str, out: Say) -> int:
    """Start this node as a worker of the head at `head_host`. Returns 0.

    Raises:
        LaunchError: the head does not answer or refuses the token, this node has other versions, or a check failed; nothing of it
            is left running.
    """
    session, say = session_of(config), clock(out)
    token = read_token()
    _empty(session, out)
    _stop_at(doctor.before_worker(config, session, head_host), say)
    with _whole_or_nothing(session, out):
        session.prepare(token)
        run_id = uuid.uuid4().hex
        environ = environment(config, session, run_id)
        write_state(config, config_path, session, run_id)
        say(f"joining {head_host}")
        port = config.node.gcs_port
        command = [*_start(config, session), f"--address={head_host}:{port}"]
        command.append(f"--node-ip-address={_own_address(head_host, port)}")
        run_step(command, environ, session, "Ray did not start")
    say("joined")
    return 0


def leave(session: Session, out: Say) -> int:
    """Stop everything of this run directory on this node. Returns 0; `launch.down` says when it raises."""
    return launch.down(session, out)


def deploy(config: Config, config_path: Path, out: Say, overrides: Sequence[str] = ()) -> int:
    """On the head: make what is served what the configuration says, one replica after the other. Returns 0.

    Raises:
        LaunchError: no head of this run directory runs here, or an application does not start; what ran before goes on.
    """
    session, say = session_of(config), clock(out)
    state = read_json(session.state)
    if state is None or not processes.marked(session.run_dir):
        raise LaunchError(f"no head of {session.run_dir} runs on this node; run `python -m cluster head` first")
    environ = environment(config, session, str(state["run_id"]))
    serve(config, config_path, overrides, session, environ, say, _outward(config))
    say(f"ready; address and keys are in {session.endpoint}")
    return 0


def read_token(path: Path | None = None) -> str:
    """The cluster's token, which the manifest mounts on every node.

    Raises:
        LaunchError: it is missing or empty.
    """
    path = (path or TOKEN).expanduser()
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}; the manifest's file_mounts must bring the cluster's token there") from error
    if not token:
        raise LaunchError(f"{path} is empty; it must hold the cluster's token")
    return token


def _start(config: Config, session: Session) -> list[str]:
    """What both kinds of `ray start` have in common; CPUs, GPUs and labels are the manifest's, told by the autoscaler."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start"),
        f"--temp-dir={session.short / 'ray'}",
        f"--object-store-memory={config.node.object_store_mb * 2**20}",
        *("--disable-usage-stats", "--include-log-monitor=false"),
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    ]


@contextmanager
def _whole_or_nothing(session: Session, out: Say) -> Iterator[None]:
    """Whatever goes wrong inside, Ctrl-C too: nothing that was started stays."""
    whole = False
    try:
        yield
        whole = True
    finally:
        if not whole:
            launch.down(session, out)


def _empty(session: Session, out: Say) -> None:
    if processes.marked(session.run_dir):
        launch.down(session, out)


def _stop_at(findings: Sequence[Finding], say: Say) -> None:
    """Tell warnings, and stop at errors."""
    wrong = [finding for finding in findings if finding.level == "error"]
    for finding in findings:
        if finding.level == "warning":
            say(f"warning: {finding}")
    if len(wrong) == 1:
        raise LaunchError(f"cannot start: {wrong[0]}")
    if wrong:
        raise LaunchError("cannot start:\n" + "\n".join(f"  {finding}" for finding in wrong))


def _detach(config_path: Path, overrides: Sequence[str], session: Session, environ: dict[str, str]) -> None:
    """Deploy in a process of its own; it carries the mark of the run directory, so `leave` stops it too."""
    command = [sys.executable, "-m", "cluster", "deploy", str(config_path)]
    for override in overrides:
        command += ["--set", override]
    with (session.run_dir / "deploy.log").open("ab") as log:
        subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=0o077,
        )


def _own_address(head_host: str, port: int) -> str:
    """The address by which this node reaches the head, whatever other networks it is on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head_host, port))
        return str(probe.getsockname()[0])


def _outward(config: Config) -> str | None:
    """The address that clients on other machines use, as far as this node knows it."""
    if config.node.host != "0.0.0.0":
        return None
    return os.environ.get("RAY_HEAD_IP") or _own_address("192.0.2.1", 9)
