"""Tells Ray Serve what to run, over the dashboard's REST API, and waits until it runs.

The configuration it sends is the one `python -m serve_apps build` prints, so `up`, `serve deploy` and KubeRay run the same
thing. HTTP by the standard library, to 127.0.0.1 and past any proxy of the environment. `launch` is the caller.
"""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import Config
from cluster.errors import LaunchError

DEPLOY_LIMIT_S = 1800.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """Status and body of an HTTP answer; status 0 when nothing answered."""

    status: int
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body as a JSON object, empty when it is not one."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


def call(
    url: str,
    *,
    token: str | None = None,
    body: dict[str, Any] | None = None,
    timeout_s: float = 10.0,
    trust: ssl.SSLContext | None = None,
) -> Answer:
    """GET, or PUT when there is a body; `trust` is `tls.trust`'s. Connection errors are an answer with status 0."""
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers, method="GET" if body is None else "PUT")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))
    try:
        with opener.open(request, timeout=timeout_s) as reply:
            return Answer(reply.status, reply.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read())
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, str(error).encode())


def build(config_path: Path, overrides: Sequence[str], environ: dict[str, str]) -> dict[str, Any]:
    """Serve's configuration, from a process of its own (`cluster` may not import `serve_apps`).

    Raises:
        LaunchError: the command fails; its last line says why.
    """
    command = [sys.executable, "-m", "serve_apps", "build", str(config_path)]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise LaunchError(f"building the Serve configuration failed: {lines[-1]}")
    value = yaml.safe_load(done.stdout)
    if not isinstance(value, dict) or "applications" not in value:
        raise LaunchError("building the Serve configuration failed: it printed no applications")
    return value


def deploy(config: Config, serve_config: dict[str, Any], token: str, say: Say, logs: Path) -> None:
    """Send the configuration and wait until every application runs; each change of state is told.

    Raises:
        LaunchError: Serve refuses it, an application fails, or the time is over.
    """
    url = f"http://127.0.0.1:{config.node.dashboard_port}/api/serve/applications/"
    answer = _put(url, token, serve_config)
    if answer.status != 200:
        why = cause({"message": answer.body.decode(errors="replace")})
        raise LaunchError(f"Serve refused the configuration ({answer.status}): {why}")
    wanted = [app["name"] for app in serve_config["applications"]]
    told: dict[str, str] = {}
    deadline = time.monotonic() + DEPLOY_LIMIT_S
    while time.monotonic() < deadline:
        answer = call(url, token=token)
        apps = answer.json().get("applications", {})
        for name in wanted:
            app = apps.get(name, {})
            state = describe(app) if answer.status == 200 else "the dashboard does not answer"
            if told.get(name) != state:
                told[name] = state
                say(f"{name}: {state}")
            if app.get("status") == "DEPLOY_FAILED":
                raise LaunchError(f"{name} failed: {cause(app)}; logs: {logs}")
        if all(apps.get(name, {}).get("status") == "RUNNING" for name in wanted):
            return
        time.sleep(0.3)
    waiting = [name for name in wanted if not told.get(name, "").startswith("running")]
    raise LaunchError(f"{', '.join(waiting)} did not start within {DEPLOY_LIMIT_S:.0f} s; logs: {logs}")


def wait_ready(base_url: str, say: Say, logs: Path, limit_s: float = 600.0, trust: ssl.SSLContext | None = None) -> None:
    """Wait for the gateway's `/readyz` to say that every model that should be awake has generated a token.

    Raises:
        LaunchError: the time is over; the last answer is in the text.
    """
    deadline = time.monotonic() + limit_s
    told = ""
    answer = Answer(0, b"")
    while time.monotonic() < deadline:
        answer = call(f"{base_url}/readyz", timeout_s=30.0, trust=trust)
        if answer.status == 200:
            return
        shown = first_line(answer.body.decode(errors="replace")) if answer.status else "no answer yet"
        if shown != told:
            told = shown
            say(f"waiting for /readyz: {shown}")
        time.sleep(0.2)
    raise LaunchError(f"/readyz did not answer 200 within {limit_s:.0f} s, last {answer.status} {told}; logs: {logs}")


def describe(app: dict[str, Any]) -> str:
    """One line: state of an application and of its replicas."""
    state = str(app.get("status", "not yet known")).lower().replace("_", " ")
    parts = []
    for name, deployment in app.get("deployments", {}).items():
        counts: dict[str, int] = {}
        for replica in deployment.get("replicas", []):
            counts[str(replica["state"]).lower()] = counts.get(str(replica["state"]).lower(), 0) + 1
        shown = " ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "0 replicas"
        parts.append(f"{name.split(':')[0]} {shown}")
    return f"{state} ({'; '.join(parts)})" if parts else state


def cause(app: dict[str, Any]) -> str:
    """Why an application failed, in one line: the last exception that its own or a deployment's message holds."""
    texts = [str(app.get("message", ""))]
    texts += [str(deployment.get("message", "")) for deployment in app.get("deployments", {}).values()]
    for text in reversed(texts):
        errors = [line.strip() for line in text.splitlines() if _is_error(line)]
        if errors:
            return errors[-1][:400]
    return first_line(" ".join(text for text in texts if text)) or "no reason given"


def first_line(text: str) -> str:
    """The first line of a text that is not empty, at most 400 characters."""
    for line in text.splitlines():
        if line.strip():
            return line.strip()[:400]
    return ""


def _is_error(line: str) -> bool:
    """Whether a line of a traceback names the exception (`ValueError: ...`)."""
    head = line.strip().split(":", 1)[0]
    return ":" in line and " " not in head and head.endswith(("Error", "Exception", "Timeout"))


def _put(url: str, token: str, body: dict[str, Any]) -> Answer:
    """PUT, tried again while the dashboard is still loading its Serve module."""
    deadline = time.monotonic() + 120.0
    while True:
        answer = call(url, token=token, body=body, timeout_s=120.0)
        if answer.status not in (0, 404, 503) or time.monotonic() > deadline:
            return answer
        time.sleep(0.3)


def tail(path: Path, lines: int = 40) -> str:
    """The end of a log; empty when there is none."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""
