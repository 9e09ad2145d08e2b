"""`python -m cluster up|down|status|check|keys|usage CONFIG`: parses, imports, runs. Nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cluster.command import add_set, run_command
from cluster.config import Config, load, to_serve

DEFAULT_CONFIG = Path("configs/local-cpu.yaml")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; a user's mistake is a line on standard error and 2."""
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("up", _up, "start the cluster, or apply a changed configuration to a running one"),
        ("down", _down, "stop it and leave nothing behind"),
        ("status", _status, "what runs, and whether it answers"),
        ("check", _check, "what would run and what is wrong, without starting anything"),
        ("head", _head, "start this node as the head of a cluster, as a manifest's start command does"),
        ("worker", _worker, "start this node as a worker, as a manifest's start command does"),
        ("leave", _leave, "stop everything of this run directory on this node"),
        ("deploy", _deploy, "on the head: make what is served what the configuration says"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, nargs="?", default=DEFAULT_CONFIG)
        add_set(command)
        command.add_argument("--run-dir", help="override run_dir of the file")
        if name == "check":
            command.add_argument("--fast", action="store_true", help="do not import vLLM to check the names of its arguments")
        if name == "worker":
            command.add_argument("--head", required=True, metavar="ADDRESS", help="address of the head")
        command.set_defaults(run=run)
    from cluster import admin

    admin.add_parsers(commands)
    args = parser.parse_args(arguments)
    return run_command(args)


def _overrides(args: argparse.Namespace) -> list[str]:
    return [*args.set, *([f"run_dir={json.dumps(args.run_dir)}"] if args.run_dir else [])]


def _load(args: argparse.Namespace) -> Config:
    return to_serve(load(args.config, _overrides(args)), str(args.config))


def _out(line: str) -> None:
    print(line, flush=True)


def _up(args: argparse.Namespace) -> int:
    from cluster import launch

    return launch.up(_load(args), args.config.resolve(), _out, _overrides(args))


def _down(args: argparse.Namespace) -> int:
    from cluster import launch
    from cluster.session import session_of

    return launch.down(session_of(_load(args)), _out)


def _status(args: argparse.Namespace) -> int:
    from cluster import launch

    return launch.status(_load(args), _out)


def _head(args: argparse.Namespace) -> int:
    from cluster import node

    return node.head(_load(args), args.config.resolve(), _out, _overrides(args))


def _worker(args: argparse.Namespace) -> int:
    from cluster import node

    return node.worker(_load(args), args.config.resolve(), args.head, _out)


def _leave(args: argparse.Namespace) -> int:
    from cluster import node
    from cluster.session import session_of

    return node.leave(session_of(_load(args)), _out)


def _deploy(args: argparse.Namespace) -> int:
    from cluster import node

    return node.deploy(_load(args), args.config.resolve(), _out, _overrides(args))


def _check(args: argparse.Namespace) -> int:
    from cluster import check

    return check.check(_load(args), _out, fast=bool(args.fast))


if __name__ == "__main__":
    raise SystemExit(main())
