"""Where a cluster keeps its files, and the environment all its processes inherit.

`Session` names every path below the run directory; `environment` is the one place that sets variables for Ray, Serve, HAProxy
and vLLM. It starts nothing (`launch` does). Unix socket paths end at 107 bytes (HAProxy: 97) and Ray's have 75 of their own, so a
run directory with a long path is reached through a short link, `/tmp/tp-<8 hex>`, which `down` removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import haproxy, metrics_guard
from cluster.config import Config
from cluster.database import default_url
from cluster.errors import LaunchError
from cluster.preflight import free_port, is_loopback
from cluster.processes import RUN_DIR, RUN_ID

SHORT_BYTES = 22
DEFAULT_CPUS = 16
CACHE_VARIABLE = "TIDEPOOL_MODEL_CACHE"


@dataclass(frozen=True)
class Session:
    """The files of one cluster. All paths are absolute."""

    run_dir: Path

    @property
    def short(self) -> Path:
        """The run directory by a path short enough for sockets."""
        if len(os.fsencode(self.run_dir)) <= SHORT_BYTES:
            return self.run_dir
        return Path("/tmp") / f"tp-{hashlib.sha256(os.fsencode(self.run_dir)).hexdigest()[:8]}"

    @property
    def endpoint(self) -> Path:
        """What a client needs, mode 0600."""
        return self.run_dir / "endpoint.json"

    @property
    def keys(self) -> Path:
        """The secrets of the keys `up` made, mode 0600; kept across `down` so that clients need no new ones."""
        return self.run_dir / "keys.json"

    @property
    def state(self) -> Path:
        """What `down` and a second `up` need to know of the first."""
        return self.run_dir / "state.json"

    @property
    def token(self) -> Path:
        """Ray's authentication token, mode 0600."""
        return self.run_dir / "ray_token"

    @property
    def metrics_token(self) -> Path:
        """What Prometheus asks every metrics port with, mode 0600; made from Ray's token."""
        return self.run_dir / "metrics_token"

    @property
    def certificate(self) -> Path:
        """The certificate that HAProxy serves, without its key; there only with `node.tls`."""
        return self.run_dir / "h" / "endpoint.crt"

    @property
    def logs(self) -> Path:
        """The newest Ray session's logs, by a path that outlives the short link."""
        latest = self.run_dir / "ray" / "session_latest"
        return latest.with_name(os.path.basename(os.readlink(latest)) if latest.is_symlink() else latest.name) / "logs"

    def prepare(self, token: str | None = None) -> None:
        """Make the folders, the link, the tokens, HAProxy's wrapper and error files, the guard of metrics.

        Args:
            token: The cluster's token, for a node of several; a machine on its own makes one.

        Raises:
            LaunchError: the link's name is taken by something else.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir.chmod(0o700)
        for name in ("ray", "h", "tmp", "ipc", "cache"):
            (self.run_dir / name).mkdir(exist_ok=True)
        if self.short != self.run_dir:
            if not self.short.is_symlink():
                try:
                    self.short.symlink_to(self.run_dir)
                except FileExistsError as error:
                    raise LaunchError(
                        f"{self.short} is in the way; remove it, or choose a run directory with a short path"
                    ) from error
            if self.short.lstat().st_uid != os.getuid() or self.short.resolve() != self.run_dir:
                raise LaunchError(f"{self.short} leads elsewhere; remove it, or choose a run directory with a short path")
        for old in (self.run_dir / "ray").glob("session_2*"):
            # Logs of one session back stay, or they would fill the disk.
            if old != self.logs.parent:
                shutil.rmtree(old, ignore_errors=True)
        token = token or secrets.token_hex(32)
        write_private(self.token, token)
        write_private(self.metrics_token, metrics_guard.metrics_token(token))
        metrics_guard.install(self.run_dir / "h" / "python")
        haproxy.write_errors(self.run_dir / "h" / "errors")
        haproxy.write_wrapper(self.run_dir / "h" / "haproxy")

    def unlink(self) -> None:
        """Remove what only a running cluster needs: the short link, sockets, temporary files, token, endpoint and state."""
        for path in (self.endpoint, self.state, self.token, self.metrics_token):
            path.unlink(missing_ok=True)
        for name in ("h", "tmp", "ipc"):
            shutil.rmtree(self.run_dir / name, ignore_errors=True)
        if self.short != self.run_dir and self.short.is_symlink() and os.readlink(self.short) == str(self.run_dir):
            self.short.unlink()


def session_of(config: Config, run_dir: str | None = None) -> Session:
    """The session of a configuration; `run_dir` overrides the file's."""
    return Session(Path(run_dir or config.run_dir).expanduser().resolve())


