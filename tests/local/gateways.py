"""Gateways alone before fake engines, as processes: what the tests of relaying and of fairness start."""

from __future__ import annotations

import contextlib
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import processes

KEY = "tp-test-key"


@contextlib.contextmanager
def fake_engine(port: int, logs: Path, *flags: str) -> Iterator[processes.Server]:
    """`python -m bench fake` with these flags, up."""
    argv = [sys.executable, "-m", "bench", "fake", "--port", str(port), *flags]
    with _running(f"engine-{port}", argv, port, "/health", logs) as server:
        yield server


@contextlib.contextmanager
def gateway(port: int, engines: Sequence[str], logs: Path, *flags: str) -> Iterator[processes.Server]:
    """`python -m serve_apps gateway` before `engines` (`model=url` each), up."""
    argv = [sys.executable, "-m", "serve_apps", "gateway", "--port", str(port), "--key", KEY, *flags]
    argv += [part for engine in engines for part in ("--engine", engine)]
    with _running(f"gateway-{port}", argv, port, "/healthz", logs) as server:
        yield server


@contextlib.contextmanager
def _running(name: str, argv: list[str], port: int, health: str, logs: Path) -> Iterator[processes.Server]:
    url = f"http://127.0.0.1:{port}{health}"
    assert not processes.answers(url), f"{name}: somebody answers on port {port} already, maybe what a killed run left behind"
    server = processes.start(name, argv, logs)
    try:
        processes.wait_until(lambda: processes.answers(url), server, name, 60)
        yield server
    finally:
        processes.stop(server)


def running(port: int) -> int:
    """Requests that a fake engine works on now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        line = response.read().decode().splitlines()[0]
    return int(line.rpartition(" ")[2])
