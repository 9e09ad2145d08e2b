"""A cluster on test hosts, made as an operator makes one: the shipped `cluster/manifests/local.yaml` with the hosts' addresses.

`Launcher` writes manifest and configuration into the operator's home, runs `python -m cluster up|down`, and looks at hosts as
a visitor without login would (`Lan.read`, `Lan.processes`). The commands, the provider and the start commands are the
product's own.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lan import Host, Lan

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "cluster" / "manifests" / "local.yaml"
RUN_DIR = "/srv/tidepool"
SHIPPED, CONFIG = "configs/own-hosts.yaml", "~/tidepool.yaml"
MODEL = "tidepool-chat"
HEAD_TYPE, WORKER_TYPE = "head", "gpu-1"
EXPORTS = "export RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S=5"


def configuration(**engine_kwargs: Any) -> dict[str, Any]:
    """What the cluster serves: one model that sleeps, a replica fills a host, `engine_kwargs` on top of the usual."""
    engine = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4, "dtype": "float32", **engine_kwargs}
    threads = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    # All hosts share this machine's cores: engines take what nodes that start and gateways leave.
    threads["TIDEPOOL_ENGINE_NICE"] = "19"
    return {
        "run_dir": RUN_DIR,
        "node": {"host": "0.0.0.0", "min_free_memory_mb": 1024},
        "gateway": {"admission": {"hold_s": 400}},
        "models": [
            {
                "id": MODEL,
                "model_source": "embedded:random",
                "device": "cpu",
                "cpus_per_replica": 1.5,
                # Nothing here is compiled, and the compiler's import costs seconds on every start.
                "env": {**threads, "TORCHDYNAMO_DISABLE": "1"},
                "engine_kwargs": engine,
                "autoscaling": {
                    "min_replicas": 0,
                    "max_replicas": 2,
                    # Low, so that a few clients ask for two replicas, and leave this machine the time to start a second one.
                    "target_ongoing_requests": 1,
                    "upscale_delay_s": 1,
                    "downscale_delay_s": 20,
                    "downscale_to_zero_delay_s": 12,
                },
            }
        ],
    }


@dataclass
class Launcher:
    """One cluster: `hosts[0]` is the head, the others the pool of workers; files of the operator below `home`."""

    lan: Lan
    hosts: Sequence[Host]
    home: Path
    model_cache: Path
    change: Callable[[dict[str, Any]], None] = lambda manifest: None
    steps: dict[str, float] = field(default_factory=dict)

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def workers(self) -> Sequence[Host]:
        return self.hosts[1:]

    @property
    def manifest(self) -> Path:
        return self.home / "manifest.yaml"

    def write(self, config: dict[str, Any] | None = None) -> None:
        """The operator's files: configuration, token, manifest."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "tidepool.yaml").write_text(yaml.safe_dump(config or configuration()))
        manifest = copy.deepcopy(yaml.safe_load(MANIFEST.read_text()))
        manifest["cluster_name"] = f"tp{os.getpid()}"
        manifest["idle_timeout_minutes"] = 0.1
        pool = [{"address": self.head.address, "node_type": HEAD_TYPE}]
        pool += [{"address": host.address, "node_type": WORKER_TYPE} for host in self.workers]
        manifest["provider"]["hosts"] = pool
        types = manifest["available_node_types"]
        kinds = {HEAD_TYPE: types[HEAD_TYPE], WORKER_TYPE: types[WORKER_TYPE]}
        kinds[HEAD_TYPE]["resources"] = {"CPU": 1}
        kinds[WORKER_TYPE]["resources"] = {"CPU": 2, "GPU": 1}
        kinds[WORKER_TYPE]["max_workers"] = len(self.workers)
        manifest["available_node_types"] = kinds
        manifest["max_workers"] = len(self.workers)
        manifest["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.lan.key)}
        manifest["file_mounts"] = {"~/.ray/auth_token": "~/.ray/auth_token", CONFIG: str(self.home / "tidepool.yaml")}
        manifest["setup_commands"] = []  # the hosts see this machine's installation
        for name in ("head_start_ray_commands", "worker_start_ray_commands"):
            manifest[name] = [self._here(line) for line in manifest[name]]
        manifest["provider"] = {name: self._here(value) for name, value in manifest["provider"].items()}
        self.change(manifest)
        self.manifest.write_text(yaml.safe_dump(manifest, sort_keys=False))

    def _here(self, line: Any) -> Any:
        """A command of the shipped manifest with this machine's Python and this test's configuration."""
        if not isinstance(line, str) or "cd ~/tidepool" not in line:
            return line
        here = line.replace("cd ~/tidepool", f"cd {ROOT}").replace(".venv/bin/python", sys.executable)
        return f"export TIDEPOOL_MODEL_CACHE={self.model_cache}; {EXPORTS}; {here.replace(SHIPPED, CONFIG)}"

    def command(self, *words: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """`python -m cluster ...` as the operator runs it, from a machine beside the hosts."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TIDEPOOL_"))}
        environ |= {"HOME": str(self.home)}
        return subprocess.run(
            [sys.executable, "-m", "cluster", *words], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout_s,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    def up(self) -> subprocess.CompletedProcess[str]:
        self.write()
        return self.command("up", str(self.manifest))

    def down(self) -> subprocess.CompletedProcess[str]:
        return self.command("down", str(self.manifest))

    def deploy(self, **engine_kwargs: Any) -> None:
        """A changed configuration on the head, and the command that applies it."""
        text = yaml.safe_dump(configuration(**engine_kwargs))
        done = self.lan.run(self.head, f"cat > {CONFIG} <<'END'\n{text}END\n", timeout_s=20)
        assert done.returncode == 0, done.stderr
        done = self.on_head(f".venv/bin/python -m cluster deploy {SHIPPED}", timeout_s=400)
        assert done.returncode == 0, done.stdout + done.stderr

    def on_head(self, line: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run a command line of the shipped manifest's kind on the head, over SSH."""
        return self.lan.run(self.head, self._here(f"cd ~/tidepool && {line}"), timeout_s)

    def endpoint(self, timeout_s: float = 180.0) -> dict[str, Any]:
        """What the head's deployer wrote for clients, once it is there."""
        path = f"{RUN_DIR}/endpoint.json"
        until("the head has deployed its configuration", lambda: self.lan.read(self.head, path) is not None, timeout_s, self.why)
        found: dict[str, Any] = json.loads(self.lan.read(self.head, path) or "")
        return found

    def why(self) -> str:
        """The end of what the deployer and the head's start said."""
        texts = [self.lan.read(self.head, f"{RUN_DIR}/{name}") or "" for name in ("up.log", "deploy.log")]
        return "\n".join(text[-1500:] for text in texts)

    def keep_logs(self) -> Path:
        """Copy what Ray, Serve and our commands logged on every host into the operator's home, before it is gone."""
        for host in self.hosts:
            source, target = self.lan.root(host) / RUN_DIR.lstrip("/"), self.home / "logs" / host.name
            options = {"symlinks": True, "ignore": shutil.ignore_patterns("sockets", "session_latest", "*.json")}
            shutil.copytree(source / "ray", target / "ray", **options)
            for log in source.glob("*.log"):
                shutil.copy(log, target)
        return self.home / "logs"

    def joined(self) -> list[Host]:
        """Workers on which Ray runs."""
        return [host for host in self.workers if any("raylet/raylet" in line for line in self.lan.processes(host).values())]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take and print the time of a step."""
        began = time.monotonic()
        yield
        self.steps[name] = time.monotonic() - began
        print(f"  {name}: {self.steps[name]:.1f} s", flush=True)


def until(what: str, check: Callable[[], bool], timeout_s: float, why: Callable[[], str] = lambda: "") -> float:
    """Wait for a condition; seconds it took. Raises AssertionError that says what did not come."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:g} s: {what}\n{why()}"
        time.sleep(0.2)
    return time.monotonic() - began
