"""A steady light load on an endpoint, and a verdict on every answer: complete, an honest failure, or a shape no client expects.

An honest failure is a connection error, or an error in the one shape, as an answer or as the last event of a stream.
"""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CLIENT_TIMEOUT_S = 150.0


@dataclass(frozen=True)
class Result:
    """One request: `time.monotonic()` at both ends, `ok`, `connection`, `error` or `bad`, and what was seen."""

    began: float
    ended: float
    verdict: str
    detail: str = ""


def ask(root: str, key: str, body: dict[str, Any], path: str = "/v1/chat/completions") -> Result:
    """Send one request on a connection of its own and judge the answer."""
    began = time.monotonic()
    try:
        verdict, detail = _ask(root, key, body, path)
    except (OSError, http.client.HTTPException) as error:
        verdict, detail = "connection", f"{type(error).__name__} {error}"
    return Result(began, time.monotonic(), verdict, detail)


class Load:
    """Client loops in threads, half of their requests streamed, until the `with` block ends. `results` grows meanwhile."""

    def __init__(self, root: str, key: str, model: str, clients: int) -> None:
        self.results: list[Result] = []
        self._root, self._key, self._model = root, key, model
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def answered_since(self, moment: float) -> int:
        """Complete answers to requests that began after `moment`."""
        return sum(1 for result in list(self.results) if result.verdict == "ok" and result.began > moment)

    def _run(self, number: int) -> None:
        for turn in itertools.count(number):
            # A failed request is followed at once by the next, as an impatient client does, but not more than five a second.
            self.results.append(ask(self._root, self._key, chat_body(self._model, stream=turn % 2 == 0)))
            if self._stop.wait(0.2):
                return


def chat_body(model: str, stream: bool) -> dict[str, Any]:
    """A short chat request."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Where is it?"}],
        "max_tokens": 8,
        "ignore_eos": True,
        "stream": stream,
    }


def summary(results: list[Result]) -> str:
    """How many failed, the seconds from the first failure to the first answer after the last one, the longest a client waited."""
    failed = [result for result in results if result.verdict != "ok"]
    good = [result for result in results if result.verdict == "ok"]
    seconds = 0.0
    if failed:
        last = max(result.ended for result in failed)
        after = [result.ended for result in good if result.ended > last]
        seconds = (min(after) if after else time.monotonic()) - min(result.ended for result in failed)
    longest = max((result.ended - result.began for result in good), default=0.0)
    kinds = sorted({result.detail[:70] for result in failed})
    numbers = f"{len(failed):3d} of {len(results):3d} failed, for {seconds:5.1f} s; longest answer {longest:5.1f} s"
    return f"{numbers} ({'; '.join(kinds[:3])})" if kinds else numbers


def _ask(root: str, key: str, body: dict[str, Any], path: str) -> tuple[str, str]:
    address = urlsplit(root)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=CLIENT_TIMEOUT_S)
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        return _error(data, f"status {answer.status}")
    if not body.get("stream"):
        return ("ok", "") if _json(data).get("choices") else ("bad", f"200 with {data[:200]!r}")
    events = [line.removeprefix(b"data: ") for line in data.split(b"\n") if line.startswith(b"data: ")]
    if events and events[-1] == b"[DONE]":
        return "ok", ""
    return _error(events[-1] if events else data, "stream")


def _error(data: bytes, where: str) -> tuple[str, str]:
    error = _json(data).get("error")
    if isinstance(error, dict) and {"message", "type", "param", "code"} <= set(error):
        return "error", f"{where} {error['code']}"
    return "bad", f"{where} {data[:200]!r}"


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
