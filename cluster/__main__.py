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
        ("status", _status, "one screen: nodes, GPUs, models, jobs, cost, and whether it answers"),
        ("check", _check, "what would run and what is wrong, without starting anything"),
        ("head", _head, "start this node as the head of a cluster, as a manifest's start command does"),
        ("worker", _worker, "start this node as a worker, as a manifest's start command does"),
        ("leave", _leave, "stop everything of this run directory on this node"),
        ("deploy", _deploy, "on the head: make what is served what the configuration says"),
        ("environment", _environment, "prepare a node on which KubeRay starts Ray; prints its environment for a shell"),
        ("prometheus", _prometheus, "write what Prometheus and Grafana need to watch the cluster, and print how to start them"),
        ("doctor", _doctor, "check every node: versions, token, ports, memory, disk, route, GPU driver, clock"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, nargs="?", default=DEFAULT_CONFIG)
        add_set(command)
        command.add_argument("--run-dir", help="override run_dir of the file")
        if name == "check":
            command.add_argument("--fast", action="store_true", help="do not import vLLM to check the names of its arguments")
        if name == "up":
            command.add_argument("--dry-run", action="store_true", help="show the command and its cost per hour, start nothing")
        if name == "status":
            command.add_argument("--watch", action="store_true", help="draw it again every two seconds, until Ctrl-C")
            command.add_argument("--json", action="store_true", help="one line of JSON instead of the screen")
        if name == "worker":
            command.add_argument("--head", required=True, metavar="ADDRESS", help="address of the head")
        if name == "doctor":
            command.add_argument("--head", metavar="ADDRESS", help="look at this node as at a worker of the head at this address")
        if name == "prometheus":
            command.add_argument("--manifest", type=Path, help="prices of node types; default what this head was launched with")
            command.add_argument("--budget", type=float, metavar="USD", help="alert when the nodes cost more than this per hour")
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


def _is_manifest(args: argparse.Namespace) -> bool:
    """Whether the file is one of Ray's cluster launcher, which takes no options of ours.

    Raises:
        ConfigError: it is, and there are such options.
    """
    from cluster import manifest
    from cluster.errors import ConfigError

    if not manifest.is_manifest(args.config):
        return False
    if _overrides(args):
        raise ConfigError(f"{args.config}: is a manifest; --set and --run-dir belong into its start commands")
    return True


def _up(args: argparse.Namespace) -> int:
    from cluster import launch

    if _is_manifest(args):
        from cluster import bill, ray_up

        return bill.dry_run(args.config, _out) if args.dry_run else ray_up.up(args.config, _out)
    if args.dry_run:
        from cluster import check

        return check.check(_load(args), _out)
    return launch.up(_load(args), args.config.resolve(), _out, _overrides(args))


def _down(args: argparse.Namespace) -> int:
    from cluster import launch
    from cluster.session import session_of

    if _is_manifest(args):
        from cluster import ray_up

        return ray_up.down(args.config, _out)
    return launch.down(session_of(_load(args)), _out)


def _status(args: argparse.Namespace) -> int:
    from cluster import status

    if _is_manifest(args):
        from cluster import ray_up

        given = (("--watch", args.watch), ("--json", args.json))
        return ray_up.on_head(args.config, "status", [option for option, wanted in given if wanted])
    return status.status(_load(args), _out, args.watch, args.json)


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


def _environment(args: argparse.Namespace) -> int:
    from cluster import pod

    return pod.prepare(_load(args), args.config.resolve(), _out)


def _doctor(args: argparse.Namespace) -> int:
    from cluster import doctor

    if _is_manifest(args):
        from cluster import ray_up

        return ray_up.on_head(args.config, "doctor")
    return doctor.doctor(_load(args), _out, args.head)


def _prometheus(args: argparse.Namespace) -> int:
    from cluster.prometheus import prometheus
    from cluster.session import session_of

    config = _load(args)
    return prometheus(config, session_of(config), args.manifest, args.budget, _out)


def _check(args: argparse.Namespace) -> int:
    from cluster import check

    return check.check(_load(args), _out, fast=bool(args.fast))


if __name__ == "__main__":
    raise SystemExit(main())
