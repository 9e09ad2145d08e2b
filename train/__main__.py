"""`python -m train sft|dpo|pretrain|export|merge|compress ...`: parses, imports, runs. Nothing else."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from cluster.command import add_set, exit_on_signals, run_command
from cluster.config import Config, load
from cluster.errors import ConfigError, DataError
from cluster.session import CACHE_VARIABLE, model_cache, session_of
from cluster.train_config import TrainConfig

OBJECTIVES = {
    "sft": "fine-tune on dialogues",
    "dpo": "train on preferences",
    "pretrain": "train on plain text",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; a user's mistake is a line on standard error and 2."""
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.set_defaults(stopped="stopped; the same command resumes from the newest checkpoint")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in OBJECTIVES.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path)
        add_set(command)
        command.add_argument(
            "--check", action="store_true", help="read all data and estimate steps, time and cost; train nothing"
        )
        command.set_defaults(run=_train, objective=name)
    command = commands.add_parser("tune", help="search over fields of a configuration")
    command.add_argument("config", type=Path)
    add_set(command)
    command.set_defaults(run=_tune)
    command = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder or an adapter")
    command.add_argument("folder", metavar="RUN", help="<train.output>/<train.name>")
    command.add_argument("--checkpoint", type=int, metavar="N", help="its step; default the newest")
    command.add_argument("out", metavar="OUT", help="folder or pyarrow.fs URI")
    command.set_defaults(run=_export)
    from train import assistant, compress, evaluate, merge

    compress.add_parser(commands)
    merge.add_parser(commands)
    assistant.add_parser(commands)
    evaluate.add_parser(commands)
    args = parser.parse_args(arguments)
    built = Path(Config.model_fields["run_dir"].default, "models").absolute()
    if "config" not in args and built.is_dir():
        # Commands without a configuration find what `make up` has built in the usual run directory.
        os.environ.setdefault(CACHE_VARIABLE, str(built))
    return run_command(args)


def _load(path: Path, overrides: list[str]) -> Config:
    """A command's configuration; models that were built for its run directory's cluster are found by this process too."""
    config = load(path, overrides)
    os.environ[CACHE_VARIABLE] = str(model_cache(session_of(config)))
    return config


def _train(args: argparse.Namespace) -> int:
    begun = time.monotonic()
    config = _load(args.config, [f"train.objective={args.objective}", *args.set])
    wanted = config.train
    if wanted is None:
        raise ConfigError(f"{args.config}: has no section 'train'")
    if args.check:
        return _check(wanted)
    from train.bar import Bar
    from train.connect import connected
    from train.run import checked, train
    from train.supervisor import NAMESPACE

    checked(wanted)
    bar = Bar()
    # In a private cluster all ends with this process; in one that goes on, the run does too.
    exit_on_signals()
    _, high = wanted.scale.bounds
    bar.say("connecting to Ray")
    with connected(config, high * wanted.scale.cpus_per_worker, NAMESPACE) as connection:
        try:
            before = {"ray": round(time.monotonic() - begun, 3)}
            result = train(wanted, say=bar.say, on_step=bar.step, detached=connection.shared, before=before)
        finally:
            bar.close()
    print(f"{result.name}: {result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f}, exported to {result.export}")
    return 0


def _check(wanted: TrainConfig) -> int:
    from train.check import check
    from train.run import checked

    report = check(checked(wanted), lambda text: print(text, flush=True))
    if report.bad:
        first = next(mistake for split in report.splits for mistake in split.mistakes)
        raise DataError(first if report.bad == 1 else f"{report.bad} mistakes in the data, see above; the first: {first}")
    return 0


def _tune(args: argparse.Namespace) -> int:
    from train.tune import tune

    exit_on_signals()
    tune(_load(args.config, args.set), say=lambda text: print(text, flush=True))
    return 0


def _export(args: argparse.Namespace) -> int:
    # Else transformers draws a bar for one file, and DeepSpeed, which it imports, warns that it found no GPU: none is used here.
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "DS_ACCELERATOR": "cpu"}
    from train.export import export

    done = export(args.folder, args.checkpoint, args.out)
    print(f"step {done.step} written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
