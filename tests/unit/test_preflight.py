"""Ports, memory and folders before a start, and which ports are the cluster's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from cluster import listening, preflight
from cluster.config import NodeConfig
from cluster.preflight import free_port

NAMES = ("port", "gcs_port", "dashboard_port", "stats_port", "proxy_metrics_port")


def node(**changes) -> NodeConfig:
    return NodeConfig.model_validate({**{name: free_port() for name in NAMES}, "replica_ports": [20000, 20100], **changes})


@contextmanager
def taken(host: str = "127.0.0.1") -> Iterator[int]:
    """A port that this process listens on."""
    with socket.socket() as holder:
        holder.bind((host, 0))
        holder.listen(1)
        yield holder.getsockname()[1]


def test_a_port_in_use_is_named_with_the_way_out():
    with taken() as port:
        (finding,) = preflight.ports(node(gcs_port=port))
        wanted = (
            f"node.gcs_port: 127.0.0.1:{port} is in use by another process; stop it, or choose another with --set node.gcs_port="
        )
        assert str(finding).startswith(wanted)
        assert preflight.ports(node(gcs_port=port), only=["node.port"]) == []
        assert preflight.ports(node(gcs_port=port), ours=[port]) == []


def test_an_address_that_is_not_this_machines():
    (finding,) = preflight.ports(node(host="192.0.2.77"), only=["node.port"])
    assert "cannot be bound" in finding.what


def test_ports_that_collide_among_themselves():
    lines = [str(finding) for finding in preflight.ports(node(port=18123, gcs_port=18123, stats_port=20050))]
    assert any(line.startswith("node.gcs_port: port 18123 is also node.port") for line in lines)
    assert any(line.startswith("node.stats_port: port 20050 lies in node.replica_ports") for line in lines)


def test_memory():
    assert preflight.memory(node(min_free_memory_mb=0)) == []
    (finding,) = preflight.memory(node(min_free_memory_mb=10**9))
    assert finding.where == "memory" and "1000000000 MiB wanted" in finding.what


def test_the_ports_a_process_listens_on():
    with taken() as own, socket.create_connection(("127.0.0.1", own)) as talking:
        found = listening.ports_of([os.getpid()])
        assert own in found
        assert talking.getsockname()[1] not in found, "a connection is no listener"
        assert listening.ports_of([]) == frozenset()


def test_a_process_that_is_gone_listens_on_nothing(tmp_path):
    (tmp_path / "net").mkdir()
    row = "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4242 1"
    (tmp_path / "net" / "tcp").write_text(
        f"  sl  local_address ...\n{row}\n{row.replace(' 0A ', ' 01 ').replace('1F40', '1F41')}\n"
    )
    assert listening.listeners(tmp_path) == {"4242": 8000}
    assert listening.ports_of([1], tmp_path) == frozenset()
    (tmp_path / "1" / "fd").mkdir(parents=True)
    (tmp_path / "1" / "fd" / "3").symlink_to("socket:[4242]")
    (tmp_path / "1" / "fd" / "4").symlink_to("/dev/null")
    assert listening.ports_of([1, 2], tmp_path) == frozenset({8000})
