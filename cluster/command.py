"""What the command lines of this project share: how a command ends, and the option that overrides a file's values.

A user's mistake is one line on standard error and status 2, Ctrl-C is 130; anything else is a bug and shows its traceback. It
parses nothing itself and starts nothing. Called by the `__main__` of `cluster`, `train` and `bench`, and by commands of `train`.
"""

from __future__ import annotations

import argparse
import signal
import sys

from cluster.errors import TidepoolError


def add_set(parser: argparse.ArgumentParser, text: str = "override a value of the file") -> None:
    """Add `--set a.b=c`, which may be given several times; `args.set` is the list of them, as `config.load` takes it."""
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help=text)


def run_command(args: argparse.Namespace) -> int:
    """Run the command that was parsed, and return the exit status.

    Args:
        args: With `run`, a function of `args` whose answer is the status (None is 0); `stopped`, where there is one, is said on
            standard error after Ctrl-C.
    """
    try:
        return int(args.run(args) or 0)
    except TidepoolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if "stopped" in args:
            print(args.stopped, file=sys.stderr)
        return 130


def exit_on_signals() -> None:
    """From now on SIGTERM and SIGHUP end this process with a SystemExit, so that what is half done is taken away or stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
