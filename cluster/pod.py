"""A node that something else starts Ray on, as KubeRay does in a pod: the run directory, and the environment as shell lines.

`node` starts Ray itself; here KubeRay's own `ray start` does, with ports and resources of its choice, and needs
`session.environment` around it: one place for the variables on every kind of node. A pod ends with its container: nothing is
cleaned here.
Caller: `python -m cluster environment`, whose output `docker/pod.sh` evaluates.
"""

from __future__ import annotations

import os
import shlex
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster import processes
from cluster.config import Config
from cluster.errors import LaunchError
from cluster.preflight import is_loopback
from cluster.session import environment, session_of
from cluster.steps import write_state

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
# The pod's own: Ray's files stay in /tmp/ray, which the autoscaler's container shares, and metrics where Prometheus looks.
PODS_OWN = ("TMPDIR", "RAY_TMPDIR", "AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")


def prepare(config: Config, config_path: Path, out: Callable[[str], None]) -> int:
    """Make the run directory and tell the environment of `ray start`, one `export` a line. Returns 0.

    Args:
        config: The configuration, as read from `config_path`.
        out: Takes each line; they are for a shell.

    Raises:
        LaunchError: no token, an address that others cannot reach, or Ray runs here already.
    """
    session = session_of(config)
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise LaunchError(f"{TOKEN_VARIABLE} is empty; the pod's Secret must bring the cluster's token there")
    if is_loopback(config.node.host):
        raise LaunchError(f"node.host: {config.node.host} reaches this pod only; a pod needs 0.0.0.0")
    if processes.marked(session.run_dir):
        raise LaunchError(f"{session.run_dir} is in use: Ray runs in this pod already")
    session.prepare(token)
    run_id = uuid.uuid4().hex
    write_state(config, config_path, session, run_id)
    for line in exports(environment(config, session, run_id), os.environ):
        out(line)
    return 0


def exports(wanted: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """What a shell that has `present` must export to have `wanted`; what is not wanted stays as the pod has it."""
    changed = {name: value for name, value in wanted.items() if name not in PODS_OWN and present.get(name) != value}
    return [f"export {name}={shlex.quote(value)}" for name, value in sorted(changed.items())]
