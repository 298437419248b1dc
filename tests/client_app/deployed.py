"""A site as it is deployed: data of its own, a policy, and a ledger that its operator made."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict

from client_app.replay import pack_reply
from federation.messages import ClientFailure
from privacy import Ledger
from strategies import WIRE_KEY
from tests.federation.tiny import changed

RECORDS = 60
RULES = {
    "max-epsilon": 8.0,
    "max-delta": 2e-5,
    "min-records": 20,
    "tasks": ["image-classification"],
}
_RUNS = itertools.count(10_000)


@dataclasses.dataclass(frozen=True)
class Deployed:
    """Files of a site.

    Parameters
    ----------
    folder : Path
        Holds ``data.npz``, ``policy.toml``, ``ledger`` and ``second/head.json``.
    config : dict
        The run config that servers send.
    """

    folder: Path
    config: dict

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger", self.folder / "second" / "head.json")

    def context(self, *, node_config=None, **changes) -> Context:
        """A new ClientApp of a new run."""
        place = {
            "data-path": str(self.folder / "data.npz"),
            "policy": str(self.folder / "policy.toml"),
        }
        return Context(
            run_id=next(_RUNS),
            node_id=7,
            node_config=place if node_config is None else node_config,
            state=RecordDict(),
            run_config=changed(self.config, **changes),
        )

    def steps(self) -> int:
        """All that was ever charged."""
        return sum(plan.steps for plan in self.ledger.book().plans.values())

    def entries(self) -> int:
        with self.ledger._store.transaction() as current:
            return len(current.entries)


def deploy(folder: Path, config: dict, *, records: int = RECORDS, **rules) -> Deployed:
    """Set up a site; its records are the first of the tiny federation's."""
    write_data(folder / "data.npz", config, records)
    write_policy(folder, **rules)
    Ledger.create(folder / "ledger", folder / "second" / "head.json")
    here = {
        "data.path": "",
        "data.test-path": str(config["data.path"]),
        "output-dir": "",
        "strategy.weighting": "uniform",
    }
    return Deployed(folder, {**config, **here})


def write_data(path: Path, config: dict, records: int) -> None:
    with np.load(str(config["data.path"])) as file:
        np.savez(path, x=file["x_train"][:records], y=file["y_train"][:records])


def write_policy(folder: Path, **rules) -> Path:
    values = {**RULES, **{key.replace("_", "-"): value for key, value in rules.items()}}
    lines = [
        "[ledger]",
        f'path = "{folder / "ledger"}"',
        f'head = "{folder / "second" / "head.json"}"',
        "[datasets.records]",
        f'data-paths = ["{folder / "data.npz"}"]',
        *(f"{key} = {_toml(value)}" for key, value in values.items()),
    ]
    path = folder / "policy.toml"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def released(reply: Message) -> bytes | None:
    """What a reply tells of the records; ``None`` for a fixed code, or for asking for tensors."""
    if reply.has_error():
        failure = ClientFailure(reply.error.code)
        assert reply.error.reason == failure.to_error().reason and not reply.has_content()
        return None
    if list(reply.content) == [WIRE_KEY]:
        wire = reply.content[WIRE_KEY]
        assert wire["need-full"] is True and set(wire) == {"need-full", "version", "rank"}
        return None
    return pack_reply(reply.content)
