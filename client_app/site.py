"""Where a client stands: the policy and the ledger of its own machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context

from federation.run_files import RunFolder, runs_folder
from federation.settings import Settings
from privacy import BudgetLimit, DatasetRules, Ledger, PolicyRefusal, SitePolicy


@dataclasses.dataclass(frozen=True)
class Site:
    """A data set's account, and the rules that hold for it.

    Parameters
    ----------
    dataset : str
        The account: the id that the policy declares; in simulation the virtual client's name.
    ledger : Ledger
        Where it is charged.
    limits : mapping of str to BudgetLimit
        Budgets of all data sets of the policy; none in simulation.
    rules : DatasetRules or None
        What the policy says of this data set; ``None`` in simulation.
    """

    dataset: str
    ledger: Ledger
    limits: Mapping[str, BudgetLimit]
    rules: DatasetRules | None = None

    @property
    def reply_at(self) -> float:
        """Seconds after a message at which, or at a multiple of which, its reply leaves."""
        return self.rules.reply_at if self.rules else 0.0

    @property
    def stated_records(self) -> int:
        """The policy's figure for the record count; 0 if the count itself is public."""
        return self.rules.public_records if self.rules else 0

    def public_records(self, records: int) -> int:
        """The figure that stands for the record count in all that leaves.

        Raises
        ------
        PolicyRefusal
            If the policy asks for more records.
        """
        if self.rules is None:
            return records
        self.rules.check_count(records)
        return self.rules.counts(records)


def open_site(settings: Settings, context: Context) -> Site:
    """Find the policy and ledger that this client is bound by, and ask the policy.

    Parameters
    ----------
    settings : Settings
        What the run asks for.
    context : Context
        Its node config is the site's own: ``data-path`` and ``policy`` in deployment,
        ``partition-id`` in simulation.

    Raises
    ------
    PolicyError
        If the policy file cannot be used.
    PolicyRefusal
        If there is none, or it does not allow what the run asks for.
    LedgerError
        In simulation, if the virtual client's ledger cannot be made.
    """
    node_config = context.node_config
    if "data-path" not in node_config:
        if "policy" in node_config:
            raise PolicyRefusal("the node config has a policy but no data-path; accepted is both")
        return _simulated(settings, context)
    path = node_config.get("policy")
    if not isinstance(path, str) or not path.strip():
        raise PolicyRefusal(
            "the node config has a data-path but no policy: a site releases nothing without "
            "its own rules; accepted: policy = the path of a policy file (docs/site.md)"
        )
    policy = SitePolicy.load(Path(path).expanduser())
    dataset = policy.dataset_of(str(node_config["data-path"]))
    rules = policy.datasets[dataset]
    rules.check(settings.asked_for)
    place = policy.ledger
    ledger = Ledger(Path(place.path).expanduser(), Path(place.head).expanduser())
    return Site(dataset, ledger, policy.limits(settings.asked_for), rules)


def who(context: Context) -> int:
    """A number of this client's own: its partition in simulation, its node id elsewhere."""
    return int(context.node_config.get("partition-id", context.node_id))


def _simulated(settings: Settings, context: Context) -> Site:
    runs = runs_folder(settings.output_dir)
    run = RunFolder.find(runs, context.run_id)
    # A SuperNode with a partition-id may run on another machine than the ServerApp.
    ledgers = run.ledgers if run else runs / "ledgers" / str(context.run_id)
    name = f"client-{who(context)}"
    ledger = Ledger.open_or_create(ledgers / name, ledgers / "heads" / f"{name}.json")
    return Site(name, ledger, {})
