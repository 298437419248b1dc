"""What a client process keeps between messages: the frozen model and its checked engine.

Only public things are kept here.  In simulation one process plays many clients in turn, so
anything private that stayed behind would leak from one to the next.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from federation.settings import Settings
from privacy import GradientEngine, check_engine, make_engine
from privacy.engines import EngineKind
from strategies import kind_of
from task.backbones import Backbone, load_backbone
from task.data import num_labels
from task.model import TaskModel, build_task_model
from task.settings import LoRASettings, ModelSettings

_CHECKED_RECORDS = 3


@dataclasses.dataclass(frozen=True)
class Session:
    """A model on its device, and an engine that was checked on made-up records."""

    task_model: TaskModel
    engine: GradientEngine


def open_session(settings: Settings, device: torch.device, rank: int = 0) -> Session:
    """Return this process's session for these settings, made on first use.

    ``rank`` is that of this client's adapters; 0: ``lora.r``.

    Raises
    ------
    ModelError
        If the backbone cannot be loaded.
    EngineError
        If per-record gradients would not be right on this model.
    """
    return _session(
        settings.model,
        settings.lora.model_copy(update={"r": rank or settings.lora.r}),
        settings.privacy.engine,
        num_labels(settings.data),
        settings.seed,
        str(device),
    )


# One run has one backbone, and one session but for flex-lora: there a process plays clients of
# several ranks in turn, whose adapters stand on the same tensors.
@functools.lru_cache(maxsize=1)
def _backbone(model: ModelSettings, labels: int, seed: int, device: str) -> Backbone:
    backbone = load_backbone(model, labels, seed=seed)
    backbone.module.to(device)
    return backbone


@functools.lru_cache(maxsize=4)
def _session(
    model: ModelSettings,
    lora: LoRASettings,
    kind: EngineKind,
    labels: int,
    seed: int,
    device: str,
) -> Session:
    backbone = _backbone(model, labels, seed, device)
    task_model = build_task_model(model, lora, labels, seed=seed, backbone=backbone).to(device)
    engine = make_engine(kind, task_model.model, task_model.adapter)
    # Adapter dropout would draw anew for every pass; without it the check runs as training will.
    task_model.model.train(not lora.lora_dropout)
    _check(engine, task_model)
    task_model.model.train()
    return Session(task_model, engine)


def forget() -> None:
    """Make this process as good as new: for tests, and to measure what sessions save."""
    _session.cache_clear()
    _backbone.cache_clear()


def _check(engine: GradientEngine, task_model: TaskModel) -> None:
    batch = task_model.made_up_batch(_CHECKED_RECORDS)

    def losses(rows: slice) -> Tensor:
        # In half precision a record's gradient rounds otherwise in a batch than alone.
        part = {name: value[rows] for name, value in batch.items()}
        return task_model.per_record_losses(part, full_precision=True)

    names = list(task_model.adapter)
    on_a = [name for name in names if kind_of(name) == "A"]
    # Steps on one factor go other ways through an engine than steps on both.
    sets = [names, on_a, [name for name in names if name not in on_a]]
    check_engine(engine, task_model.adapter, losses, _CHECKED_RECORDS, sets=sets)
