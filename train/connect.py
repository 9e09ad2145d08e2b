"""Ray for a command: the cluster of this project that runs, or a private one that ends with the command.

A cluster is ours when the configuration's run directory says so (`state.json` and `ray_token`, written by `python -m cluster up`)
and it answers. Called by `train.run` and by the other commands that need Ray; in a process that is part of a Ray cluster already,
that one is used. It starts no daemon that outlives the process.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.config import Config
from cluster.errors import TrainError
from cluster.preflight import is_loopback
from cluster.session import read_json, session_of, write_private
from cluster.train_config import SPINS

STORE_BYTES = 200 * 2**20
PREFIX = "tpt-"  # of a private cluster's folder; then comes the command's pid. Short: Ray's sockets are below it


@dataclass(frozen=True)
class Connection:
    """How this process is connected. `shared`: the cluster outlives it."""

    shared: bool
    address: str


@contextmanager
def connected(config: Config, cpus: float, namespace: str) -> Iterator[Connection]:
    """Connect, and disconnect or stop at the end.

    Args:
        config: Names the run directory and the cluster's port.
        cpus: Logical CPUs that a private cluster offers at least.
        namespace: Ray's, for named actors.

    Raises:
        TrainError: the cluster that runs cannot be joined.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield Connection(True, "")
        return
    session = session_of(config)
    state = read_json(session.state)
    if state is not None and session.token.exists() and _answers(config.node.gcs_port):
        address = f"127.0.0.1:{config.node.gcs_port}"
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(session.token)}
        if is_loopback(config.node.host):
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        import ray

        try:
            ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (ConnectionError, RuntimeError) as error:
            raise TrainError(f"the cluster of {session.run_dir} does not let this command in: {error}") from error
        try:
            yield Connection(True, address)
        finally:
            ray.shutdown()
        return
    with private(cpus, namespace) as connection:
        yield connection


@contextmanager
def private(cpus: float, namespace: str) -> Iterator[Connection]:
    """A cluster of this process alone; its daemons die with it."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_ID"):
        os.environ.pop(name, None)
    _sweep()
    # Else workers run at nice 15.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # see train.supervisor
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    write_private(folder / "token", secrets.token_hex(32))
    # Ray reads these when it is imported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    import ray

    try:
        try:
            ray.init(
                num_cpus=max(int(cpus + 0.999), os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
                namespace=namespace,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:  # Ray's time-outs have no class of their own
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise TrainError(f"Ray does not start on this machine, which may be too busy: {reason}; try again") from error
        yield Connection(False, "")
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Remove the folders of private clusters whose command was killed: nobody else does."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not pid.isdigit():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            continue  # somebody else's, alive


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2.0):
            return True
    except OSError:
        return False
