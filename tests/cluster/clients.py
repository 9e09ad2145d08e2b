"""The load of the autoscaling run and its record: `Clients` ask an endpoint for chat completions, a `Timeline` samples all.

Closed loops in threads of this process over the standard library's HTTP: each client sends its next request when the last one is
over, on a connection of its own, as a stock client on another machine would. A request is answered only when it is whole: status
200, every token that was asked for (by the engine's count), `[DONE]`. Anything else is a failure with its reason, and the test
decides how many there may be (none). Used by `test_ray_up.py`; `python -m bench report` draws what `Timeline.write` keeps.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench import machine

MOST_PARALLEL = 64
PAUSE_AFTER_FAILURE_S = 0.2
SAMPLE_S = 0.5
GAUGES = {"running": "tidepool_running_requests", "queued": "tidepool_queued_requests", "replicas": "tidepool_engine_replicas"}


@dataclass(frozen=True)
class Failure:
    """A request that was not answered whole: seconds since the epoch at its end, seconds it took, and why."""

    at: float
    seconds: float
    reason: str


class Clients:
    """So many clients of one model; `failures` and `latencies` (seconds, of answered requests) grow meanwhile.

    Args:
        base_url: `http://host:port`, or the same with `/v1`.
        tokens: What each request asks for, and must get exactly.
        timeout_s: The longest that one request may take, held or not.
        most_requests, most_s: The load ends by itself after so many requests, or so many seconds since `start`.
    """

    def __init__(
        self, base_url: str, api_key: str, model: str, tokens: int = 24, timeout_s: float = 170.0,
        most_requests: int = 20_000, most_s: float = 1200.0,
    ) -> None:  # fmt: skip
        address = urlsplit(base_url)
        self._host, self._port = str(address.hostname), address.port or 80
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json", "Connection": "close"}
        self._model, self._tokens, self._timeout_s = model, tokens, timeout_s
        self._left, self._most_s, self._until = most_requests, most_s, 0.0
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._threads: dict[int, threading.Thread] = {}
        self.parallel, self._pause_s = 0, 0.0
        self.failures: list[Failure] = []
        self.latencies: list[float] = []

    @property
    def answered(self) -> int:
        return len(self.latencies)

    def start(self, parallel: int, pause_s: float = 0.0) -> None:
        """Begin, or begin again after `stop`."""
        self._until = time.monotonic() + self._most_s
        self.set_parallel(parallel, pause_s)

    def set_parallel(self, parallel: int, pause_s: float = 0.0) -> None:
        """From now on so many clients, each with a pause between two requests; one too many ends after the one that it is at."""
        assert 0 <= parallel <= MOST_PARALLEL, parallel
        with self._lock:
            self.parallel, self._pause_s = parallel, pause_s
            self._changed.set()
            self._changed = threading.Event()
            for number in range(parallel):
                if number not in self._threads:
                    self._threads[number] = threading.Thread(target=self._run, args=(number,), daemon=True)
                    self._threads[number].start()

    def stop(self) -> None:
        """No new requests; returns when those under way are over."""
        self.set_parallel(0)
        deadline = time.monotonic() + self._timeout_s + 30.0
        for thread in list(self._threads.values()):
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a client does not end"

    def answer_more(self, count: int, timeout_s: float = 120.0) -> None:
        """Wait until so many more requests are answered. Raises AssertionError when they are not, or when the load has ended."""
        goal, deadline = self.answered + count, time.monotonic() + timeout_s
        while self.answered < goal:
            missing = f"{goal - self.answered} of {count} more answers did not come"
            assert self._threads, f"{missing}: the load is over; failures: {self.failures[-3:]}"
            assert time.monotonic() < deadline, f"{missing} in {timeout_s:g} s; failures: {self.failures[-3:]}"
            time.sleep(0.05)

    def _run(self, number: int) -> None:
        while True:
            with self._lock:
                bounded = self._left <= 0 or time.monotonic() > self._until
                if bounded and self.parallel:
                    self.failures.append(Failure(time.time(), 0.0, "the load is at its own bound of requests or seconds"))
                    self.parallel = 0
                if number >= self.parallel:
                    del self._threads[number]
                    return
                self._left -= 1
                changed, pause_s = self._changed, self._pause_s
            began = time.monotonic()
            try:
                reason = self._ask()
            except (OSError, http.client.HTTPException) as error:
                reason = f"connection: {type(error).__name__} {error}"
            seconds = time.monotonic() - began
            with self._lock:
                if reason:
                    self.failures.append(Failure(time.time(), seconds, reason))
                else:
                    self.latencies.append(seconds)
            changed.wait(PAUSE_AFTER_FAILURE_S if reason else pause_s)

    def _ask(self) -> str:
        """One streamed request; what was wrong with its answer, or nothing."""
        body = {
            "model": self._model, "messages": [{"role": "user", "content": "Where is my parcel?"}], "max_tokens": self._tokens,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        deadline = time.monotonic() + self._timeout_s
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                return f"status {answer.status}: {answer.read(300)!r}"
            return self._judge(answer, deadline)
        finally:
            connection.close()

    def _judge(self, answer: http.client.HTTPResponse, deadline: float) -> str:
        tokens, finish = None, None
        while line := answer.readline():
            if time.monotonic() > deadline:
                return f"not over after {self._timeout_s:g} s"
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                if (tokens, finish) != (self._tokens, "length"):
                    return f"{tokens} tokens instead of {self._tokens}, finish_reason {finish}"
                return ""
            if not data:
                continue  # comments keep a held request's connection open
            try:
                event = json.loads(data)
            except ValueError:
                return f"not JSON: {data[:200]!r}"
            if "error" in event:
                return f"error event: {data[:300]!r}"
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            finish = next((choice["finish_reason"] for choice in event.get("choices", ()) if choice["finish_reason"]), finish)
        return "the stream ended without [DONE]"


class Timeline:
    """Samples load, gateway and hosts twice a second in a thread, from `start` on.

    Args:
        clients: Whose `parallel` is the offered load.
        base_url: The endpoint whose `/metrics` is read; a sample without an answer has None for its gauges.
        hosts: How many hosts there are now; asked in the thread.
        name: Names the sampled places in the document, such as `4 hosts on one machine`.
        key: An admin key, which `/metrics` asks for.
    """

    def __init__(
        self, clients: Clients, base_url: str, model: str, hosts: Callable[[], int], name: str = "", key: str = ""
    ) -> None:
        self._clients, self._hosts, self._name = clients, hosts, name
        url = base_url.rstrip("/").removesuffix("/v1") + "/metrics"
        self._request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
        self._label = f'model="{model}"'
        self._began, self._started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[dict[str, Any]] = []
        self.marks: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []

    def start(self) -> None:
        """Take the first sample now."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples. A second call does nothing."""
        self._over.set()
        self._thread.join(30.0)

    def mark(self, text: str) -> None:
        """Something begins now; a line in the plot."""
        self.marks.append({"t": self._now(), "text": text})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A mark, and at the end how many requests were answered and failed meanwhile, and the longest answered one, s."""
        self.mark(name)
        answered, failed = self._clients.answered, len(self._clients.failures)
        try:
            yield
        finally:
            waits = self._clients.latencies[answered:]
            row = {"phase": name, "answered": len(waits), "failed": len(self._clients.failures) - failed}
            self.requests.append(row | {"longest_s": round(max(waits), 2) if waits else None})

    def replicas(self) -> int | None:
        """Engine replicas of the newest sample; None when the endpoint did not answer it."""
        return self.samples[-1]["replicas"] if self.samples else None

    def write(self, path: Path, steps: Mapping[str, float]) -> None:
        """Stop, and keep everything as JSON. `steps`: seconds by name."""
        self.stop()
        document = {
            "kind": "autoscale", "commit": machine.commit(Path(__file__).parent), "started": self._started, "name": self._name,
            "machine": {**machine.hardware(), "versions": machine.versions()},
            "samples": self.samples, "marks": self.marks, "requests": self.requests,
            "steps": [{"name": name, "seconds": round(seconds, 2)} for name, seconds in steps.items()],
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            sample = {"t": self._now(), "offered": self._clients.parallel, **self._gauges(), "hosts": self._count_hosts()}
            self.samples.append(sample)
            if self._over.wait(max(0.0, SAMPLE_S - (time.monotonic() - began))):
                return

    def _gauges(self) -> dict[str, int | None]:
        try:
            with urllib.request.urlopen(self._request, timeout=5) as reply:
                text = reply.read().decode()
        except (urllib.error.URLError, OSError, http.client.HTTPException):
            return dict.fromkeys(GAUGES)
        found: dict[str, int | None] = {}
        for name, metric in GAUGES.items():
            series = re.findall(rf"^{metric}{{(.*)}} (\S+)$", text, re.M)
            values = [float(value) for labels, value in series if self._label in labels]
            found[name] = int(sum(values)) if values else None
        return found

    def _count_hosts(self) -> int | None:
        try:
            return self._hosts()
        except OSError:
            return None

    def _now(self) -> float:
        return round(time.monotonic() - self._began, 2)
