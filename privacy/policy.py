"""A site's own rules: how much privacy its data sets may lose, to which tasks.

The policy is a TOML file on the site's disk.  A run config may ask for less than it allows, never
for more; whoever sends the run config cannot change it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .asked_for import AskedFor
from .files import open_to_others
from .privacy_filter import BudgetLimit

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class PolicyError(ValueError):
    """A policy file cannot be used; the text names the file and the key."""


class PolicyRefusal(RuntimeError):
    """The policy does not allow what a run asks for; nothing was read or charged."""


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class _Table(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=_kebab, populate_by_name=True
    )


class LedgerPlace(_Table):
    """Where the ledger is, and the second place that tells when it was rolled back."""

    path: str = Field(min_length=1, description="Folder of the ledger, closed to other users.")
    head: str = Field(
        min_length=1,
        description="File that repeats the ledger's last entry, best on another disk.",
    )

    @model_validator(mode="after")
    def _two_places(self) -> Self:
        folder, head = (Path(p).expanduser() for p in (self.path, self.head))
        if not (folder.is_absolute() and head.is_absolute()):
            raise ValueError(f"ledger.path and ledger.head must be absolute, got {folder}, {head}")
        if folder.resolve() in head.resolve().parents:
            raise ValueError(
                f"ledger.head must lie outside ledger.path, got {head}: whoever puts back an old "
                "copy of the folder would put back the head with it"
            )
        return self


class DatasetRules(_Table):
    """What may be done with one data set, over its whole life."""

    data_paths: list[str] = Field(
        min_length=1, description="Files or folders that are this data set, absolute."
    )
    max_epsilon: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="Largest epsilon that its records may ever lose, over all runs and servers; "
        "runs without a guarantee, which only-privatised = false allows, are not bound by it.",
    )
    max_delta: float = Field(
        gt=0,
        lt=1,
        description="Delta of that. One run may have half of it; below 1 / min-records.",
    )
    min_records: int = Field(
        default=100, ge=1, description="With fewer records the data set takes no part in any run."
    )
    tasks: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="Tasks that may be learned: image-classification, ..."
    )
    columns: list[str] = Field(
        default=[], description="Columns of a table that a run may read; empty: any."
    )
    only_privatised: bool = Field(
        default=True,
        description="Nothing but privatised updates may leave: no run without noise, no seeded "
        "noise, no record count.",
    )
    public_records: int = Field(
        default=0,
        ge=0,
        description="A rounded figure that stands for the record count wherever a number depends "
        "on it (rate, normaliser, noise, weight). 0: the count itself.",
    )
    reply_at: float = Field(
        default=0.0,
        ge=0,
        le=86400,
        description="Replies leave this many seconds after their message came, or at a multiple "
        "of it, so that their time tells nothing. 0: when they are ready.",
    )

    @model_validator(mode="after")
    def _delta_is_small(self) -> Self:
        fewest = min(self.min_records, self.public_records or self.min_records)
        if self.max_delta >= 1 / fewest:
            raise ValueError(
                f"max-delta must be below 1 / min-records (or public-records) = {1 / fewest:.2e}, "
                f"got {self.max_delta:g}: such a delta would allow publishing a record"
            )
        for path in self.data_paths:
            if not Path(path).expanduser().is_absolute():
                raise ValueError(f"data-paths must be absolute, got {path!r}")
        return self

    @property
    def limit(self) -> BudgetLimit:
        """The budget of its account."""
        return BudgetLimit(self.max_epsilon, self.max_delta)

    def counts(self, records: int) -> int:
        """The figure that stands for the record count in everything that leaves the site."""
        return self.public_records or records

    def check(self, asked: AskedFor) -> None:
        """Refuse a run that asks for more than these rules allow, before any data are read.

        Raises
        ------
        PolicyRefusal
            Naming the run's setting, what it got and what is accepted.
        """
        if asked.task not in self.tasks:
            raise _refusal("the task", asked.task, " or ".join(self.tasks))
        foreign = [name for name in asked.columns if self.columns and name not in self.columns]
        if foreign:
            raise _refusal("a data column", foreign[0], ", ".join(self.columns))
        if self.only_privatised:
            self._check_private(asked)
        if not asked.is_private:
            return  # allowed by a site that says so; charged as what it is
        if asked.target_epsilon > self.max_epsilon:
            raise _refusal(
                "privacy.target-epsilon", asked.target_epsilon, f"{self.max_epsilon:g} at most"
            )
        if asked.target_delta > self.limit.plan_delta:
            raise _refusal(
                "privacy.target-delta",
                asked.target_delta,
                f"{self.limit.plan_delta:g} at most, half of max-delta",
            )

    def _check_private(self, asked: AskedFor) -> None:
        if asked.mode != "record":
            raise _refusal("privacy.mode", asked.mode, "record")
        if asked.seeded_noise:
            raise _refusal("privacy.insecure-test-seed", "a seed", "-1 (secure noise)")
        if asked.tells_count and not self.public_records:
            raise _refusal(
                "a setting that tells the record count",
                asked.tells_count,
                "strategy.weighting = 'uniform' with privacy.sample-rate; or let the policy state "
                "public-records",
            )

    def check_count(self, records: int) -> None:
        """Refuse a data set that has become too small, or too large for its delta.

        Both depend on the policy and the records alone: no question of a server's finds the number.

        Raises
        ------
        PolicyRefusal
            Without the number of records.
        """
        if records < self.min_records:
            raise PolicyRefusal(
                f"the policy's min-records is {self.min_records}; the data set has fewer records"
            )
        if self.max_delta >= 1 / records:
            raise PolicyRefusal(
                f"the policy's max-delta is {self.max_delta:g}; accepted for so many records is "
                "less than 1 / records: such a delta would allow publishing a record"
            )


class SitePolicy(_Table):
    """A whole policy file."""

    ledger: LedgerPlace
    datasets: dict[_Name, DatasetRules] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_account_per_path(self) -> Self:
        owners: dict[Path, str] = {}
        for name, rules in self.datasets.items():
            for path in rules.data_paths:
                real = Path(path).expanduser().resolve()
                if real in owners:
                    raise ValueError(
                        f"data-paths: {path} belongs to both {owners[real]} and {name}; accepted "
                        "is one data set for each path"
                    )
                owners[real] = name
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a policy file.

        Raises
        ------
        PolicyError
            If it cannot be read, other users could change it, or a key is wrong.
        """
        try:
            with path.open("rb") as file:
                why = open_to_others(path, reading=False)
                content = tomllib.load(file)
        except OSError as error:
            raise PolicyError(f"policy {path}: cannot be read ({type(error).__name__})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PolicyError(f"policy {path}: is not TOML ({error})") from None
        if why:
            raise PolicyError(
                f"policy {path}: others could change it, {why}; accepted is a file of this user's "
                "(or root's) that no one else may write, mode 0644 or 0600"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise PolicyError(_explain(path, error)) from None

    def dataset_of(self, data_path: str) -> str:
        """The data set that a path belongs to.

        Raises
        ------
        PolicyRefusal
            If the policy names no such path.
        """
        real = Path(data_path).expanduser().resolve()
        for name, rules in self.datasets.items():
            if any(Path(one).expanduser().resolve() == real for one in rules.data_paths):
                return name
        raise PolicyRefusal(f"data-path {data_path}: the policy names it in no data set")

    def limits(self, asked: AskedFor | None = None) -> Mapping[str, BudgetLimit]:
        """Each data set's budget, as far as it binds a run.

        Parameters
        ----------
        asked : AskedFor, optional
            What the run asks for.  A run without a guarantee, where the policy allows one, is bound
            by no budget but those of data sets from which only privatised updates may leave.
        """
        bound = asked is None or asked.is_private
        return {
            name: rules.limit
            for name, rules in self.datasets.items()
            if bound or rules.only_privatised
        }


def _refusal(what: str, got: object, accepted: str) -> PolicyRefusal:
    return PolicyRefusal(f"the site's policy: {what} is {got!r}; accepted: {accepted}")


def _explain(path: Path, error: ValidationError) -> str:
    lines = [f"policy {path} is not usable:"]
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"] if part != "[key]")
        if detail["type"] == "value_error":
            lines.append(f"  {key}: {_text_of(detail)}")
        elif detail["type"] == "missing":
            lines.append(f"  {key}: is missing")
        elif detail["type"] == "extra_forbidden":
            lines.append(f"  {key}: no such key")
        else:
            lines.append(f"  {key}: got {detail['input']!r}; {detail['msg']}")
    return "\n".join(lines)


def _text_of(detail: Any) -> str:
    return str(detail["ctx"]["error"])
