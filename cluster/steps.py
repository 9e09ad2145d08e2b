"""What `up` on one machine and a cluster's head do alike once Ray runs: models, store and keys, applications, the client's file.

Nothing here starts or stops Ray (`launch` and `node` do, and call these in their order). Drivers and builders run as processes of
their own, so that the caller never joins the cluster.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import deploy, haproxy, preflight, tls
from cluster.config import EMBEDDED_PREFIX, Config, ModelConfig
from cluster.errors import LaunchError
from cluster.session import Session, model_cache, read_json, store_url, write_private

Say = Callable[[str], None]


def write_state(config: Config, config_path: Path, session: Session, run_id: str) -> None:
    """Leave what `down` and a later `up` need to know of this start."""
    state = {
        "run_id": run_id,
        "started": time.time(),
        "digest": digest(config),
        "node": node_digest(config),
        "config": str(config_path),
        "addresses": list(preflight.addresses(config.node).values()),
    }
    write_private(session.state, json.dumps(state))


def serve(
    config: Config,
    config_path: Path,
    overrides: Sequence[str],
    session: Session,
    environ: dict[str, str],
    say: Say,
    host: str | None = None,
) -> dict[str, Any]:
    """Make the store, the keys and the applications what the configuration says, and wait until they answer.

    Safe to repeat: keys that hold are kept, and Serve changes only what is new.

    Args:
        config: The configuration, as read from `config_path` with `overrides`.
        environ: The environment the cluster was started with.
        say: Takes each line of progress.
        host: The address that clients are told; default the one this machine reaches itself by.

    Returns:
        `admin_key`, `api_key`, and `admin_key_shown`: whether an earlier call has shown the first.

    Raises:
        LaunchError: something did not start, or another command stopped the cluster meanwhile.
    """
    run_id = (read_json(session.state) or {}).get("run_id")
    models = client_models(config, session, environ, say)
    say("store and keys")
    keys = credentials(config, session, environ)
    say("starting the applications")
    serve_config = deploy.build(config_path, overrides, environ)

    def told(text: str) -> None:
        if (read_json(session.state) or {}).get("run_id") != run_id:
            raise LaunchError("another command has stopped this cluster meanwhile")
        say(text)

    deploy.deploy(config, serve_config, session.token.read_text(), told, session.logs)
    deploy.wait_ready(root_url(config), told, session.logs, trust=trust(config, session))
    endpoint = {
        "base_url": f"{root_url(config, host)}/v1",
        "api_key": keys["api_key"],
        "admin_key": keys["admin_key"],
        "run_id": run_id,
        "models": models,
    }
    if config.node.tls is not None:
        endpoint["certificate"] = str(session.certificate)
    write_private(session.endpoint, json.dumps(endpoint, indent=2) + "\n")
    write_private(session.keys, json.dumps({**keys, "admin_key_shown": True}, indent=2) + "\n")
    state = {**(read_json(session.state) or {}), "digest": digest(config), "config": str(config_path)}
    write_private(session.state, json.dumps(state))
    return keys


def client_models(config: Config, session: Session, environ: dict[str, str], say: Say) -> list[dict[str, Any]]:
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


def credentials(config: Config, session: Session, environ: dict[str, str]) -> dict[str, Any]:
    """The first keys, made or reused by a short-lived driver."""
    asked = {
        "address": f"127.0.0.1:{config.node.gcs_port}",
        "url": store_url(config, session),
        "kept": read_json(session.keys) or {},
    }
    text = run_step([sys.executable, "-m", "cluster.credentials"], environ, session, "the store did not start", json.dumps(asked))
    keys: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    write_private(session.keys, json.dumps(keys, indent=2) + "\n")
    return keys


def run_step(command: list[str], environ: dict[str, str], session: Session, failed: str, text: str = "") -> str:
    """Run a step in a session of its own, so that Ctrl-C reaches `up` alone; returns its standard output."""
    log = session.run_dir / "up.log"
    # Files, not pipes: daemons that inherit a pipe would keep its reader waiting. Steps of two commands may run at the same time.
    with log.open("ab") as errors, tempfile.TemporaryFile(dir=session.run_dir / "tmp") as output:
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


def root_url(config: Config, host: str | None = None) -> str:
    """Address of the endpoint; `host` instead of the one that this machine reaches itself by."""
    host = host or config.node.host
    host = "127.0.0.1" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    return f"{'http' if config.node.tls is None else 'https'}://{host}:{config.node.port}"


def trust(config: Config, session: Session) -> ssl.SSLContext | None:
    """What a call of ours to `root_url` knows the endpoint by; None for plain HTTP.

    Raises:
        LaunchError: the certificate cannot be used.
    """
    files = config.node.tls
    if files is None:
        return None
    if not session.certificate.exists():  # HAProxy's wrapper keeps it; before its first start there is none
        paths = (str(Path(path).expanduser().resolve()) for path in (files.certificate, files.key))
        haproxy.take_certificate(session.certificate.parent, *paths)
    return tls.trust(session.certificate)


def digest(config: Config) -> str:
    """Changes with everything."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]


def node_digest(config: Config) -> str:
    """Changes with what cannot be changed while Ray runs."""
    longest = max(model.max_generation_s for model in config.models)
    text = f"{config.node.model_dump_json()}{config.store.model_dump_json()}{longest}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def clock(out: Say) -> Say:
    """`out` with the seconds since now before each line."""
    begun = time.monotonic()
    return lambda text: out(f"[{time.monotonic() - begun:5.1f} s] {text}")
