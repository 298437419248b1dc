"""How good a model is on records that are public or the server's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from .data.records import Records
    from .model import TaskModel


def evaluate(
    task_model: TaskModel,
    records: Records,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Measure accuracy and loss, in eval mode; the former mode is restored.

    The result depends on the records without any noise: on private records it is itself private.

    Parameters
    ----------
    task_model : TaskModel
        The model to measure.
    records : Records
        The records to measure on, at least one.
    batch_size : int (default: 32)
        Records at a time.  Many more are slower on a CPU: their activations leave its caches.
    device : torch.device or str, optional
        Where to compute: the model is moved there and stays. Not given: where it is.

    Returns
    -------
    dict of str to float
        ``accuracy`` in [0, 1], ``loss`` (mean cross entropy in nats), ``num-examples``.
    """
    if len(records) == 0:
        raise ValueError("there are no records to evaluate on")
    if device is not None:
        task_model.to(device)
    modes = [(module, module.training) for module in task_model.model.modules()]
    task_model.model.eval()
    right, loss = 0, 0.0
    try:
        with torch.no_grad():
            for start in range(0, len(records), batch_size):
                batch = records.batch(np.arange(start, min(start + batch_size, len(records))))
                labels = batch["labels"].to(task_model.device)
                logits = task_model.logits(batch).float()
                right += int((logits.argmax(dim=1) == labels).sum())
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    finally:
        for module, training in modes:
            module.training = training
    count = float(len(records))
    return {"accuracy": right / count, "loss": loss / count, "num-examples": count}
