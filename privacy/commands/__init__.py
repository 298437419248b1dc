"""``dp-lora``: commands for those who plan and account private training, without running it.

Each command is a module with two functions: ``add_parser(subparsers)``, which adds and returns its
parser, and ``run(options)``, which does the work and returns the exit status. A new command is
such a module and its name in ``COMMANDS``. Modules import what is heavy when they run, so that
help and refusals are quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from . import ledger, plan
from .arguments import InputError, OneLineParser, Subparsers


class Command(Protocol):
    """What a command's module has."""

    def add_parser(self, subparsers: Subparsers) -> argparse.ArgumentParser:
        """Add the command's name, help and options; return its parser."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it; 0 if it was done.

        Raises
        ------
        InputError
            For options that cannot be used; becomes one line and status 2.
        """


COMMANDS: tuple[Command, ...] = (plan, ledger)


def main(arguments: Sequence[str] | None = None, extra: Sequence[Command] = ()) -> int:
    """Run a command; return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; ``None``: the process's own.
    extra : sequence of Command
        Commands beside this package's own, such as those that need other rooms.

    Returns
    -------
    int
        0: done; 1: it could not be done, the reason stands on stderr; 2: the command line cannot
        be used, one line on stderr says why; 130: interrupted.
    """
    parser = OneLineParser(
        prog="dp-lora", description="Plan and account differentially private LoRA training."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (*COMMANDS, *extra):
        added = command.add_parser(subparsers)
        added.set_defaults(run=command.run, prog=added.prog)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as done:  # argparse has said it: help, or one line
        return int(done.code or 0)
    try:
        return int(options.run(options))
    except InputError as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        needs = "pip install 'flower-dp-lora[app]'"
        print(f"{options.prog}: needs the package {error.name}: {needs}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
