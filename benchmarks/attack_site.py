"""The site under attack, and what a server knows of it.

The server is honest but curious: it follows the protocol, knows the backbone, the adapter that it
sent, the round plan and the settings, and looks at what comes back.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client_app.round_handler import handle_train
from federation.messages import FINGERPRINT_KEY, TRAINING_KEY
from federation.settings import Settings
from privacy import Ledger, PrivacyPlan, StepKind, make_engine
from strategies import ROUND_PLAN_KEY, WIRE_KEY, RoundPlan
from strategies.round_plan import Mode
from strategies.versions import version_of
from task.data.arrays import read_npz
from task.data.images import array_inputs
from task.data.records import Records
from task.encoders import ImageEncoder
from task.model import build_task_model

Floats = npt.NDArray[np.float64]
Adapter = Mapping[str, npt.NDArray[np.float32]]
RunConfig = dict[str, str | int | float | bool]

LABELS = 10
# Of all tensors: what a site sends is then minus the released mean gradient, to float32.
LEARNING_RATE = 1.0


@dataclass(frozen=True)
class Trained:
    """What the round under attack trains, and so sends; ``kind`` chooses its clip norm."""

    mode: Mode
    kind: StepKind
    head: bool = False


TRAINED = {
    "B": Trained("B", "B"),
    "A": Trained("A", "A"),
    "A and B": Trained("both", "mixed"),
    "B and head": Trained("B", "B", head=True),
}
# Target epsilons of the whole run; None: no privacy.
LEVELS: dict[str, float | None] = {
    "none": None,
    "epsilon 8": 8.0,
    "epsilon 3": 3.0,
    "epsilon 1": 1.0,
}


def run_config(
    epsilon: float | None, *, rounds: int, sample_rate: float, max_grad_norm: float, **changes: Any
) -> RunConfig:
    """The run config of an attacked run: one local step a round, all else as the app has it."""
    config: RunConfig = {
        "strategy.method": "dp-lora",
        "strategy.num-rounds": rounds,
        "strategy.local-steps": 1,
        "privacy.mode": "none" if epsilon is None else "record",
        "privacy.sample-rate": sample_rate,
        "privacy.max-grad-norm": max_grad_norm,
        "lora.r": 4,
        "lora.lora-alpha": 4,
        "data.source": "npz",
        "data.num-labels": LABELS,
        "data.min-records": 1,
        "device": "cpu",
    }
    if epsilon is not None:
        config["privacy.target-epsilon"] = epsilon
    return {**config, **changes}


def round_plan(trained: Trained, server_round: int, rate: float = LEARNING_RATE) -> RoundPlan:
    """One local step on what is attacked."""
    return RoundPlan(
        server_round=server_round,
        mode=trained.mode,
        local_steps=1,
        lr_a=rate,
        lr_b=rate,
        lr_head=rate,
        train_head=trained.head,
    )


def write_records(path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> Path:
    """Write a site's records as its operator would."""
    np.savez(path, x=images, y=labels)
    return path


def site_context(config: RunConfig, records: Path) -> Context:
    """A SuperNode's context at the start of a run: its own records, nothing charged yet."""
    policy = _new_account(records)
    return Context(
        run_id=1,
        node_id=1,
        # One thread, whatever the machine: attacks run side by side in processes.
        node_config={"data-path": str(records), "policy": str(policy), "threads": 1},
        state=RecordDict(),
        run_config=dict(config),
    )


def _new_account(records: Path) -> Path:
    """An empty ledger, and a policy that allows everything: each world is one of its own."""
    folder = records.parent / "accounts" / secrets.token_hex(8)
    folder.mkdir(parents=True)
    Ledger.create(folder / "ledger", folder / "head.json")
    policy = folder / "policy.toml"
    policy.write_text(
        f'[ledger]\npath = "{folder / "ledger"}"\nhead = "{folder / "head.json"}"\n'
        f'[datasets.attacked]\ndata-paths = ["{records}"]\nmax-epsilon = 1000.0\n'
        'max-delta = 1e-4\nmin-records = 1\ntasks = ["image-classification"]\n'
        "only-privatised = false\n"
    )
    policy.chmod(0o600)
    return policy


