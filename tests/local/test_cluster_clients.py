"""The load and the record of the autoscaling run, against the gateway alone: what is whole counts, what is not is a failure."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clients import Clients, Timeline
from gateways import KEY, fake_engine, gateway

from bench import autoscale_report

ENGINE, DYING, FRONT = 26060, 26061, 26062
ROOT = f"http://127.0.0.1:{FRONT}"


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """An engine that lives and one that a test kills, behind one gateway."""
    logs = tmp_path_factory.mktemp("logs")
    addresses = [f"steady=http://127.0.0.1:{ENGINE}", f"dying=http://127.0.0.1:{DYING}"]
    rate = ("--rate", "50", "--ttft", "0.05")
    with (
        fake_engine(ENGINE, logs, "--model", "steady", *rate),
        fake_engine(DYING, logs, "--model", "dying", *rate) as dying,
        gateway(FRONT, addresses, logs, "--slots", "4"),
    ):
        yield dying


def until(what: str, check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def test_whole_answers_count_and_the_record_shows_the_load(engines, tmp_path: Path):
    clients = Clients(ROOT, KEY, "steady", tokens=10)
    timeline = Timeline(clients, f"{ROOT}/v1", "steady", hosts=lambda: 3, name="one gateway")
    timeline.start()
    with timeline.phase("six"):
        clients.start(parallel=6)
        until("four run and two wait", lambda: any((s["running"], s["queued"]) == (4, 2) for s in list(timeline.samples)))
        clients.answer_more(12)
    with timeline.phase("two"):
        clients.set_parallel(2)
        seen = len(timeline.samples)
        until("two run", lambda: any((s["running"], s["queued"]) == (2, 0) for s in timeline.samples[seen:]))
    clients.stop()
    asked = clients.answered
    timeline.mark("over")
    assert clients.failures == [] and timeline.replicas() == 1
    assert all(0.2 < seconds < 10 for seconds in clients.latencies), clients.latencies
    file = tmp_path / "new" / "timeline.json"
    timeline.write(file, {"first": 1.25})
    assert clients.answered == asked, "a client went on after stop"
    document = json.loads(file.read_text())
    assert document["kind"] == "autoscale" and document["machine"]["cores"] > 0 and document["started"].startswith("20")
    assert [mark["text"] for mark in document["marks"]] == ["six", "two", "over"]
    assert document["steps"] == [{"name": "first", "seconds": 1.25}]
    six, two = document["requests"]
    assert six["answered"] >= 12 and 0 < six["answered"] + two["answered"] <= asked and six["failed"] + two["failed"] == 0
    assert all(sample["hosts"] == 3 and sample["replicas"] == 1 for sample in document["samples"])
    assert {sample["offered"] for sample in document["samples"]} >= {6, 2}
    times = [sample["t"] for sample in document["samples"]]
    assert times == sorted(times) and times[-1] / len(times) < 1.0
    assert "| six |" in autoscale_report.markdown(document)


def test_a_wrong_key_and_a_short_answer_are_failures_with_their_reasons(engines):
    for clients, reason in (
        (Clients(ROOT, "tp-wrong", "steady"), "status 401"),
        (Clients(ROOT, KEY, "nobody"), "status 404"),
        (Clients("http://127.0.0.1:26069", KEY, "steady"), "connection: ConnectionRefusedError"),
        (Clients(ROOT, KEY, "steady", tokens=500, timeout_s=1.0), "not over after 1 s"),
    ):
        clients.start(parallel=1)
        until(reason, lambda seen=clients: bool(seen.failures))
        clients.stop()
        assert clients.answered == 0 and clients.failures[0].reason.startswith(reason), clients.failures


def test_the_load_ends_by_itself_and_says_so(engines):
    clients = Clients(ROOT, KEY, "steady", tokens=1, most_requests=5)
    clients.start(parallel=2)
    with pytest.raises(AssertionError, match="the load is over"):
        clients.answer_more(100)
    clients.stop()
    assert clients.answered == 5
    assert [failure.reason for failure in clients.failures] == ["the load is at its own bound of requests or seconds"]
    late = Clients(ROOT, KEY, "steady", tokens=1, most_s=0.3)
    late.start(parallel=1)
    until("the time is over", lambda: bool(late.failures))
    late.stop()
    assert late.answered > 0 and not [thread for thread in threading.enumerate() if "_run" in thread.name]


def test_an_engine_that_dies_is_seen_in_every_count(engines):
    """Streams that break, requests refused after that, and a `/metrics` that goes on."""
    clients = Clients(ROOT, KEY, "dying", tokens=200)
    timeline = Timeline(clients, ROOT, "dying", hosts=lambda: int(os.listdir("/nowhere") == []))
    timeline.start()
    with timeline.phase("killed"):
        clients.start(parallel=3)
        until("three run", lambda: any(sample["running"] == 3 for sample in list(timeline.samples)))
        os.killpg(engines.process.pid, signal.SIGKILL)
        until("all three broke", lambda: len(clients.failures) >= 3)
        broken = clients.failures[:3]
        assert all(failure.reason.startswith(("error event: ", "the stream ended")) for failure in broken), broken
        assert all("engine_failed" in failure.reason for failure in broken), broken
        clients.set_parallel(0)
    clients.stop()
    timeline.stop()
    assert clients.answered == 0
    assert timeline.requests[0]["answered"] == 0 and timeline.requests[0]["failed"] >= 3
    assert timeline.requests[0]["longest_s"] is None
    assert all(sample["hosts"] is None for sample in timeline.samples), "a host that cannot be counted is unknown, not zero"
