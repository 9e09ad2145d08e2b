"""The arms of a comparison: servers that are started, waited for, measured and stopped.

`bare` is vLLM's own server. `ours` is the endpoint of `run/endpoint.json`, started with `python -m cluster up` when nothing
answers there, and then stopped again; one that was already up is left up. The others are in `rivals`; the routers among
them stand before the same bare server, so that engine is one process for all of them. All servers are up during the whole
run, one is loaded at a time: an idle vLLM blocks on a socket and burns no CPU (the report shows the machine's total
beside the groups, so it would be seen). Called by `suites`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import cpu, processes, rivals
from bench.endpoint import Endpoint, Model, bare_command, read
from bench.processes import Server
from cluster.errors import ConfigError, LaunchError

START_LIMIT_S = 300.0
NAMES = ("bare", "ours", "vllm-router", "litellm", "ray-llm", "ray-direct")
_BEHIND_BARE = ("bare", "vllm-router", "litellm")


@dataclass(frozen=True)
class Arm:
    """One way to reach an engine. `roots` maps the name of a process group to the pids it starts from, read anew each time."""

    name: str
    url: str
    key: str
    model: str
    roots: Callable[[], dict[str, set[int]]]
    notes: dict[str, str] = field(default_factory=dict)
    certificate: str | None = None


@dataclass(frozen=True)
class Places:
    """Where things are: files, the folder of logs and the first of twenty loopback ports the bench may take."""

    config: Path
    endpoint: Path
    bench_dir: Path
    first_port: int
    overrides: tuple[str, ...] = ()
    model: str | None = None

    @property
    def logs(self) -> Path:
        """Where the servers write."""
        return self.bench_dir / "logs"

    def port(self, offset: int) -> int:
        """One of the ports."""
        return self.first_port + offset


@contextlib.contextmanager
def running(names: list[str], places: Places, say: Callable[[str], None]) -> Iterator[tuple[list[Arm], Model]]:
    """Start the arms in order, yield them with the model they serve, stop what was started, whatever happens.

    Raises:
        ConfigError: an unknown arm, or no endpoint file and no arm that would write one.
        LaunchError: a server does not come up.
    """
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--arms: {name!r} is not one of {', '.join(NAMES)}")
    with contextlib.ExitStack() as stack:
        found: dict[str, Arm] = {}
        if "ours" in names:
            endpoint = _our_endpoint(places, stack, say)
            model = endpoint.model(places.model)
            roots, certificate = _our_roots(places.endpoint), endpoint.certificate
            found["ours"] = Arm("ours", endpoint.base_url, endpoint.api_key, model.id, roots, certificate=certificate)
        else:
            model = read(places.endpoint).model(places.model)

        def up(name: str, argv: list[str], env: dict[str, str]) -> Server:
            say(f"starting {name}")
            server = processes.start(name, argv, places.logs, env)
            stack.callback(processes.stop, server)
            return server

        if any(name in _BEHIND_BARE for name in names):
            bare = up("bare", bare_command(model, places.port(0)), engine_env(model))
            root = f"http://127.0.0.1:{places.port(0)}"
            processes.wait_until(lambda: processes.answers(f"{root}/health"), bare, "bare vLLM", START_LIMIT_S)
            found["bare"] = Arm("bare", f"{root}/v1", "", model.id, roots_of(bare))
            for name in names:
                if name in rivals.ROUTERS:
                    say(f"starting {name}")
                    rival = rivals.ROUTERS[name](
                        places.bench_dir, root, model.id, places.port(1 + 2 * list(rivals.ROUTERS).index(name))
                    )
                    server = processes.start(name, rival.argv, places.logs, rival.env)
                    stack.callback(processes.stop, server)
                    processes.wait_until(ready(rival.url, rival.key, model.id), server, name, START_LIMIT_S)
                    found[name] = Arm(name, rival.url, rival.key, model.id, roots_of(server, bare), rival.notes)
        for name in names:
            if name in ("ray-llm", "ray-direct"):
                steps = rivals.ray_serve(places.bench_dir, model, places.port(8), direct=name == "ray-direct")
                head = up(f"{name}-head", steps.head, steps.env)
                processes.wait_until(_port_open(steps.gcs_port), head, f"{name}: Ray", START_LIMIT_S)
                app = up(f"{name}-app", steps.app, steps.env)
                processes.wait_until(ready(steps.url, "", model.id), app, name, START_LIMIT_S)
                found[name] = Arm(name, steps.url, "", model.id, roots_of(head, app), steps.notes)
        yield [found[name] for name in names], model


def engine_env(model: Model) -> dict[str, str]:
    """The engine's environment, the same as inside our cluster."""
    return {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")} | model.env


def ready(url: str, key: str, model: str, certificate: str | None = None) -> Callable[[], bool]:
    """Ready is one generated token, not a process that listens."""
    body = b'{"model": "%b", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}' % model.encode()
    return lambda: processes.answers(f"{url}/chat/completions", key, body, certificate)


def roots_of(*servers: Server) -> Callable[[], dict[str, set[int]]]:
    """The groups of servers that were started here."""
    return lambda: {server.name: server.pids() for server in servers}


def _our_roots(file: Path) -> Callable[[], dict[str, set[int]]]:
    def roots() -> dict[str, set[int]]:
        return {"other of ours": cpu.marked(cpu.RUN_MARKER, read(file).run_id)}

    return roots


def _port_open(port: int) -> Callable[[], bool]:
    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    return listens


def _our_endpoint(places: Places, stack: contextlib.ExitStack, say: Callable[[str], None]) -> Endpoint:
    """The endpoint that is up, or one that is started here and stopped at the end."""
    with contextlib.suppress(ConfigError):
        endpoint = read(places.endpoint)
        if processes.answers(f"{endpoint.root}/healthz", certificate=endpoint.certificate):
            return _answering(endpoint, places)
    command = [sys.executable, "-m", "cluster"]
    args = [str(places.config), *(part for override in places.overrides for part in ("--set", override))]
    say(f"starting our endpoint: python -m cluster up {' '.join(args)}")

    def down() -> None:
        say("stopping our endpoint")
        subprocess.run([*command, "down", *args], stdout=sys.stderr, timeout=180, check=False)

    stack.callback(down)
    places.logs.mkdir(parents=True, exist_ok=True)
    log = places.logs / "ours-up.log"
    with log.open("wb") as out:
        done = subprocess.run(
            [*command, "up", *args], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise LaunchError(f"`cluster up` ended with code {done.returncode}; {log}:\n{log.read_text(errors='replace')[-1500:]}")
    return _answering(read(places.endpoint), places)


def _answering(endpoint: Endpoint, places: Places) -> Endpoint:
    asked = ready(endpoint.base_url, endpoint.api_key, endpoint.model(places.model).id, endpoint.certificate)
    processes.wait_until(asked, None, "our endpoint", START_LIMIT_S)
    return endpoint
