"""Asks every node of a running cluster how it is: one small task per node runs `doctor.checks` there.

Run by `doctor` on the head as `python -m cluster.checkup` in the cluster's environment, so that the command itself never becomes
a driver. Reads what to ask as JSON on standard input, prints the findings by node as one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import doctor, listening
from cluster.config import Config
from cluster.finding import Finding
from cluster.processes import RUN_DIR
from cluster.session import Session, session_of

ANSWER_S = 60.0
# Ray gives this resource to a cluster's head.
HEAD = "node:__internal_head__"


def on_node(text: str, head: doctor.Head | None, gpus: float) -> list[dict[str, str]]:
    """The findings of the node that this process runs on.

    Args:
        text: The configuration as JSON; files of the head mean nothing here.
        head: The head; None on it.
    """
    config = Config.model_validate_json(text)
    session = Session(Path(os.environ[RUN_DIR])) if RUN_DIR in os.environ else session_of(config)
    ours = listening.ports(session.run_dir)
    kind: doctor.Kind = doctor.kind_of(config) if head is None else "worker"
    found = doctor.checks(config, session.run_dir, kind, token=session.token, head=head, gpus=gpus, ours=ours)
    return [asdict(finding) for finding in found]


def everywhere(text: str, installed: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Ask all nodes at the same time; one that does not answer is a finding too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: HEAD not in node["Resources"])
    first = nodes[0]
    head = doctor.Head(first["NodeManagerAddress"], installed, first["MetricsExportPort"] or None)
    # No CPU of Ray's books: a node that is full, or a head that runs no work, can be asked as well.
    task = ray.remote(num_cpus=0, max_retries=0)(on_node)
    asked = {}
    for node in nodes:
        is_head = node is first
        name = f"{node['NodeManagerAddress']} ({'head' if is_head else 'worker ' + node['NodeID'][:6]})"
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        gpus = float(node["Resources"].get("GPU", 0))
        asked[name] = task.options(scheduling_strategy=here).remote(text, None if is_head else head, gpus)
    deadline = time.monotonic() + ANSWER_S
    found: dict[str, list[dict[str, str]]] = {}
    for name, answer in asked.items():
        try:
            found[name] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            found[name] = [asdict(_silent(error))]
    return found


def _silent(error: BaseException) -> Finding:
    lines = str(error).strip().splitlines()
    what = f"the checks did not run there: {type(error).__name__}: {lines[-1].strip() if lines else 'no reason given'}"
    return Finding("error", what, "node", "look at that node's logs; it must have the head's release of Tidepool")


def main() -> None:
    """Join the cluster named on standard input, print what was found."""
    import ray

    asked: dict[str, Any] = json.load(sys.stdin)
    ray.init(address=asked["address"], namespace="tidepool", log_to_driver=False, logging_level="error")
    try:
        found = everywhere(asked["config"], asked["versions"])
    finally:
        ray.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    # By its name, so that a node's process takes the function from its own files.
    from cluster import checkup

    checkup.main()
