"""`python -m cluster keys create|list|revoke` and `usage`: the administrator's side of the gateway's `/admin` routes.

An HTTP client and nothing more: it reads `endpoint.json` of the run directory, or the environment variables
TIDEPOOL_BASE_URL and TIDEPOOL_ADMIN_KEY, and never opens the store. Caller: `cluster.__main__`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from cluster import tls
from cluster.errors import LaunchError, StoreError
from cluster.records import KeySpec

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_TIMEOUT_S = 30.0


def add_parsers(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register `keys` and `usage`; each sets `run`, a function from the parsed arguments to an exit status."""
    keys = subparsers.add_parser("keys", help="create, list and revoke API keys", description="API keys of the running cluster.")
    actions = keys.add_subparsers(required=True, metavar="ACTION")

    create = _action(actions, "create", "make a key and print its secret, which cannot be read again", _create)
    create.add_argument("name", help="whose key it is, for people")
    create.add_argument("--models", type=_names, default=[], metavar="A,B", help="models it may use; default all")
    create.add_argument("--rpm", type=int, help="requests per minute")
    create.add_argument("--tpm", type=int, help="tokens per minute")
    create.add_argument("--max-parallel", type=int, help="requests at the same time")
    create.add_argument("--priority", type=int, default=0, help="higher goes first; default 0")
    create.add_argument("--expires", type=duration, metavar="30d", help="from now: a number and s, m, h, d or w")
    create.add_argument("--budget", type=float, metavar="USD", help="money it may spend in all")
    create.add_argument("--admin", action="store_true", help="may use the /admin routes")

    _action(actions, "list", "every key that is not revoked", _list).add_argument(
        "--all", action="store_true", help="revoked and expired ones too"
    )
    _action(actions, "revoke", "revoke a key for good, on every gateway within 2 s", _revoke).add_argument("id")

    usage = _action(subparsers, "usage", "what each key used and what it cost", _usage)
    usage.add_argument("--since", type=duration, metavar="24h", help="how far back to begin; default everything")
    usage.add_argument("--until", type=duration, metavar="1h", help="how far back to end; default now")
    usage.add_argument("--key", metavar="ID", help="only this key's id")
    usage.add_argument("--model", help="only this model")


