"""A plan as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from ..files import write_atomically
from .report import Outlook
from .trading import Choice

_COLOURS = ("#1b6ca8", "#2a9d5c", "#c8553d")
_STYLES = (":", "-", "--")


def draw(outlook: Outlook, path: Path) -> None:
    """Draw epsilon by round, and noise over signal by rounds, batch and epsilon, into a file.

    Parameters
    ----------
    outlook : Outlook
        What was found.
    path : Path
        Ends in ``.png``, ``.svg`` or ``.pdf``; replaced as a whole.
    """
    content = io.BytesIO()
    make_figure(outlook).savefig(content, format=path.suffix.lower().removeprefix("."), dpi=150)
    write_atomically(path, content.getvalue(), 0o666)


def make_figure(outlook: Outlook) -> Figure:
    """The picture itself: on the left epsilon by round, on the right noise over signal."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _spending(left, outlook)
    _noise(right, outlook.grid)
    return figure


def _spending(axes: Any, outlook: Outlook) -> None:
    rounds, epsilons = zip(*outlook.spending, strict=True)
    axes.plot(rounds, epsilons, marker=".", color=_COLOURS[0])
    axes.set_xlabel("rounds taken")
    axes.set_ylabel(f"epsilon at delta {outlook.training.delta:g} (upper bound)")
    axes.set_title(f"Spent with noise multiplier {outlook.noise_multiplier:.4g}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _noise(axes: Any, grid: Sequence[Choice]) -> None:
    batches = list(dict.fromkeys(one.training.batch for one in grid))
    epsilons = list(dict.fromkeys(one.epsilon for one in grid))
    for colour, epsilon in zip(_COLOURS, epsilons, strict=True):
        for style, batch in zip(_STYLES, batches, strict=False):
            line = [one for one in grid if (one.epsilon, one.training.batch) == (epsilon, batch)]
            axes.plot(
                [one.training.rounds for one in line],
                [one.signal.step for one in line],
                style,
                marker=".",
                color=colour,
                label=f"epsilon {epsilon:g}, batch {batch:g}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(FixedLocator(sorted({one.training.rounds for one in grid})))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_xlabel("rounds planned")
    axes.set_ylabel("noise / signal in a step")
    axes.set_title("What rounds, batch and epsilon cost")
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside right upper", fontsize="x-small", handlelength=3)
