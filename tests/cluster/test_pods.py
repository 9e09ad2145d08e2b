"""Two test hosts as pods of `cluster/manifests/kuberay/raycluster.yaml`: its own commands, then `ray start` as KubeRay makes it.

What is not here is KubeRay itself and a kubelet. The head's pod is then lost and another one starts with its volume, as KubeRay
would do it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lan import Host, Lan

pytestmark = pytest.mark.slow  # two minutes, by name
ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster" / "manifests" / "kuberay" / "raycluster.yaml"
VOLUME = "/srv"
TOKEN = "0123456789abcdef0123456789abcdef"
MODEL = "tidepool-chat"
# A model that this machine can run, in place of the file's.
CONFIG = "configs/local-cpu.yaml --set models.0.model_source=embedded:random --set node.min_free_memory_mb=512"
# What KubeRay adds to `rayStartParams` (common/pod.go, setMissingRayStartParams).
ADDED = {"block": "true", "metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"}


def shell_of(group: dict[str, Any], **added: str) -> tuple[str, dict[str, str]]:
    """The command line and the environment of a group's pod: our words first, then KubeRay's."""
    pod = group["template"]["spec"]["containers"][0]
    words = f" {pod['command'][0]} {CONFIG} --run-dir {VOLUME}/run "
    options = {**ADDED, **added, **group["rayStartParams"]}
    start = " ".join(f"--{name}" if value == "true" else f"--{name}={value}" for name, value in options.items())
    mount = pod["volumeMounts"][0]["mountPath"]
    env = {one["name"]: one["value"].replace(mount, VOLUME, 1) for one in pod["env"]}
    ray = f"ray start {'' if 'address' in options else '--head '}{start}"
    return f"{words} && ulimit -Sn ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {ray}", env


def pod(lan: Lan, host: Host, line: str, env: dict[str, str], model_cache: Path) -> subprocess.Popen[bytes]:
    """Start it; its output is in `pod.log` on the host's volume."""
    given = {
        **env,
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "TIDEPOOL_MODEL_CACHE": str(model_cache),
    }
    words = [f"{name}={value}" for name, value in given.items()]
    inside = f'cd {ROOT} && exec /bin/bash -c -- "$0" >> {VOLUME}/pod.log 2>&1'
    command = ["nsenter", "-t", str(host.pid), "--all", "--wd=/", "env", "-i", *words, "/bin/bash", "-c", inside, line]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def until(what: str, ready: Callable[[], Any], why: Callable[[], str], timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := ready()):
        assert time.monotonic() < deadline, f"{what} not within {timeout_s:.0f} s\n{why()}"
        time.sleep(0.5)
    return found


def ask(host: Host, key: str) -> int:
    """The status of a small request; 0 when nothing answers."""
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{host.address}:8000/v1/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def empty(lan: Lan, host: Host) -> None:
    """The end of a pod: all its processes at once."""
    for number in lan.processes(host):
        os.kill(number, 9)
    until(f"the end of {host.name}", lambda: not lan.processes(host), lambda: str(lan.processes(host)), 20)


def test_pods_of_the_file_serve_and_a_new_head_goes_on(lan, hosts, model_cache):
    spec = yaml.safe_load(FILE.read_text().split("\n---\n")[0])["spec"]
    head, worker = hosts["head"], hosts["worker-1"]
    head_line, head_env = shell_of(spec["headGroupSpec"], **{"dashboard-host": "0.0.0.0"})
    # The cpu group; here it runs the engine too, for this machine has no GPU.
    line, env = shell_of(spec["workerGroupSpecs"][0], address=f"{head.address}:6379", **{"num-cpus": "4"})

    def why() -> str:
        return "\n".join(f"{host.name}: {(lan.read(host, f'{VOLUME}/pod.log') or '')[-3000:]}" for host in (head, worker))

    def endpoint() -> dict[str, Any] | None:
        text = lan.read(head, f"{VOLUME}/run/endpoint.json")
        return json.loads(text) if text else None

    running = []
    try:
        begun = time.monotonic()
        running += [pod(lan, head, head_line, head_env, model_cache), pod(lan, worker, line, env, model_cache)]
        first = until("the first deployment", endpoint, why, 240)
        assert ask(head, first["api_key"]) == 200, why()
        assert not any("VLLM" in command for command in lan.processes(head).values()), "the head runs no model"
        print(f"\n  pods to the first answer  {time.monotonic() - begun:6.1f} s", flush=True)

        begun = time.monotonic()
        empty(lan, head)
        # Its /tmp and /dev/shm end with the pod, its volume stays.
        lan.enter(head, "sh", "-c", "rm -rf /tmp/ray /dev/shm/*")
        lan.enter(head, "rm", f"{VOLUME}/run/endpoint.json")
        running.append(pod(lan, head, head_line, head_env, model_cache))
        again = until("the second deployment", endpoint, why, 240)
        assert again["api_key"] == first["api_key"] and again["admin_key"] == first["admin_key"]
        assert ask(head, first["api_key"]) == 200, why()
        print(f"  another head to an answer {time.monotonic() - begun:6.1f} s", flush=True)
    finally:
        for host in (head, worker):
            empty(lan, host)
            lan.enter(host, "sh", "-c", f"rm -rf {VOLUME}/* /tmp/* /dev/shm/*")
        for process in running:
            process.wait(10)
