"""`ray up` on test hosts to `ray down`: the first answer, autoscaling under load, updates, an attacker, and nothing left.

The tests of this file are one story of one cluster and run in order; each prints what its steps took. `TIDEPOOL_TIMELINE=FILE`
keeps the record from which `python -m bench report` draws load, replicas and hosts.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attack
import ports
import pytest
from clients import Clients, Timeline
from lan import Host, Lan
from launcher import MODEL, ROOT, RUN_DIR, Launcher, until

TWO_GPUS = "tests/cluster/two_gpus.py"
TOKEN = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={RUN_DIR}/ray_token"
# Clients, and the seconds that each pauses between two requests.
BUSY, STEADY = (6, 0.2), (2, 3.0)
# Files that only a running cluster has.
RUNNING_ONLY = ("/root/ray_bootstrap*", "/root/.ray/tidepool-*", f"{RUN_DIR}/state.json", f"{RUN_DIR}/endpoint.json")


class Story:
    """The cluster of this file, its clients and its record."""

    def __init__(self, launcher: Launcher, outsider: Host) -> None:
        self.launcher = launcher
        self.outsider = outsider
        self.endpoint: dict[str, Any] = {}
        self.clients: Clients
        self.timeline: Timeline

    @property
    def root(self) -> str:
        return f"http://{self.launcher.head.address}:8000"

    def begin(self) -> None:
        """The endpoint is known: load can be made and recorded."""
        self.endpoint = self.launcher.endpoint()
        self.clients = Clients(self.root, self.endpoint["api_key"], MODEL, tokens=12)
        name = f"{len(self.launcher.hosts)} hosts (network namespaces) on one machine"
        joined, key = self.launcher.joined, self.endpoint["admin_key"]
        self.timeline = Timeline(self.clients, self.root, MODEL, lambda: len(joined()), name, key)
        self.timeline.start()

    def ask(self, root: str | None = None, timeout_s: float = 400.0, **fields: Any) -> dict[str, Any]:
        """One whole chat completion."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **fields}
        request = urllib.request.Request(
            f"{root or self.root}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.endpoint['api_key']}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer

    def engines(self) -> dict[int, Host]:
        """vLLM's engine processes by this machine's pid, each with its host."""
        lan = self.launcher.lan
        return {
            pid: host for host in self.launcher.workers for pid, line in lan.processes(host).items() if "VLLM::EngineCore" in line
        }

    def serving(self) -> list[Host]:
        """Workers that run a vLLM engine."""
        running = set(self.engines().values())
        return [host for host in self.launcher.workers if host in running]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A step whose time is printed, with the requests that were answered and that failed meanwhile."""
        with self.launcher.step(name), self.timeline.phase(name):
            yield
        row = self.timeline.requests[-1]
        print(f"    answered {row['answered']}, failed {row['failed']}", flush=True)

    def why(self) -> str:
        """What to look at when something does not come."""
        lan, head = self.launcher.lan, self.launcher.head
        logs = f"{RUN_DIR}/ray/session_latest/logs"
        log = lan.enter(
            head,
            "sh",
            "-c",
            f"tail -n 25 {logs}/autoscaler.log {logs}/monitor.log {logs}/monitor.err {logs}/serve/controller_*.log",
        )
        return f"failures: {self.clients.failures[-3:]}\nlast sample: {self.timeline.samples[-1:]}\n{log.stdout[-6000:]}"

    def left(self) -> dict[str, list[str]]:
        """What of the cluster is still on a host: processes, listening ports, mounts, files of a running cluster."""
        lan, found = self.launcher.lan, {}
        for host in self.launcher.hosts:
            things = list(lan.processes(host).values())
            listening = lan.enter(host, "ss", "-Hltn").stdout.splitlines()
            things += [line for line in listening if not line.split()[3].endswith(":22")]
            things += sorted(mounts(lan, host) - self.mounts[host.name])
            things += lan.enter(
                host, "sh", "-c", f"ls -d ~/ray_bootstrap* ~/.ray/tidepool-* {RUN_DIR}/state.json {RUN_DIR}/endpoint.json"
            ).stdout.split()
            if things:
                found[host.name] = things
        return found

    def look(self) -> None:
        """What is mounted before anything is started."""
        self.mounts = {
            host.name: set(self.launcher.lan.enter(host, "cat", "/proc/mounts").stdout.splitlines())
            for host in self.launcher.hosts
        }


@pytest.fixture(scope="module")
def story(lan: Lan, hosts: dict[str, Host], model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    cluster = [hosts["head"], hosts["worker-1"], hosts["worker-2"]]
    launcher = Launcher(lan, cluster, tmp_path_factory.mktemp("operator"), model_cache)
    story = Story(launcher, hosts["outsider"])
    story.look()
    print()
    try:
        yield story
    finally:
        if launcher.manifest.exists() and story.left():
            print(f"\n  logs of all hosts: {launcher.keep_logs()}")
            launcher.down()


def mounts(lan: Lan, host: Host) -> set[str]:
    return set(lan.enter(host, "cat", "/proc/mounts").stdout.splitlines())


def alive(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_from_nothing_to_the_first_answer(story: Story) -> None:
    launcher = story.launcher
    with launcher.step("ray up"):
        done = launcher.up()
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert launcher.joined() == [], "no worker is wanted before anybody asks"
    with launcher.step("the head has deployed"):
        story.begin()
    with story.phase("first answer: held, a host comes, its engine starts"):
        answer = story.ask()
    assert answer["usage"]["completion_tokens"] == 4
    assert len(launcher.joined()) == 1 and len(story.serving()) == 1


def test_a_workers_proxy_answers_too(story: Story) -> None:
    worker = story.serving()[0]
    until("the worker's HAProxy serves", lambda: alive(f"http://{worker.address}:8000/healthz"), 90.0, story.why)
    assert story.ask(f"http://{worker.address}:8000")["usage"]["completion_tokens"] == 4


def test_a_stranger_gets_nothing(story: Story) -> None:
    """From a host without token and key, every open port of every node."""
    launcher = story.launcher
    with launcher.step("attack"):
        found = attack.run(launcher.lan, story.outsider, [launcher.head, *launcher.joined()], MODEL)
    print(f"    {len(found)} ports tried")
    assert {entry.kind for entry in found} >= {"gcs_server", "raylet"}, "the attacker did not find Ray"
    assert [str(entry) for entry in found if entry.breach] == []
    if os.environ.get("TIDEPOOL_WRITE_PORTS"):
        ports.write(ROOT / "docs" / "security.md", found)
    assert story.ask()["usage"]["completion_tokens"] == 4, "the attack must not have broken anything"


def test_load_brings_replicas_and_hosts(story: Story) -> None:
    story.clients.start(*BUSY)
    with story.phase("load: two replicas on two hosts"):
        until("two hosts serve", lambda: len(story.serving()) == 2, 400.0, story.why)
        until("both replicas are running", lambda: story.timeline.replicas() == 2, 180.0, story.why)
    with story.phase("two replicas serve"):
        story.clients.answer_more(20)
    assert story.clients.failures == []


def test_scale_down_under_steady_load_loses_nothing(story: Story) -> None:
    with story.phase("scale-down under load: one replica, one host"):
        story.clients.set_parallel(*STEADY)
        took = until("one replica is left", lambda: story.timeline.replicas() == 1, 180.0, story.why)
        print(f"    one replica is left after {took:.1f} s")
        until("one host is left", lambda: len(story.launcher.joined()) == 1, 200.0, story.why)
    assert story.clients.failures == []


def test_a_rolling_update_under_steady_load_loses_nothing(story: Story) -> None:
    before = set(story.engines())
    with story.phase("rolling update under load"):
        story.launcher.deploy(max_num_seqs=5)
        until("the old engine is gone", lambda: not before & set(story.engines()), 240.0, story.why)
        story.clients.answer_more(4)
    assert story.clients.failures == []


def test_without_load_everything_goes(story: Story) -> None:
    with story.phase("load ends: no replica, no host"):
        story.clients.stop()
        until("no worker is left", lambda: not story.launcher.joined(), 240.0, story.why)
    assert story.clients.failures == []
    print(f"    all requests under load: answered {story.clients.answered}, failed {len(story.clients.failures)}")


def test_a_held_request_and_a_job_bring_hosts_back(story: Story) -> None:
    """From zero: a held request is answered, and meanwhile a job gets two GPUs on different hosts, as a training run asks."""
    launcher = story.launcher
    with ThreadPoolExecutor(1) as thread:
        with story.phase("from zero: a held request is answered"):
            job = thread.submit(launcher.on_head, f"{TOKEN} .venv/bin/python {TWO_GPUS}", timeout_s=400)
            assert story.ask()["usage"]["completion_tokens"] == 4
        with story.phase("two GPUs on two hosts, for a job that asked at the same time"):
            done = job.result()
    assert done.returncode == 0, done.stdout + done.stderr
    # Ray may have remarked before that on a demand that no node met yet.
    assert set(done.stdout.splitlines()[-1].split()) == {host.address for host in launcher.workers}, done.stdout


def test_ray_down_leaves_nothing(story: Story) -> None:
    launcher = story.launcher
    story.timeline.stop()
    if os.environ.get("TIDEPOOL_TIMELINE"):
        story.timeline.write(Path(os.environ["TIDEPOOL_TIMELINE"]), launcher.steps)
    with launcher.step("ray down"):
        done = launcher.down()
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        until("nothing is left", lambda: story.left() == {}, 60.0, lambda: str(story.left()))
    print(f"  all steps: {sum(launcher.steps.values()):.0f} s")
