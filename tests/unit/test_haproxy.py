"""Ray's own HAProxy configuration, rendered by Ray's own code, comes out hardened and is served by the real HAProxy."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cluster import haproxy
from cluster.preflight import free_port

RENDER = textwrap.dedent(
    """
    import sys
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions
    folder, port, stats, metrics, backend = sys.argv[1], *map(int, sys.argv[2:])
    api = HAProxyApi(
        HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=port, keep_alive_timeout_s=5),
            socket_path=f"{folder}/admin.sock", server_state_base=folder, server_state_file=f"{folder}/state",
            stats_port=stats, metrics_port=metrics, has_received_routes=True, has_received_servers=True, is_head=True,
            hard_stop_after_s=5,
        ),
        {"app": BackendConfig(name="app", path_prefix="/app", app_name="app",
                              servers=[ServerConfig(name="one", host="127.0.0.1", port=backend)])},
        config_file_path=f"{folder}/haproxy.cfg",
    )
    api._generate_config_file_internal()
    """
)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """`(folder, port of the frontend)`: a configuration from Ray's template with one dead backend, and our error files."""
    folder = tmp_path_factory.mktemp("h")
    ports = [free_port() for _ in range(4)]
    environ = {
        **os.environ,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "32768",
    }
    subprocess.run([sys.executable, "-c", RENDER, str(folder), *map(str, ports)], check=True, env=environ)
    haproxy.write_errors(folder / "errors")
    return folder, ports[0]


@pytest.fixture(scope="module")
def served(rendered):
    """The frontend's port, with the real HAProxy behind our wrapper."""
    folder, port = rendered
    (folder / "served").mkdir()
    config = folder / "served" / "haproxy.cfg"
    config.write_text((folder / "haproxy.cfg").read_text())
    wrapper = folder / "haproxy"
    haproxy.write_wrapper(wrapper)
    environ = {
        **os.environ,
        haproxy.BINARY_VARIABLE: str(haproxy.bundled_binary()),
        haproxy.ERRORS_DIR_VARIABLE: str(folder / "errors"),
    }
    # As Ray starts it, but for a shorter wait for a request header.
    config.write_text(haproxy.harden(config.read_text(), str(folder / "errors")).replace("http-request 30s", "http-request 1s"))
    process = subprocess.Popen([wrapper, "-db", "-f", str(folder / "haproxy.cfg"), "-c"], env=environ)
    assert process.wait() == 0
    process = subprocess.Popen([haproxy.bundled_binary(), "-db", "-f", str(config)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    yield port
    process.kill()
    process.wait()


def test_only_the_frontend_may_leave_the_loopback_and_the_socket_is_private(rendered):
    folder, port = rendered
    text = haproxy.harden((folder / "haproxy.cfg").read_text(), "/errors")
    binds = re.findall(r"^\s*bind (\S+)", text, re.M)
    assert len(binds) == 3 and all(bind.startswith("127.0.0.1:") for bind in binds)
    assert "mode 666" not in text and "mode 600 level admin" in text
    assert f"bind 127.0.0.1:{port}" in text


def test_hardening_twice_changes_nothing_more(rendered):
    once = haproxy.harden((rendered[0] / "haproxy.cfg").read_text(), "/errors")
    assert haproxy.harden(once, "/errors") == once
    assert once.count("timeout http-request") == 1
    returned = [line for line in once.splitlines() if "http-request return" in line]
    assert "text/plain" not in "".join(line for line in returned if "status 5" in line or "status 404" in line)


def test_the_wrapper_becomes_haproxy_with_the_same_pid_and_arguments(tmp_path):
    wrapper = tmp_path / "haproxy"
    haproxy.write_wrapper(wrapper)
    config = tmp_path / "c.cfg"
    config.write_text("defaults\n    mode http\n    timeout client 1s\n    timeout server 1s\n    timeout connect 1s\n")
    environ = {**os.environ, haproxy.BINARY_VARIABLE: "/bin/sleep", haproxy.ERRORS_DIR_VARIABLE: str(tmp_path)}
    process = subprocess.Popen([wrapper, "30"], env=environ)
    deadline = time.monotonic() + 10
    line = b""
    while time.monotonic() < deadline and line != b"/bin/sleep\x0030\x00":
        line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    process.kill()
    process.wait()
    assert line == b"/bin/sleep\x0030\x00"
    assert wrapper.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/nothing", 404, "not_found"),
        ("/-/routes", 404, "not_found"),
        ("/-/anything", 404, "not_found"),
        ("/-/ROUTES", 404, "not_found"),
        ("/app/x", 503, "unavailable"),
    ],
)
def test_every_error_is_json_with_its_own_status(served, path, status, code):
    connection = http.client.HTTPConnection("127.0.0.1", served, timeout=10)
    connection.request("GET", path)
    reply = connection.getresponse()
    body = json.loads(reply.read())
    assert (reply.status, reply.getheader("content-type"), body["error"]["code"]) == (status, "application/json", code)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (reply.getheader("retry-after") == "1") == (status == 503)