def duration(text: str) -> float:
    """`90s`, `5m`, `24h`, `30d`, `2w` as seconds."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)([smhdw])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number and s, m, h, d or w, such as 24h")
    return float(found[1]) * _UNITS[found[2]]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _action(
    parsers: argparse._SubParsersAction[Any], name: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parsers.add_parser(name, help=text, description=text)
    parser.add_argument("--run-dir", type=Path, default=Path("run"), help="where `up` left endpoint.json; default run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def _create(args: argparse.Namespace) -> int:
    spec: dict[str, Any] = {"name": args.name, "admin": args.admin, "models": args.models, "priority": args.priority}
    spec |= {"rpm": args.rpm, "tpm": args.tpm, "max_parallel": args.max_parallel, "budget_usd": args.budget}
    spec["expires_at"] = None if args.expires is None else time.time() + args.expires
    KeySpec.parse(spec)  # the same check as the gateway's, with the same words, before anything is sent
    made = _call(args, "POST", "/admin/keys", spec)
    if args.json:
        _print_json(made)
    else:
        print(f"{made['id']}  {made['name']}\n{made['key']}\nThis secret is shown once and kept nowhere.")
    return 0


def _list(args: argparse.Namespace) -> int:
    keys = _call(args, "GET", "/admin/keys")["data"]
    now = time.time()
    if not args.all:
        keys = [key for key in keys if _state(key, now) == "live"]
    if args.json:
        _print_json({"data": keys})
        return 0
    head = ("ID", "NAME", "PREFIX", "MODELS", "RPM", "TPM", "PARALLEL", "PRIORITY", "EXPIRES", "BUDGET $", "STATE")
    rows = [
        (
            key["id"],
            key["name"] + (" (admin)" if key["admin"] else ""),
            key["prefix"],
            ",".join(key["models"]) or "all",
            _or_dash(key["rpm"]),
            _or_dash(key["tpm"]),
            _or_dash(key["max_parallel"]),
            str(key["priority"]),
            "-" if key["expires_at"] is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(key["expires_at"])),
            _or_dash(key["budget_usd"]),
            _state(key, now),
        )
        for key in keys
    ]
    print(table(head, rows))
    return 0


def _revoke(args: argparse.Namespace) -> int:
    record = _call(args, "DELETE", f"/admin/keys/{quote(args.id, safe='')}")
    if args.json:
        _print_json(record)
    else:
        print(f"{args.id} is revoked")
    return 0


def _usage(args: argparse.Namespace) -> int:
    now = time.time()
    asked = {"key": args.key, "model": args.model}
    asked |= {name: f"{now - back:.3f}" for name in ("since", "until") if (back := getattr(args, name)) is not None}
    answer = _call(args, "GET", "/admin/usage?" + urlencode({name: value for name, value in asked.items() if value is not None}))
    if args.json:
        _print_json(answer)
        return 0
    head = ("KEY", "NAME", "MODEL", "REQUESTS", "ERRORS", "PROMPT", "CACHED", "COMPLETION", "MEAN LATENCY s", "COST $")
    rows = [
        (
            row["key_id"],
            row["name"] or "-",
            row["model"],
            str(row["requests"]),
            str(row["errors"]),
            str(row["prompt_tokens"]),
            str(row["cached_tokens"]),
            str(row["completion_tokens"]),
            f"{row['latency_s'] / max(1, row['requests']):.3f}",
            f"{row['cost_usd']:.6f}",
        )
        for row in answer["data"]
    ]
    print(table(head, rows))
    print(f"total: {answer['total_usd']:.6f} US dollars")
    return 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, two spaces apart."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in (head, *rows)]
    return "\n".join(lines)


def endpoint(run_dir: Path) -> tuple[str, str, str | None]:
    """Root URL of the gateway (no `/v1`), the admin key, and the file of the certificate that `endpoint.json` names, if any.

    The environment goes before the file.

    Raises:
        LaunchError: neither says them.
    """
    base_url, admin_key = os.environ.get("TIDEPOOL_BASE_URL"), os.environ.get("TIDEPOOL_ADMIN_KEY")
    certificate = None
    if not base_url or not admin_key:
        path = run_dir / "endpoint.json"
        try:
            found = json.loads(path.read_text())
            certificate = None if base_url else found.get("certificate")
            base_url, admin_key = base_url or found["base_url"], admin_key or found["admin_key"]
        except FileNotFoundError:
            text = f"{path}: not there; is the cluster up? Give --run-dir, or TIDEPOOL_BASE_URL and TIDEPOOL_ADMIN_KEY"
            raise LaunchError(text) from None
        except OSError as error:
            raise LaunchError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise LaunchError(f"{path}: must be a JSON object with base_url and admin_key; run `up` again") from error
    base_url = str(base_url)
    if urlsplit(base_url).scheme not in ("http", "https"):
        raise LaunchError(f"{base_url}: the base URL must begin with http:// or https://")
    return base_url.rstrip("/").removesuffix("/v1"), str(admin_key), certificate


def _call(args: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to the gateway. Raises LaunchError when it cannot be reached, StoreError when it refuses."""
    root, admin_key, certificate = endpoint(args.run_dir)
    headers = {"authorization": f"Bearer {admin_key}", "content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    local = urlsplit(root).hostname in ("127.0.0.1", "localhost", "::1")
    # A proxy of the environment cannot reach this machine's loopback.
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})] if local else []
    if certificate is not None:
        handlers.append(urllib.request.HTTPSHandler(context=tls.trust(certificate)))
    opener = urllib.request.build_opener(*handlers)
    try:
        request = urllib.request.Request(root + path, data, headers, method=method)
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise StoreError(f"{method} {root}{path.partition('?')[0]}: {error.code}: {_said(error)}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise LaunchError(f"{root}: the endpoint does not answer: {reason}") from error
    if not isinstance(answer, dict):
        raise LaunchError(f"{root}: the answer is not a JSON object; is this a Tidepool endpoint?")
    return answer


def _said(error: urllib.error.HTTPError) -> str:
    """The message of the one wire shape, or the status text where the answer has another shape."""
    try:
        return " ".join(str(json.load(error)["error"]["message"]).split())
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)


def _state(key: dict[str, Any], now: float) -> str:
    if key["revoked_at"] is not None:
        return "revoked"
    return "live" if key["expires_at"] is None or now < key["expires_at"] else "expired"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