def ask_site(
    context: Context, plan: RoundPlan, adapter: Adapter, fingerprint: str
) -> dict[str, npt.NDArray[np.float32]]:
    """Send one train message to the production client and return the update that it replies with.

    This is the only place that touches the client.

    Raises
    ------
    RuntimeError
        If the site answers with a failure.
    """
    arrays = ArrayRecord({name: Array(value) for name, value in adapter.items()})
    version = version_of(arrays)
    content = RecordDict(
        {
            "arrays": arrays,
            WIRE_KEY: ConfigRecord({"base": "", "version": version, "rank": 0, "dtype": "float32"}),
            "config": ConfigRecord({FINGERPRINT_KEY: fingerprint, TRAINING_KEY: "attacked1"}),
            ROUND_PLAN_KEY: plan.to_record(),
        }
    )
    message = Message(content=content, message_type="train", dst_node_id=context.node_id)
    message.metadata.__dict__["_message_id"] = secrets.token_hex(32)
    reply = handle_train(message, context)
    if reply.has_error():
        raise RuntimeError(f"the attacked site does not answer: {reply.error.reason}")
    record = reply.content.array_records["arrays"]
    return {name: array.numpy() for name, array in record.items()}


class Server:
    """What an honest-but-curious server can compute by itself.

    Parameters
    ----------
    config : mapping
        The run config, by which it builds the same model as the site.
    """

    def __init__(self, config: RunConfig) -> None:
        self.settings = Settings.from_run_config(config)
        self.model = build_task_model(
            self.settings.model, self.settings.lora, LABELS, seed=self.settings.seed
        )
        self._engine = make_engine("fused", self.model.model, self.model.adapter)

    def start(self) -> dict[str, npt.NDArray[np.float32]]:
        """The adapter with which every run begins."""
        return {name: value.numpy() for name, value in self.model.adapter_state().items()}

    def load(self, adapter: Adapter) -> None:
        """Set the model to an adapter that was sent."""
        self.model.load_adapter_state({n: torch.from_numpy(v) for n, v in adapter.items()})

    def names(self, trained: Trained) -> tuple[str, ...]:
        """Tensors that a round on ``trained`` sends."""
        return round_plan(trained, 1).uploaded(self.model.adapter)

    def batch(
        self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
    ) -> dict[str, torch.Tensor]:
        """Records as the model sees them, by the public encoder."""
        encoder = self.model.encoder
        if not isinstance(encoder, ImageEncoder):
            raise TypeError(f"the attacks are on images, the model takes {encoder.key}")
        records = Records(array_inputs(images, encoder, "candidates"), labels)
        return records.batch(np.arange(len(labels)))

    def gradients(
        self, adapter: Adapter, trained: Trained, batch: Mapping[str, torch.Tensor]
    ) -> Floats:
        """Each record's own gradient at the adapter that was sent, unclipped.

        Returns
        -------
        numpy.ndarray
            (n, d), float64; the tensors of :meth:`names` one after the other.
        """
        self.load(adapter)
        count = len(batch["labels"])
        rows = self._engine.per_record_gradients(
            self.names(trained), lambda: self.model.per_record_losses(batch), count
        )
        flat = [rows[name].reshape(count, -1).double().numpy() for name in self.names(trained)]
        return np.concatenate(flat, axis=1)

    def flat(self, trained: Trained, tensors: Adapter) -> Floats:
        """The tensors of an update as one vector (d,), in the order of :meth:`gradients`."""
        parts = [tensors[name].reshape(-1) for name in self.names(trained)]
        return np.concatenate(parts).astype(np.float64)


def plan_of(config: RunConfig, num_records: int) -> PrivacyPlan:
    """The privacy plan that the site will make: public numbers."""
    settings = Settings.from_run_config(config)
    return PrivacyPlan.for_client(
        settings.privacy, num_records=num_records, steps=settings.total_steps
    )


def clipped(gradients: Floats, max_grad_norm: float) -> Floats:
    """Rows (n, d) brought to a norm of at most C."""
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    result: Floats = gradients * np.minimum(1.0, max_grad_norm / np.maximum(norms, 1e-300))
    return result


def released_sum(server: Server, trained: Trained, update: Adapter, normaliser: float) -> Floats:
    """The noised sum of clipped gradients behind one step's update, (d,).

    ``update = -lr (sum + noise) / b``, so with b and lr public nothing is lost but float32
    rounding.
    """
    return -server.flat(trained, update) * normaliser / LEARNING_RATE


def read_records(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """What :func:`write_records` wrote."""
    images, labels = read_npz(path, "train", str(path))
    return images, labels.astype(np.int64)
