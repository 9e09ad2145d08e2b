"""`up` and `down`: the life of one cluster on this machine.

`up` goes preflight, Ray head, store and keys, Serve applications, ready, and leaves `endpoint.json`; whatever stops it on the way
(an error, Ctrl-C) stops everything it started. `down` finds the processes by the mark in their environment, not by what a file
says, so it works after any crash. Neither ever runs `ray stop`, which would stop other people's clusters too. The variables are
`session`'s, what must be true beforehand is `preflight`'s, what follows once Ray runs is in `steps`. Caller: `python -m cluster`.
"""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cluster import deploy, preflight, processes, tls
from cluster.config import Config
from cluster.errors import LaunchError
from cluster.session import Session, environment, read_json, session_of, start_command
from cluster.steps import clock, digest, node_digest, run_step, serve, write_state

Say = Callable[[str], None]


def up(config: Config, config_path: Path, out: Say, overrides: Sequence[str] = ()) -> int:
    """Start everything, or say that it already runs. Returns the exit status: 0, or 130 after Ctrl-C.

    Args:
        config: The configuration, as read from `config_path` with `overrides`.
        config_path: Its file, given on to `python -m serve_apps build`.
        out: Takes each line of progress.
        overrides: The `--set` options.

    Raises:
        LaunchError: it cannot start; nothing of it is left running.
    """
    session = session_of(config)
    say = clock(out)
    if processes.marked(session.run_dir):
        if _serves(config, session):
            return _again(config, config_path, overrides, session, out, say)
        say("an earlier cluster of this run directory is not healthy")
        down(session, out)
    wrong = preflight.problems(config, session.run_dir)
    if wrong:
        raise LaunchError("cannot start:\n" + "\n".join(f"  {line}" for line in wrong))
    run_id = uuid.uuid4().hex
    try:
        with _stop_signals():
            _start(config, config_path, overrides, session, run_id, out, say)
    except KeyboardInterrupt:
        out("interrupted")
        _clean(session, run_id, out)
        return 130
    except LaunchError:
        _clean(session, run_id, out)
        raise
    return 0


def down(session: Session, out: Say) -> int:
    """Stop every process of the cluster, check that its ports are free, remove sockets. Returns 0.

    Raises:
        LaunchError: a process does not end, or a port is still taken.
    """
    state = read_json(session.state)
    stopped = processes.stop(session.run_dir, told=out, since=(state or {}).get("started"))
    session.unlink()
    taken = []
    for host, port in (state or {}).get("addresses", []):
        reason = preflight.busy(host, port)
        if reason is not None:
            taken.append(f"{host}:{port} {reason}")
    if taken:
        raise LaunchError(f"stopped {stopped} processes, but {', '.join(taken)}")
    out(f"stopped {stopped} processes" if stopped else "nothing was running")
    if session.logs.exists():
        out(f"logs of the last session: {session.logs}")
    return 0


def _start(
    config: Config, config_path: Path, overrides: Sequence[str], session: Session, run_id: str, out: Say, say: Say
) -> None:
    """All steps of `up` after preflight."""
    session.prepare()
    environ = environment(config, session, run_id)
    write_state(config, config_path, session, run_id)
    say("starting Ray")
    run_step(start_command(config, session), environ, session, "Ray did not start")
    keys = serve(config, config_path, overrides, session, environ, say)
    say("ready")
    if not keys["admin_key_shown"]:
        out(f"\nadmin key, shown once and kept in {session.keys}: {keys['admin_key']}")
    _greet(config, session, out)


def _again(config: Config, config_path: Path, overrides: Sequence[str], session: Session, out: Say, say: Say) -> int:
    """`up` over a healthy cluster: nothing when the configuration is the same, else only the applications."""
    state = read_json(session.state) or {}
    if state.get("digest") == digest(config):
        say("already running")
    elif state.get("node") != node_digest(config):
        raise LaunchError(f"{session.run_dir} runs with other settings under node, store or run_dir; run `down` first")
    else:
        say("applying the new configuration")
        environ = environment(config, session, str(state["run_id"]))
        serve(config, config_path, overrides, session, environ, say)
    _greet(config, session, out)
    return 0


def _serves(config: Config, session: Session) -> bool:
    """Whether the cluster of this run directory finished `up` and still answers."""
    state, endpoint = read_json(session.state), read_json(session.endpoint)
    if state is None or endpoint is None or state.get("run_id") != endpoint.get("run_id"):
        return False
    root = str(endpoint.get("base_url", "")).removesuffix("/v1")
    certificate = endpoint.get("certificate")
    trusted = tls.trust(str(certificate)) if certificate else None
    return deploy.call(f"{root}/readyz", timeout_s=30.0, trust=trusted).status == 200


def _greet(config: Config, session: Session, out: Say) -> None:
    endpoint = read_json(session.endpoint) or {}
    model = next((model for model in config.models if model.task == "generate"), config.models[0])
    path, body = "chat/completions", {"model": model.id, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
    if model.task == "embed":
        path, body = "embeddings", {"model": model.id, "input": "Hello"}
    # Right where the certificate names this address; elsewhere the address in the line must be one that it names.
    cacert = f"--cacert {config.node.tls.certificate} " if config.node.tls else ""
    out(f"\nendpoint  {endpoint.get('base_url')}\nkeys      {session.endpoint}\n")
    out(
        f"curl {cacert}{endpoint.get('base_url')}/{path} \\\n  -H 'Authorization: Bearer {endpoint.get('api_key')}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'\n"
    )


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP mean what Ctrl-C means, and Ctrl-C works in a script's background job too; `nohup` is respected."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _clean(session: Session, run_id: str, out: Say) -> None:
    """`down` that a second Ctrl-C does not cut short; a cluster that a later `up` started here is left alone."""
    if (read_json(session.state) or {}).get("run_id", run_id) != run_id:
        return
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        down(session, out)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
