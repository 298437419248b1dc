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
from privacy import HookEngine, check_engine
from task.data import num_labels
from task.model import TaskModel, build_task_model
from task.settings import LoRASettings, ModelSettings

_CHECKED_RECORDS = 3


@dataclasses.dataclass(frozen=True)
class Session:
    """A model on its device, and an engine that was checked on made-up records."""

    task_model: TaskModel
    engine: HookEngine


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
        num_labels(settings.data),
        settings.seed,
        str(device),
    )


# One run has one key, but for flex-lora: there a process plays clients of several ranks in turn.
@functools.lru_cache(maxsize=4)
def _session(
    model: ModelSettings, lora: LoRASettings, labels: int, seed: int, device: str
) -> Session:
    task_model = build_task_model(model, lora, labels, seed=seed).to(device)
    engine = HookEngine(task_model.model, task_model.adapter)
    _check(engine, task_model)
    task_model.model.train()
    return Session(task_model, engine)


def _check(engine: HookEngine, task_model: TaskModel) -> None:
    batch = task_model.made_up_batch(_CHECKED_RECORDS)

    def losses(rows: slice) -> Tensor:
        return task_model.per_record_losses({name: value[rows] for name, value in batch.items()})

    task_model.model.eval()  # dropout would draw anew for every pass
    check_engine(engine, task_model.adapter, losses, _CHECKED_RECORDS)