def test_large_headers_are_refused_in_our_shape(served):
    connection = http.client.HTTPConnection("127.0.0.1", served, timeout=10)
    connection.request("GET", "/app/x", headers={"x-long": "y" * 20_000})
    reply = connection.getresponse()
    assert (reply.status, json.loads(reply.read())["error"]["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"GARBAGE\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nx: " + b"y" * 90_000 + b"\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nhost:", 408)],
    ids=["not HTTP", "headers over the buffer", "half a header"],
)
def test_bytes_that_are_no_request_are_refused(served, sent, status):
    with socket.create_connection(("127.0.0.1", served), timeout=10) as client:
        client.sendall(sent)
        assert _read(client).startswith(f"HTTP/1.1 {status} ".encode())


def _read(client):
    answer = b""
    while True:
        try:
            chunk = client.recv(65536)
        except ConnectionResetError:
            return answer
        if not chunk:
            return answer
        answer += chunk


def test_no_backends_yet_is_a_503_and_later_the_last_ones_are_served(rendered, tmp_path):
    text = haproxy.harden((rendered[0] / "haproxy.cfg").read_text(), "/errors")
    empty = "\n".join(line for line in text.splitlines() if "use_backend" not in line) + "\n"
    kept = tmp_path / "last.cfg"
    first = haproxy.with_backends(empty, kept)
    assert "status 503 default-errorfiles" in first.split("\nbackend default_backend")[1]
    assert haproxy.with_backends(text, kept) == text
    assert haproxy.with_backends(empty, kept) == text


def test_generation_is_sent_again_and_nothing_else(rendered):
    text = haproxy.harden((rendered[0] / "haproxy.cfg").read_text(), "/errors")
    assert text.count("retry-on conn-failure empty-response") == 1
    (rule,) = re.findall(r"disable-l7-retry if !\{ path (.*) \}", text)
    assert "/v1/chat/completions" in rule.split() and "admin" not in rule


def test_a_new_haproxy_takes_over_from_one_whose_manager_died(rendered, tmp_path):
    port = free_port()
    wrapper, config = tmp_path / "haproxy", tmp_path / "haproxy.cfg"
    haproxy.write_wrapper(wrapper)
    config.write_text(
        f"global\n    stats socket {tmp_path}/admin.sock mode 600 level admin expose-fd listeners\n"
        "defaults\n    mode http\n    timeout client 5s\n    timeout server 5s\n    timeout connect 5s\n"
        f"frontend http_frontend\n    bind 127.0.0.1:{port}\n    use_backend x\nbackend x\n    http-request return status 200\n"
    )
    environ = {
        **os.environ,
        haproxy.BINARY_VARIABLE: str(haproxy.bundled_binary()),
        haproxy.ERRORS_DIR_VARIABLE: str(rendered[0] / "errors"),
    }
    command = [wrapper, "-db", "-f", str(config), "-dR"]
    first = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
    _until_served(port)
    assert os.getpgid(first.pid) == first.pid, "it would be killed with its manager's process group"
    second = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
    try:
        statuses = set()
        while first.poll() is None:
            statuses.add(_until_served(port))
        assert statuses == {200} == {_until_served(port)}
        assert second.poll() is None
    finally:
        first.kill()
        second.kill()
        first.wait()
        second.wait()


def _until_served(port):
    """Status of the first answer; connections are refused only before there is any HAProxy."""
    deadline = time.monotonic() + 15
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
        finally:
            connection.close()