def model_cache(session: Session) -> Path:
    """Where models built on the machine are kept: `$TIDEPOOL_MODEL_CACHE`, which several run directories may share, or here."""
    return Path(os.environ.get(CACHE_VARIABLE) or session.run_dir / "models").absolute()


def store_url(config: Config, session: Session) -> str:
    """SQLAlchemy URL of the store."""
    return config.store.url or default_url(session.run_dir)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, in one step."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)


def environment(config: Config, session: Session, run_id: str) -> dict[str, str]:
    """The environment of `ray start`, inherited by every process of the cluster."""
    node, short, cache = config.node, session.short, session.run_dir / "cache"
    first, last = node.replica_ports
    hard_stop = int(max(model.max_generation_s for model in config.models)) + 60
    environ = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_ID")}
    environ |= {
        # Ours: the mark by which `down` finds every process, kept readable when a process renames itself.
        RUN_ID: run_id,
        RUN_DIR: str(session.run_dir),
        "TIDEPOOL_STORE_URL": store_url(config, session),
        CACHE_VARIABLE: str(model_cache(session)),
        "SPT_NOENV": "1",
        # Ray's daemons import what `metrics_guard` put there.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(short / "h" / "python"), os.environ.get("PYTHONPATH")))),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        # Ray.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(session.token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else workers run at nice 15 and a busy machine starves the engine.
        "RAY_worker_niceness": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "DASHBOARD_METRIC_PORT": str(free_port()),
        # Serve.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
        # One event loop per replica: a hop between threads per chunk costs more than it hides.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_apps.edge:middlewares",
        # Serve looks at everything ten times a second and exports metrics as often: a tenth of a core on a machine with two.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        # The last port of the range is the fallback proxy's.
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(last - 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(last),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(short / "h" / "haproxy"),
        haproxy.BINARY_VARIABLE: str(haproxy.bundled_binary()),
        haproxy.ERRORS_DIR_VARIABLE: str(short / "h" / "errors"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(short / "h" / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(short / "h" / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(short / "h" / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(short / "h"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(short / "h" / "server-state"),
        # Twice the header limit, so that headers over it are still parsed and refused in our shape.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(2 * haproxy.HEADER_BYTES),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(node.stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(node.proxy_metrics_port),
        # A log line per request to a Python reader; the gateway counts requests itself.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # Three missed checks in a row replace a proxy: with Serve's 10 s between them a dead HAProxy is half a minute of outage.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        # A replica that does not answer is not waited for: its requests would hold it for the longest generation.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # A reload must not cut the longest generation, and its port must not be given to another before that.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(hard_stop),
        "RAY_SERVE_PORT_QUARANTINE_S": str(hard_stop + 30),
        # Prompts never reach a log.
        "RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": "0",
        "RAYLLM_HOME_DIR": str(cache / "rayllm"),
        # vLLM and what it compiles.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
        "VLLM_RPC_BASE_PATH": str(short / "ipc"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
        "TORCH_EXTENSIONS_DIR": str(cache / "torch-extensions"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "TMPDIR": str(short / "tmp"),
        "RAY_TMPDIR": str(short / "tmp"),
    }
    if node.tls is not None:
        environ[haproxy.CERTIFICATE_VARIABLE] = str(Path(node.tls.certificate).expanduser().resolve())
        environ[haproxy.KEY_VARIABLE] = str(Path(node.tls.key).expanduser().resolve())
    if is_loopback(node.host):
        # Ray turns 127.0.0.1 into the machine's own address unless told that there is one machine only.
        environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return environ


def start_command(config: Config, session: Session) -> list[str]:
    """`ray start --head ...` for this machine."""
    node = config.node
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head"]
    if is_loopback(node.host):
        command += ["--node-ip-address=127.0.0.1"]
    command += [
        f"--port={node.gcs_port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={node.dashboard_port}",
        f"--temp-dir={session.short / 'ray'}",
        f"--num-cpus={int(node.num_cpus or DEFAULT_CPUS)}",
        f"--object-store-memory={node.object_store_mb * 2**20}",
        "--disable-usage-stats",
        # Random ports below, so that two clusters fit on one machine.
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        f"--ray-client-server-port={free_port()}",
        # Nobody reads workers' output at a driver; it is in the logs.
        "--include-log-monitor=false",
    ]
    if node.num_gpus is not None:
        command.append(f"--num-gpus={int(node.num_gpus)}")
    return command


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None when there is none or it is broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
