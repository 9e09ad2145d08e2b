"""`python -m serve_apps`: print the Serve configuration, or run the gateway alone.

    python -m serve_apps build configs/local-cpu.yaml > serve.yaml        for `serve deploy` or KubeRay
    python -m serve_apps gateway --engine my-model=http://127.0.0.1:9000 --port 8080 --key tp-...

The gateway alone needs no Ray: for benches, tests, and engines run by hand. Gateways given the same --store share keys and
quotas.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cluster.errors import ConfigError, TidepoolError


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and print a TidepoolError as one line."""
    parser = argparse.ArgumentParser(prog="python -m serve_apps", description="Serve configuration and the gateway alone.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="print the Serve configuration (YAML) of a configuration file")
    build.add_argument("config")
    build.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the file")
    alone = commands.add_parser("gateway", help="run the gateway alone, without Ray")
    alone.add_argument("--engine", action="append", required=True, metavar="MODEL=URL", help="a model and its engine's URL")
    alone.add_argument("--host", default="127.0.0.1")
    alone.add_argument("--port", type=int, required=True)
    alone.add_argument("--key", required=True, help="the API key it accepts")
    alone.add_argument("--secret", default="", help="the internal secret its engines ask for")
    alone.add_argument("--slots", type=int, default=4096, help="requests in flight per engine")
    alone.add_argument("--alias", action="append", default=[], metavar="NAME=MODEL", help="another name of a model")
    alone.add_argument("--store", metavar="URL", help="database of keys and usage; default: a file removed at the end")
    alone.add_argument("--gateways", type=int, default=1, help="gateways that share these engines, this one included")
    alone.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a value of the `gateway` section")
    args = parser.parse_args(argv)
    try:
        return _build(args) if args.command == "build" else _gateway(args)
    except TidepoolError as error:
        print(error, file=sys.stderr)
        return 2


def _build(args: argparse.Namespace) -> int:
    import yaml

    from cluster.config import load, to_serve
    from serve_apps.app import serve_config

    yaml.safe_dump(serve_config(to_serve(load(args.config, args.set), str(args.config))), sys.stdout, sort_keys=False)
    return 0


def _gateway(args: argparse.Namespace) -> int:
    from cluster.config import parse
    from serve_apps.alone import Engines, run

    urls: dict[str, list[str]] = {}
    for model, url in _pairs("--engine", args.engine):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--engine {model}={url}: write it as model=http://host:port")
        urls.setdefault(model, []).append(url)
    aliases = _pairs("--alias", args.alias)
    for name, model in aliases:
        if model not in urls:
            raise ConfigError(f"--alias {name}={model}: no --engine has this model")
    models = []
    for model in urls:
        names = [name for name, of in aliases if of == model]
        models.append({"id": model, "device": "cpu", "max_ongoing_requests": args.slots, "aliases": names})
    config = parse(
        {"node": {"host": args.host, "port": args.port}, "gateway": _section(_pairs("--set", args.set)), "models": models},
        "gateway",
    )
    run(config, Engines(urls, args.secret, args.gateways), args.key, args.store)
    return 0


def _pairs(flag: str, values: list[str]) -> list[tuple[str, str]]:
    """The two sides of each `a=b`."""
    pairs = []
    for value in values:
        left, found, right = value.partition("=")
        if not found or not left or not right:
            raise ConfigError(f"{flag} {value}: write it as name=value")
        pairs.append((left, right))
    return pairs


def _section(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Nested mappings from dotted names; the values are YAML."""
    import yaml

    section: dict[str, Any] = {}
    for path, text in pairs:
        *parents, last = path.split(".")
        spot = section
        for parent in parents:
            spot = spot.setdefault(parent, {})
        spot[last] = yaml.safe_load(text)
    return section


if __name__ == "__main__":
    sys.exit(main())
