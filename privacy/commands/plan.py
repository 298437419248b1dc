"""``dp-lora plan``: what a private training would cost, before any record is read."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import InputError, Subparsers, number, whole_number

if TYPE_CHECKING:
    from .planning import Training
    from .report import Outlook

# Trained values of the embedded default adapter (`make run`): 3,072 in A, 6,144 in B, 970 in the
# head. A test counts them.
EMBEDDED_VALUES = 3072 + 6144 + 970
FORMATS = ("png", "svg", "pdf")
# Beyond this PRV, the cross-check, takes minutes.
_MOST_STEPS = 100_000
_EXAMPLE = """example:
  dp-lora plan --records 1200 --epsilon 3 --delta 1e-5 --rounds 100 --local-steps 10 --batch 32

Reads no record: a plan depends on public numbers only. What is computed and what it means:
docs/planning.md.
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add ``plan`` and its options."""
    parser = subparsers.add_parser(
        "plan",
        help="noise, epsilon and what one could trade, before a run",
        description="Noise multiplier, epsilon and noise-to-signal of one site's private training.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = whole_number(1, 10**9)
    parser.add_argument(
        "--records", type=count, required=True, metavar="N", help="records of the site"
    )
    parser.add_argument(
        "--rounds", type=count, required=True, metavar="R", help="rounds (strategy.num-rounds)"
    )
    parser.add_argument(
        "--local-steps",
        type=count,
        required=True,
        metavar="E",
        help="private steps of a round (strategy.local-steps)",
    )
    parser.add_argument(
        "--delta",
        type=number("a number above 0 and below 1", lambda value: 0 < value < 1),
        default=1e-5,
        metavar="D",
        help="delta of the whole run, below 1 / records (default: 1e-5)",
    )
    sampling = parser.add_mutually_exclusive_group(required=True)
    sampling.add_argument(
        "--batch", type=count, metavar="B", help="expected batch (privacy.expected-batch-size)"
    )
    sampling.add_argument(
        "--sample-rate",
        type=number("a number above 0, at most 1", lambda value: 0 < value <= 1),
        metavar="Q",
        help="probability with which a record enters a step (privacy.sample-rate)",
    )
    noise = parser.add_mutually_exclusive_group(required=True)
    noise.add_argument(
        "--epsilon",
        type=number("a number above 0, at most 100", lambda value: 0 < value <= 100),
        metavar="EPS",
        help="epsilon of the whole run: find the noise",
    )
    noise.add_argument(
        "--noise-multiplier",
        type=number("a number from 0.15 to 100000", lambda value: 0.15 <= value <= 1e5),
        metavar="SIGMA",
        help="noise over clip norm: find the epsilon",
    )
    parser.add_argument(
        "--values",
        type=whole_number(1, 10**12),
        default=EMBEDDED_VALUES,
        metavar="D",
        help=f"values that a step trains (default: {EMBEDDED_VALUES}, the embedded adapter's)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also a picture: png, svg or pdf")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def run(options: argparse.Namespace) -> int:
    """Compute the plan and print it; 0 if there is one."""
    _check(options)
    # Here, because accountants take a second to import: help and refusals shall not.
    from ..accounting import AccountingError
    from . import report

    try:
        outlook = _look(options)
    except AccountingError as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report.as_json(outlook), indent=2))
    else:
        print(report.as_text(outlook))
    return 0 if options.plot is None else _draw(outlook, options)


def _draw(outlook: Outlook, options: argparse.Namespace) -> int:
    from .plot import draw

    try:
        draw(outlook, options.plot)
    except OSError as error:
        print(f"{options.prog}: --plot: cannot write '{options.plot}': {error}", file=sys.stderr)
        return 1
    print(f"Picture: {options.plot}", file=sys.stderr)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    records, steps = options.records, options.rounds * options.local_steps
    if options.delta * records >= 1:
        takes = f"a number below 1 / records = {1 / records:.3g}: a larger one allows giving a "
        raise InputError("--delta", f"{options.delta:g}", f"{takes}record away")
    if options.batch is not None and options.batch > records:
        raise InputError("--batch", options.batch, f"at most the number of records, {records}")
    if options.sample_rate is not None and options.sample_rate * records < 1e-6:
        raise InputError("--sample-rate", options.sample_rate, "more: no batch has a record")
    if steps > _MOST_STEPS:
        takes = f"together at most {_MOST_STEPS:,} steps"
        raise InputError("--rounds and --local-steps", f"{steps:,} steps", takes)
    if options.plot is None:
        return
    if options.plot.suffix.lower().removeprefix(".") not in FORMATS:
        takes = f"a file name that ends in .{', .'.join(FORMATS)}"
        raise InputError("--plot", f"'{options.plot}'", takes)
    if options.plot.is_dir() or not options.plot.absolute().parent.is_dir():
        raise InputError("--plot", f"'{options.plot}'", "a file in a folder that exists")


def _training(options: argparse.Namespace) -> Training:
    from .planning import Training

    rate = options.sample_rate
    return Training(
        records=options.records,
        rate=min(1.0, options.batch / options.records) if rate is None else rate,
        rounds=options.rounds,
        local_steps=options.local_steps,
        delta=options.delta,
    )


def _look(options: argparse.Namespace) -> Outlook:
    from . import planning, trading
    from .progress import Progress
    from .report import Outlook

    training = _training(options)
    sigma = options.noise_multiplier
    if sigma is not None and trading.rough_epsilon(training, sigma) > trading.LARGEST_EPSILON:
        takes = f"more: with it epsilon is above {trading.LARGEST_EPSILON:g} and protects nobody"
        raise InputError("--noise-multiplier", f"{sigma:g}", takes)
    beside = trading.neighbours(training, keep_rate=options.batch is None)
    grid = trading.grid(training)
    progress = Progress(2 + len(beside) + len(grid) * len(trading.GRID_EPSILONS))
    progress.begin("noise multiplier" if sigma is None else "plan")
    plan = planning.make_plan(training, epsilon=options.epsilon, noise_multiplier=sigma)
    progress.begin("epsilon by three accountants")
    epsilons = planning.all_epsilons(plan)
    wanted = epsilons.pld if options.epsilon is None else options.epsilon
    signal = planning.Signal.of(training, plan.noise_multiplier, options.values)
    nearby, cells = [], []
    for name, one in beside:
        progress.begin(f"instead: {name}")
        kept = plan.noise_multiplier
        nearby.append(
            trading.choose(name, one, epsilon=wanted, values=options.values, kept_noise=kept)
        )
    for epsilon in trading.GRID_EPSILONS:
        for name, one in grid:
            progress.begin(f"epsilon {epsilon:g}: {name}")
            cells.append(trading.choose(name, one, epsilon=epsilon, values=options.values))
    curve = trading.spending(training, plan.noise_multiplier, wanted)
    progress.end()
    return Outlook(
        training=training,
        target_epsilon=options.epsilon,
        noise_multiplier=plan.noise_multiplier,
        epsilons=epsilons,
        values=options.values,
        signal=signal,
        nearby=nearby,
        grid=cells,
        spending=curve,
    )
