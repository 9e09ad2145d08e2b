"""Closes the Prometheus ports of Ray's own daemons to everyone without the metrics token.

On a cluster of several nodes Ray opens, on all addresses and with no option for a token, a port per node (its metrics agent) and
two more on the head (dashboard, autoscaler). What they tell is traffic, models, jobs and machines. All these servers are made by
`prometheus_client.make_wsgi_app`, a public function: here it gives an application that first asks for `Authorization: Bearer`.

`session` puts a copy of this file, named `sitecustomize.py`, into a folder at the front of the cluster's PYTHONPATH, and Python
imports a module of that name at start. Only those three daemons are changed; in others nothing happens but a look at the command
line. So it imports the standard library only, and prometheus_client where that daemon is about to.

The metrics token is made from Ray's token one way: every node can make it, and who has it can read metrics and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DAEMONS = ("/dashboard/agent.py", "/dashboard/dashboard.py", "/autoscaler/v2/monitor.py", "/autoscaler/_private/monitor.py")
Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def metrics_token(ray_token: str) -> str:
    """The token that metrics ask for, made from Ray's."""
    return hmac.new(ray_token.strip().encode(), b"tidepool metrics", hashlib.sha256).hexdigest()


def token_here() -> str | None:
    """The token of the cluster that this process belongs to, from where Ray looks for its own; None without token authentication.

    Raises:
        OSError: the file cannot be read.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    given = os.environ.get("RAY_AUTH_TOKEN")
    return metrics_token(given or Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().read_text())


def is_bearer(header: str | bytes, token: str) -> bool:
    """Whether an `Authorization` header carries this token."""
    given = header.encode("latin-1", "replace") if isinstance(header, str) else header
    scheme, _, secret = given.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(secret.strip(), token.encode())


def guarded(app: Wsgi, token: str) -> Wsgi:
    """A WSGI application that answers 401 to a request without the token."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if is_bearer(environ.get("HTTP_AUTHORIZATION", ""), token):
            return app(environ, start_response)
        text = b"Metrics need the metrics token, which is in metrics_token of the run directory.\n"
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", str(len(text)))])
        return [text]

    return answer


def is_daemon(command: Sequence[str]) -> bool:
    """Whether a command line starts one of the daemons that have a metrics port."""
    return any(word.endswith(DAEMONS) and "/ray/" in word for word in command)


def install(folder: Path) -> None:
    """Write the copy that Python imports at start into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(__file__, folder / "sitecustomize.py")


def close(token: str) -> None:
    """In this process, let every metrics server that is made from now on ask for the token."""
    import prometheus_client
    from prometheus_client import exposition

    original = exposition.make_wsgi_app

    def make_wsgi_app(*args: Any, **kwargs: Any) -> Wsgi:
        return guarded(original(*args, **kwargs), token)

    exposition.make_wsgi_app = make_wsgi_app
    prometheus_client.make_wsgi_app = make_wsgi_app


if __name__ == "sitecustomize" and is_daemon(sys.orig_argv):
    try:
        found = token_here()
        if found is not None:
            close(found)
    except (OSError, ImportError) as failed:
        # Python goes on after an error of this module, and the ports would be open.
        raise SystemExit(f"tidepool: metrics cannot be closed: {type(failed).__name__}: {failed}") from failed
