"""`up`, `down` and `status`: the life of one cluster on this machine.

`up` goes preflight, Ray head, store and keys, Serve applications, ready, and leaves `endpoint.json`; whatever stops it on the way
(an error, Ctrl-C) stops everything it started. `down` finds the processes by the mark in their environment, not by what a file
says, so it works after any crash. Neither ever runs `ray stop`, which would stop other people's clusters too. The variables are
`session`'s, what must be true beforehand is `preflight`'s, talking to Serve is `deploy`'s. `python -m cluster` is the caller.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cluster import deploy, preflight, processes
from cluster.config import EMBEDDED_PREFIX, Config, ModelConfig
from cluster.errors import LaunchError
from cluster.session import Session, environment, model_cache, read_json, session_of, start_command, store_url, write_private

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
    say = _clock(out)
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


def status(config: Config, out: Say) -> int:
    """Print one screen: processes, applications, readiness, endpoint. Returns 0 when it serves, else 1."""
    session = session_of(config)
    alive = processes.marked(session.run_dir)
    out(f"run directory  {session.run_dir}")
    out(f"processes      {len(alive)}")
    if not alive:
        return 1
    for model, line in _applications(config, session):
        out(f"application    {model}: {line}")
    answer = deploy.call(f"{_root(config)}/readyz", timeout_s=10.0)
    shown = " ".join(answer.body.decode(errors="replace").split())[:400] if answer.status else "no answer"
    out(f"ready          {'yes' if answer.status == 200 else 'no'}  {shown}")
    endpoint = read_json(session.endpoint)
    if endpoint is not None:
        out(f"endpoint       {endpoint['base_url']}  (keys: {session.endpoint})")
    return 0 if answer.status == 200 else 1


def _start(
    config: Config, config_path: Path, overrides: Sequence[str], session: Session, run_id: str, out: Say, say: Say
) -> None:
    """All steps of `up` after preflight."""
    session.prepare()
    environ = environment(config, session, run_id)
    state = {
        "run_id": run_id,
        "started": time.time(),
        "digest": _digest(config),
        "node": _node_digest(config),
        "config": str(config_path),
        "addresses": list(preflight.addresses(config.node).values()),
    }
    write_private(session.state, json.dumps(state))
    say("starting Ray")
    _run(start_command(config, session), environ, session, "Ray did not start")
    models = _models(config, session, environ, say)
    say("store and keys")
    keys = _credentials(config, session, environ)
    say("starting the applications")
    serve_config = deploy.build(config_path, overrides, environ)
    token = session.token.read_text()

    def told(text: str) -> None:
        if (read_json(session.state) or {}).get("run_id") != run_id:
            raise LaunchError("another command has stopped this cluster meanwhile")
        say(text)

    deploy.deploy(config, serve_config, token, told, session.logs)
    deploy.wait_ready(_root(config), told, session.logs)
    endpoint = {
        "base_url": f"{_root(config)}/v1",
        "api_key": keys["api_key"],
        "admin_key": keys["admin_key"],
        "run_id": run_id,
        "models": models,
    }
    write_private(session.endpoint, json.dumps(endpoint, indent=2) + "\n")
    write_private(session.keys, json.dumps({**keys, "admin_key_shown": True}, indent=2) + "\n")
    say("ready")
    if not keys["admin_key_shown"]:
        out(f"\nadmin key, shown once and kept in {session.keys}: {keys['admin_key']}")
    _greet(config, session, out)


def _again(config: Config, config_path: Path, overrides: Sequence[str], session: Session, out: Say, say: Say) -> int:
    """`up` over a healthy cluster: nothing when the configuration is the same, else only the applications."""
    state = read_json(session.state) or {}
    if state.get("digest") == _digest(config):
        say("already running")
    elif state.get("node") != _node_digest(config):
        raise LaunchError(f"{session.run_dir} runs with other settings under node, store or run_dir; run `down` first")
    else:
        say("applying the new configuration")
        environ = environment(config, session, str(state["run_id"]))
        models = _models(config, session, environ, say)
        serve_config = deploy.build(config_path, overrides, environ)
        deploy.deploy(config, serve_config, session.token.read_text(), say, session.logs)
        deploy.wait_ready(_root(config), say, session.logs)
        write_private(session.endpoint, json.dumps({**(read_json(session.endpoint) or {}), "models": models}, indent=2) + "\n")
        write_private(session.state, json.dumps({**state, "digest": _digest(config), "config": str(config_path)}))
    _greet(config, session, out)
    return 0


def _serves(config: Config, session: Session) -> bool:
    """Whether the cluster of this run directory finished `up` and still answers."""
    state, endpoint = read_json(session.state), read_json(session.endpoint)
    if state is None or endpoint is None or state.get("run_id") != endpoint.get("run_id"):
        return False
    root = str(endpoint.get("base_url", "")).removesuffix("/v1")
    return deploy.call(f"{root}/readyz", timeout_s=30.0).status == 200


def _models(config: Config, session: Session, environ: dict[str, str], say: Say) -> list[dict[str, Any]]:
    """What a client, or a bench that starts the same engine bare, needs to know of each model."""
    shown = []
    for model in config.models:
        source = model.source
        if source.startswith(EMBEDDED_PREFIX):
            from cluster import default_model, embedded

            cache = model_cache(session)
            if source == embedded.TRAINED:
                source = str(default_model.ensure(config, session, environ, cache, say))
            else:
                source = str(embedded.build(source, cache))
        shown.append(_model(model, source))
    return shown


def _model(model: ModelConfig, source: str) -> dict[str, Any]:
    return {
        "id": model.id,
        "path": model.path,
        "task": model.task,
        "engine_kwargs": {"model": source, **model.engine_kwargs},
        "env": dict(model.env),
    }


def _credentials(config: Config, session: Session, environ: dict[str, str]) -> dict[str, Any]:
    """The first keys, made or reused by a short-lived driver."""
    asked = {
        "address": f"127.0.0.1:{config.node.gcs_port}",
        "url": store_url(config, session),
        "kept": read_json(session.keys) or {},
    }
    text = _run([sys.executable, "-m", "cluster.credentials"], environ, session, "the store did not start", json.dumps(asked))
    keys: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    write_private(session.keys, json.dumps(keys, indent=2) + "\n")
    return keys


def _run(command: list[str], environ: dict[str, str], session: Session, failed: str, text: str = "") -> str:
    """Run a step in a session of its own, so that Ctrl-C reaches `up` alone; returns its standard output."""
    log, answer = session.run_dir / "up.log", session.run_dir / "tmp" / "answer"
    # Files, not pipes: daemons that inherit a pipe would keep its reader waiting.
    with log.open("ab") as errors, answer.open("w+b") as output:
        process = subprocess.Popen(
            command,
            env=environ,
            cwd=session.run_dir,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            start_new_session=True,
            umask=0o077,
        )
        process.communicate(text.encode())
        output.seek(0)
        printed = output.read().decode(errors="replace")
        if process.returncode != 0:
            errors.write(printed.encode())
    if process.returncode != 0:
        raise LaunchError(f"{failed}: {deploy.cause({'message': deploy.tail(log)})} (more in {log})")
    return printed


def _applications(config: Config, session: Session) -> Iterator[tuple[str, str]]:
    if not session.token.exists():
        return
    url = f"http://127.0.0.1:{config.node.dashboard_port}/api/serve/applications/"
    apps = deploy.call(url, token=session.token.read_text()).json().get("applications", {})
    for name, app in sorted(apps.items()):
        yield name, deploy.describe(app)


def _greet(config: Config, session: Session, out: Say) -> None:
    endpoint = read_json(session.endpoint) or {}
    model = next((model for model in config.models if model.task == "generate"), config.models[0])
    path, body = "chat/completions", {"model": model.id, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
    if model.task == "embed":
        path, body = "embeddings", {"model": model.id, "input": "Hello"}
    out(f"\nendpoint  {endpoint.get('base_url')}\nkeys      {session.endpoint}\n")
    out(
        f"curl {endpoint.get('base_url')}/{path} \\\n  -H 'Authorization: Bearer {endpoint.get('api_key')}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'\n"
    )


def _root(config: Config) -> str:
    host = config.node.host
    host = "127.0.0.1" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{config.node.port}"


def _digest(config: Config) -> str:
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]


def _node_digest(config: Config) -> str:
    """Changes with what cannot be changed while Ray runs."""
    longest = max(model.max_generation_s for model in config.models)
    text = f"{config.node.model_dump_json()}{config.store.model_dump_json()}{longest}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _clock(out: Say) -> Say:
    begun = time.monotonic()
    return lambda text: out(f"[{time.monotonic() - begun:5.1f} s] {text}")


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
