"""What listens, and on which address: loopback only by default, and what Ray insists to open wider refuses strangers."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import grpc
import psutil
import pytest
from conftest import Endpoint

from cluster.processes import marked


def _listening(endpoint: Endpoint) -> set[tuple[str, int]]:
    pids = {process.pid for process in marked(endpoint.run_dir)}
    found = set()
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids:
            found.add((connection.laddr.ip, connection.laddr.port))
    return found


def _command(pid: int) -> bytes:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except FileNotFoundError:  # it ended meanwhile
        return b""


def _loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def _wide(endpoint: Endpoint) -> set[int]:
    return {port for address, port in _listening(endpoint) if not _loopback(address)}


def test_only_serve_replicas_listen_beyond_loopback(endpoint: Endpoint) -> None:
    port = int(endpoint.root.rsplit(":", 1)[1])
    assert ("127.0.0.1", port) in _listening(endpoint)
    # One gRPC server per Serve replica; Ray gives it every interface and no option. It is closed by the token, see below.
    replicas = [process for process in marked(endpoint.run_dir) if b"ServeReplica" in _command(process.pid)]
    assert len(_wide(endpoint)) <= len(replicas)


@pytest.mark.parametrize("method", ["HandleRequest", "HandleRequestStreaming"])
def test_replicas_refuse_calls_without_the_token(endpoint: Endpoint, method: str) -> None:
    ports = _wide(endpoint)
    assert ports, "no replica has a gRPC port any more: the docs may say so"
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            path = f"/ray.serve.ASGIService/{method}"
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.unary_stream(path)(b"", timeout=10))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, f"port {port}: {caught.value}"
