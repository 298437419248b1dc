"""``dp-lora ledger``: what a site has spent and has left, for each data set."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import InputError, Subparsers

if TYPE_CHECKING:
    from ..ledger.statements import AccountStatement


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command."""
    parser = subparsers.add_parser(
        "ledger",
        help="what a site's data sets have spent and have left",
        description="Show what each data set of a site has lost to privatised releases so far, by "
        "the site's own ledger, and what its policy leaves. Runs at the site; sends nothing.",
    )
    parser.add_argument("--policy", metavar="FILE", help="the site's policy (docs/site.md)")
    parser.add_argument(
        "--folder", metavar="DIR", help="instead of a policy: a ledger's folder, as in a simulation"
    )
    parser.add_argument("--head", metavar="FILE", help="with --folder: the ledger's head")
    parser.add_argument(
        "--create", action="store_true", help="make the empty ledger that the policy names, once"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    """Show the accounts, or make the ledger; 1 if the ledger cannot be used."""
    from ..ledger import Ledger, LedgerError
    from ..ledger.statements import account_statements
    from ..policy import PolicyError, SitePolicy

    try:
        if options.policy:
            if options.folder or options.head:
                raise InputError("--policy", "--folder or --head beside it", "one of the two")
            policy = SitePolicy.load(Path(options.policy).expanduser())
            place, limits = policy.ledger, policy.limits()
            folder, head = Path(place.path).expanduser(), Path(place.head).expanduser()
        elif options.folder and options.head and not options.create:
            folder, head, limits = Path(options.folder), Path(options.head), {}
        else:
            raise InputError("--policy", "nothing", "a policy file, or --folder and --head instead")
        if options.create:
            Ledger.create(folder, head)
            print(f"Made an empty ledger in {folder}; its head is {head}")
            return 0
        statements = account_statements(Ledger(folder, head).book(), limits)
    except PolicyError as error:
        print(f"dp-lora: --policy: {error}", file=sys.stderr)
        return 2
    except LedgerError as error:
        print(f"dp-lora: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([one.to_json() for one in statements], indent=2))
    else:
        print("\n\n".join(_text(one) for one in statements) or "No data set was used yet.")
    return 0


def _text(one: AccountStatement) -> str:
    lines = [one.dataset]
    if one.limit is None:
        lines.append(
            f"  spent      epsilon {_number(one.spent)} at delta 1e-05, "
            "half of it for further plans; no limit"
        )
    else:
        lines += [
            f"  limit      epsilon {one.limit.max_epsilon:g} at delta {one.limit.max_delta:g}",
            f"  spent      epsilon {_number(one.spent)}",
            f"  left       a release of epsilon {_number(one.left)} at delta "
            f"{one.limit.plan_delta:g}",
        ]
    lines.append(f"  records    {one.records} when last looked at")
    if one.shares_with:
        names = ", ".join(one.shares_with)
        lines.append(f"  shared     has records of {names}: what they spend counts here, too")
    for plan in one.plans:
        kind = f"q {plan.sample_rate:.4g}, sigma {plan.noise_multiplier:.4g}"
        if plan.noise_multiplier <= 0:
            kind = "NOT PRIVATE (no noise, or noise from a seed)"
        lines.append(
            f"  training   {plan.training[:12]}  {plan.steps} of {plan.most_steps} steps in "
            f"{len(plan.rounds)} rounds, {kind}"
            + (f", on {plan.dataset}" if plan.dataset != one.dataset else "")
        )
    return "\n".join(lines)


def _number(epsilon: float) -> str:
    if math.isinf(epsilon):
        return "infinite: nothing is guaranteed"
    return f"{epsilon:.3f}"
