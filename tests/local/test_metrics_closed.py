"""Metrics tell everybody's traffic: no port of a live cluster gives them without the metrics token or an admin key."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import psutil
from client import is_error, request
from conftest import Endpoint

from cluster.processes import marked

METRICS = (b"# TYPE ", b"# HELP ")


def get(address: str, path: str, token: str | None, timeout_s: float = 10.0) -> tuple[int, bytes]:
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        connection.request("GET", path, headers={} if token is None else {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_the_gateways_are_for_administrators_and_for_prometheus(endpoint: Endpoint) -> None:
    is_error(request(endpoint.root, "GET", "/metrics"), 401, "missing_api_key")
    is_error(request(endpoint.root, "GET", "/metrics", endpoint.api_key), 403, "admin_key_required")
    token = (endpoint.run_dir / "metrics_token").read_text()
    for secret in (endpoint.admin_key, token):
        assert b"tidepool_requests_total" in request(endpoint.root, "GET", "/metrics", secret).body
    is_error(request(endpoint.root, "GET", "/v1/models", token), 401, "invalid_api_key")
    is_error(request(endpoint.root, "GET", "/admin/keys", token), 401, "invalid_api_key")


def test_rays_own_ask_for_the_token(endpoint: Endpoint) -> None:
    found = json.loads((endpoint.run_dir / "ray" / "prom_metrics_service_discovery.json").read_text())
    targets = [target for group in found for target in group["targets"]]
    assert len(targets) == 3, "a node's agent, the dashboard, the autoscaler"
    token = (endpoint.run_dir / "metrics_token").read_text()
    assert (endpoint.run_dir / "metrics_token").stat().st_mode & 0o777 == 0o600
    for target in targets:
        for wrong in (None, "guess", endpoint.api_key, (endpoint.run_dir / "ray_token").read_text()):
            status, body = get(target, "/metrics", wrong)
            assert status == 401 and not any(word in body for word in METRICS), target
        status, body = get(target, "/metrics", token)
        assert status == 200 and METRICS[0] in body, target


def test_no_other_port_gives_them_to_the_network(endpoint: Endpoint) -> None:
    """Of all that the cluster's processes listen on, HAProxy's two local pages are the only ones that ask for nothing."""
    pids = {process.pid for process in marked(endpoint.run_dir)}
    ports = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids}
    assert len(ports) > 8

    def gives(port: int) -> bool:
        try:
            status, body = get(f"127.0.0.1:{port}", "/metrics", None, timeout_s=3.0)
        except (OSError, http.client.HTTPException):
            return False  # not HTTP
        return status == 200 and any(word in body for word in METRICS)

    with ThreadPoolExecutor(16) as pool:
        open_ports = {port for port, open_ in zip(ports, pool.map(gives, ports), strict=True) if open_}
    host, proxy_metrics_port = json.loads((endpoint.run_dir / "state.json").read_text())["addresses"][4]
    assert host == "127.0.0.1" and open_ports <= {proxy_metrics_port}
