"""A client to audit: a tiny model and data on disk, real messages, real contexts.

The only place of the audit that knows how a client is spoken to.
"""

from __future__ import annotations

import dataclasses
import secrets
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client_app.round_handler import handle_train
from client_app.site import open_site
from federation.messages import FINGERPRINT_KEY, TRAINING_KEY
from federation.settings import Settings
from privacy import Ledger, pld_epsilon
from strategies import PRIVACY_KEY, ROUND_PLAN_KEY, WIRE_KEY, RoundPlan
from strategies.versions import version_of
from task.model import build_task_model

RunConfig = dict[str, str | int | float | bool]
Values = dict[str, npt.NDArray[np.float32]]
CLASSES = 3
LEARNING_RATE = 0.05


class ClientRefused(RuntimeError):
    """The client answered with an error and did not train; ``code`` says which."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")
        self.code = code


@dataclasses.dataclass(frozen=True)
class Reply:
    """What left the client."""

    content: RecordDict

    @property
    def update(self) -> Values:
        """Change of each tensor."""
        return {n: array.numpy() for n, array in self.content.array_records["arrays"].items()}

    @property
    def statement(self) -> ConfigRecord:
        """What the client says its privacy rests on."""
        return self.content.config_records[PRIVACY_KEY]

    def claimed_epsilon(self) -> float:
        """Epsilon of all steps so far, from the client's own statement."""
        said = self.statement
        return pld_epsilon(
            sample_rate=float(said["sample-rate"]),  # type: ignore[arg-type]
            noise_multiplier=float(said["noise-multiplier"]),  # type: ignore[arg-type]
            steps=int(said["steps"]),  # type: ignore[arg-type]
            delta=float(said["target-delta"]),  # type: ignore[arg-type]
        )


