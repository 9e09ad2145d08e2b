"""How commands end, and the option that they share."""

from __future__ import annotations

import argparse
import os
import signal

import pytest

from cluster.command import add_set, exit_on_signals, run_command
from cluster.errors import ConfigError


def ending(error: BaseException) -> argparse.Namespace:
    def run(args: argparse.Namespace) -> int:
        raise error

    return argparse.Namespace(run=run)


def test_the_status_is_what_the_command_says_and_0_for_nothing():
    assert run_command(argparse.Namespace(run=lambda args: 3)) == 3
    assert run_command(argparse.Namespace(run=lambda args: None)) == 0


def test_a_mistake_is_one_line_and_2(capsys):
    assert run_command(ending(ConfigError("node.port: must be a number"))) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: node.port: must be a number\n")


def test_ctrl_c_is_130_with_the_innermost_line_if_there_is_one(capsys):
    assert run_command(ending(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""
    parser = argparse.ArgumentParser()
    parser.set_defaults(stopped="go on")
    commands = parser.add_subparsers()
    commands.add_parser("plain").set_defaults(run=ending(KeyboardInterrupt()).run)
    commands.add_parser("other").set_defaults(run=ending(KeyboardInterrupt()).run, stopped="start again")
    for name, line in (("plain", "go on\n"), ("other", "start again\n")):
        assert run_command(parser.parse_args([name])) == 130
        assert capsys.readouterr().err == line


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(ending(ZeroDivisionError()))


def test_values_to_override_are_collected():
    parser = argparse.ArgumentParser()
    add_set(parser)
    assert parser.parse_args([]).set == []
    assert parser.parse_args(["--set", "a.b=1", "--set", "c=2"]).set == ["a.b=1", "c=2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_what_is_going_on(number):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        exit_on_signals()
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.code == 128 + number
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
