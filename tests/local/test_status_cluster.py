"""`python -m cluster status` of the shared cluster: models awake and asleep, a request that runs, a job, a screen drawn again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from client import CHAT, EMBED, chat, request, until
from conftest import CONFIG, PORTS, ROOT, Endpoint, cluster_command, shared_arguments

from cluster.config import load
from cluster.observe import Model, Observation
from cluster.session import session_of
from cluster.status import look

DASHBOARD = f"http://127.0.0.1:{PORTS['dashboard_port']}"


def status(endpoint: Endpoint, *options: str) -> str:
    """What the command prints."""
    done = cluster_command("status", str(CONFIG), *shared_arguments(endpoint.run_dir), *options)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def seen(endpoint: Endpoint) -> Observation:
    """What it prints it from."""
    _, run_dir, *settings = shared_arguments(endpoint.run_dir)
    config = load(CONFIG, [*(word for word in settings if word != "--set"), f"run_dir={run_dir}"])
    return look(config, session_of(config))


def model(endpoint: Endpoint, name: str) -> Model:
    (found,) = [model for model in seen(endpoint).models if model.application.name == name]
    return found


@pytest.fixture(scope="module", autouse=True)
def busy(endpoint: Endpoint) -> Iterator[None]:
    """Requests at the chat model, one after the other: what engines say of it takes a while to come by way of Ray's agents."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            chat(endpoint.root, endpoint.api_key, max_tokens=100, ignore_eos=True)
            stop.wait(0.5)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_one_screen(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    # Engines that have just started are not yet in the figures of Ray's agents.
    until("everybody answers", lambda: "?" not in status(endpoint), 30)
    began = time.monotonic()
    shown = status(endpoint)
    took = time.monotonic() - began
    with capsys.disabled():
        print(f"\n{shown}status took {took:.1f} s, most of it the start of Python and what it imports", file=sys.stderr)
    assert took < 10
    lines = shown.splitlines()
    assert lines[0] == f"run directory  {endpoint.run_dir}" and "ready          yes" in lines
    assert f"endpoint       {endpoint.base_url}  (keys: {endpoint.run_dir}/endpoint.json)" in lines
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["127.0.0.1"][1:3] == ["head", "head"]
    assert rows[CHAT][1:3] == ["running", "1/1"] and rows["gateway"][1:3] == ["running", "2/2"]


def test_a_job(endpoint: Endpoint) -> None:
    token = (endpoint.run_dir / "ray_token").read_text()
    job = {"entrypoint": "sleep 60", "submission_id": f"status-{time.time_ns()}", "metadata": {"job_name": "sleeper"}}
    assert request(DASHBOARD, "POST", "/api/jobs/", token, job).status == 200

    def state() -> str | None:
        return next((found.state for found in seen(endpoint).jobs or () if found.name == "sleeper"), None)

    until("the job runs", lambda: state() == "running", 30)
    assert request(DASHBOARD, "POST", f"/api/jobs/{job['submission_id']}/stop", token, {}).status == 200
    until("the job was stopped", lambda: state() == "stopped", 30)
    assert request(DASHBOARD, "DELETE", f"/api/jobs/{job['submission_id']}", token).status == 200


def test_watch_ends_with_ctrl_c(endpoint: Endpoint) -> None:
    command = [sys.executable, "-m", "cluster", "status", str(CONFIG), *shared_arguments(endpoint.run_dir), "--watch"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    screens = 0
    for line in process.stdout:
        screens += line.startswith("run directory")
        if screens == 2:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


def test_requests_and_sleep(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    # Of this moment, so a look may fall between two requests.
    until("a running request", lambda: model(endpoint, CHAT).running == 1, 10)
    waited = until("tokens per second", lambda: (model(endpoint, CHAT).tokens_per_s or 0) > 0, 30)
    with capsys.disabled():
        print(f"\ntokens per second were there after {waited:.1f} s", file=sys.stderr)
    found = model(endpoint, CHAT)
    assert found.queued == 0 and found.kv_use is not None
    asleep = model(endpoint, EMBED).application
    replicas = request(endpoint.root, "GET", "/readyz").data["models"][EMBED]["replicas"]
    assert (asleep.replicas, asleep.state) == (replicas, "running" if replicas else "asleep")