class Site:
    """One client's side, and the server's model.

    Parameters
    ----------
    folder : Path
        Where the model and the data are written.
    seed : int
        Of data, model and, unless a config says otherwise, the client's test source.
    rounds, local_steps : int
        The most that a run config asks for; the noise is calibrated for all of them.
    sample_rate : float
        Poisson rate.
    """

    def __init__(
        self, folder: Path, seed: int, *, rounds: int, local_steps: int, sample_rate: float
    ) -> None:
        self.rounds, self.local_steps = rounds, local_steps
        self._folder, self._seed, self._sample_rate = folder, seed, sample_rate
        _write_vit(folder / "vit", seed)
        settings = Settings.from_run_config(self.config(records=20))
        self._model = build_task_model(settings.model, settings.lora, CLASSES, seed=settings.seed)
        generator = torch.Generator().manual_seed(seed)
        # Not LoRA's start: with B = 0 the gradients of A are zero, and would prove nothing.
        self.start: Values = {
            name: (value + 0.05 * torch.randn(value.shape, generator=generator)).numpy()
            for name, value in self._model.adapter_state().items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of the adapter."""
        return {name: value.shape for name, value in self.start.items()}

    def config(
        self, *, records: int, epsilon: float = 1.5, variant: int = 0, **changes: str | float | bool
    ) -> RunConfig:
        """A run config; ``privacy__engine`` stands for ``privacy.engine``.

        Parameters
        ----------
        records : int
            Records of the client.
        epsilon : float (default: 1.5)
            ``privacy.target-epsilon``.
        variant : int (default: 0)
            Which of the data sets of this size: they differ in all records.
        """
        data = self._folder / f"{records}-{variant}.npz"
        if not data.exists():
            _write_data(data, records, self._seed + 1000 * variant)
        kebab = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
        return {
            "seed": self._seed,
            "device": "cpu",
            "output-dir": str(self._folder / "runs"),
            "model.source": "timm",
            "model.name": str(self._folder / "vit"),
            "data.source": "npz",
            "data.path": str(data),
            "data.num-labels": CLASSES,
            "data.partitioner": "iid",
            "data.min-records": 1,
            "lora.r": 8,
            "lora.lora-alpha": 8,
            "strategy.method": "dp-lora",
            "strategy.num-rounds": self.rounds,
            "strategy.local-steps": self.local_steps,
            "strategy.weighting": "uniform",
            "privacy.target-epsilon": epsilon,
            "privacy.target-delta": 1e-5,
            "privacy.sample-rate": self._sample_rate,
            "privacy.insecure-test-seed": self._seed,
            **kebab,
        }

    def context(self, config: RunConfig) -> Context:
        """A client that has not taken part yet, with all records of the data set."""
        return Context(
            run_id=secrets.randbits(62),  # a run, and so a ledger, of its own
            node_id=1,
            node_config={"partition-id": 0, "num-partitions": 1},
            state=RecordDict(),
            run_config=config,
        )

    def stating(self, config: RunConfig, public_records: int) -> Context:
        """A client as at a site, whose policy states this figure in place of its record count."""
        data = Path(str(config["data.path"]))
        folder = self._folder / "sites" / secrets.token_hex(8)
        folder.mkdir(parents=True)
        Ledger.create(folder / "ledger", folder / "head.json")
        policy = folder / "policy.toml"
        policy.write_text(
            f'[ledger]\npath = "{folder / "ledger"}"\nhead = "{folder / "head.json"}"\n'
            f'[datasets.audited]\ndata-paths = ["{data}"]\nmax-epsilon = 1000.0\n'
            'max-delta = 1e-4\nmin-records = 1\ntasks = ["image-classification"]\n'
            # The audit's own seeds are no secure noise.
            f"only-privatised = false\npublic-records = {public_records}\n"
        )
        policy.chmod(0o600)
        context = self.context({**config, "data.path": ""})
        context.node_config = {"data-path": str(data), "policy": str(policy)}
        return context

    def steps_in_the_ledger(self, context: Context) -> int:
        """All steps that the client's ledger, read anew from the disk, was charged for."""
        settings = Settings.from_run_config(context.run_config)
        book = open_site(settings, context).ledger.book()
        return sum(plan.steps for plan in book.plans.values())

    def plan(self, server_round: int, *, steps: int = 0, **changes: object) -> RoundPlan:
        """A round that trains everything with SGD and no filter, by default of all its steps."""
        return dataclasses.replace(
            RoundPlan(
                server_round=server_round,
                mode="both",
                local_steps=steps or self.local_steps,
                lr_a=LEARNING_RATE,
                lr_b=LEARNING_RATE,
                lr_head=LEARNING_RATE,
            ),
            **changes,  # type: ignore[arg-type]
        )

    def train(
        self,
        context: Context,
        plan: RoundPlan,
        state: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> Reply:
        """Send one train message with the whole adapter and take the reply.

        Raises
        ------
        ClientRefused
            With the code, if the reply is an error.
        """
        values = self.start if state is None else state
        arrays = ArrayRecord({n: Array(v.astype(np.float32)) for n, v in values.items()})
        wire: dict[str, Any] = {
            "base": "",
            "version": version_of(arrays),
            "rank": 0,
            "dtype": "float32",
        }
        content = RecordDict(
            {
                "arrays": arrays,
                WIRE_KEY: ConfigRecord(wire),
                "config": ConfigRecord(
                    {FINGERPRINT_KEY: self._model.fingerprint, TRAINING_KEY: "audited1"}
                ),
                ROUND_PLAN_KEY: plan.to_record(),
            }
        )
        message = Message(content=content, message_type="train", dst_node_id=1)
        message.metadata.__dict__["_message_id"] = uuid.uuid4().hex  # as the network would
        message.metadata.__dict__["_src_node_id"] = 0
        reply = handle_train(message, context)
        if reply.has_error():
            raise ClientRefused(reply.error.code, str(reply.error.reason))
        return Reply(reply.content)


def released(reply: Reply, plan: RoundPlan) -> dict[str, npt.NDArray[np.float64]]:
    """Sum of the round's released gradients: the update, with the public rates undone."""
    return {
        name: value.astype(np.float64) / -plan.learning_rate(name)
        for name, value in reply.update.items()
    }


def _write_vit(folder: Path, seed: int) -> None:
    from task.torchvision_ops import declare_missing_torchvision_ops

    declare_missing_torchvision_ops()
    import timm
    from timm.models import save_for_hf

    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1, **tiny)
    save_for_hf(
        model,
        str(folder),
        model_config={"num_classes": 0},
        model_args={**tiny, "in_chans": 1},
        safe_serialization=True,
    )


def _write_data(file: Path, records: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(records) % CLASSES)
    images = rng.integers(0, 60, (records, 16, 16), dtype=np.uint8)
    for label in range(CLASSES):  # a bright bar where the label says
        images[labels == label, 5 * label : 5 * label + 4] += 150
    np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
