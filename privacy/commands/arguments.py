"""Options of a command line, refused in one line: the option, what it got, what it takes."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeAlias

if TYPE_CHECKING:
    Subparsers: TypeAlias = "argparse._SubParsersAction[OneLineParser]"
else:
    Subparsers = argparse._SubParsersAction


class InputError(ValueError):
    """An option that cannot be used.

    Parameters
    ----------
    option : str
        Its name, such as ``--delta``.
    got : object
        Its value.
    takes : str
        What it takes, to follow the word "takes".
    """

    def __init__(self, option: str, got: object, takes: str) -> None:
        super().__init__(f"{option}: got {got}; takes {takes}")


class OneLineParser(argparse.ArgumentParser):
    """A parser that refuses in one line, with status 2; ``--help`` shows the usage."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end the process."""
        text = message.removeprefix("argument ")
        print(f"{self.prog}: {text} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Make a reader of whole numbers from ``least`` to ``most``, for ``add_argument(type=...)``."""
    takes = f"a whole number from {least:,} to {most:,}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}; takes {takes}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"got {text}; takes {takes}")
        return value

    return read


def number(
    takes: str, accepts: Callable[[float], bool] = lambda value: value > 0
) -> Callable[[str], float]:
    """Make a reader of finite numbers that ``accepts`` holds for; ``takes`` says which."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and accepts(value)):
            raise argparse.ArgumentTypeError(f"got {text!r}; takes {takes}")
        return value

    return read
