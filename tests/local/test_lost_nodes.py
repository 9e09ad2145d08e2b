"""Which ended nodes count as lost: one that is killed does, one that is told to stop does not. Real Ray, three nodes here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from train_cluster import ROOT, Cluster

# Waits until so many nodes are alive, then says how many were lost, as a gateway does.
ASK = """
import sys, time
import ray
from serve_apps.exporter import lost_nodes
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
end = time.monotonic() + 90
while sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[2]) and time.monotonic() < end:
    time.sleep(0.2)
print(sum(node["Alive"] for node in ray.nodes()), lost_nodes(ray.nodes()))
"""


def alive_and_lost(cluster: Cluster, expected: int) -> tuple[int, int]:
    command = [sys.executable, "-c", ASK, f"127.0.0.1:{cluster.node['gcs_port']}", str(expected)]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    alive, lost = done.stdout.splitlines()[-1].split()  # above it Ray may tell of the node
    return int(alive), int(lost)


def test_a_killed_node_is_lost_and_a_stopped_one_is_not(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        cluster.start()
        stopped, killed = cluster.join(), cluster.join()
        assert alive_and_lost(cluster, 3) == (3, 0)
        os.kill(stopped, signal.SIGTERM)
        assert alive_and_lost(cluster, 2) == (2, 0)
        cluster.kill(killed)
        assert alive_and_lost(cluster, 1) == (1, 1)
    finally:
        cluster.stop()
