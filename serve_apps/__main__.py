"""`python -m serve_apps`: print the Serve configuration, or run the gateway alone.

    python -m serve_apps build configs/local-cpu.yaml > serve.yaml        for `serve deploy` or KubeRay
    python -m serve_apps gateway --engine my-model=http://127.0.0.1:9000 --port 8080 --key tp-...

The gateway alone has its keys and usage in memory and needs no Ray: for benches, tests, and engines run by hand.
"""

from __future__ import annotations

import argparse
import sys

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
    args = parser.parse_args(argv)
    try:
        return _build(args) if args.command == "build" else _gateway(args)
    except TidepoolError as error:
        print(error, file=sys.stderr)
        return 2


def _build(args: argparse.Namespace) -> int:
    import yaml

    from cluster.config import load
    from serve_apps.app import serve_config

    yaml.safe_dump(serve_config(load(args.config, args.set)), sys.stdout, sort_keys=False)
    return 0


def _gateway(args: argparse.Namespace) -> int:
    from serve_apps.alone import run

    engines: dict[str, list[str]] = {}
    for pair in args.engine:
        model, found, url = pair.partition("=")
        if not found or not url.startswith(("http://", "https://")):
            raise ConfigError(f"--engine {pair}: write it as model=http://host:port")
        engines.setdefault(model, []).append(url)
    run(engines, args.host, args.port, args.key, args.secret, args.slots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
