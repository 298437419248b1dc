"""What is learned: backbones with LoRA adapters, data and its partitions, metrics.

Public names are imported when they are first asked for, so that ``import task`` and the settings
load neither torch nor a model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Records, load_client_records, load_test_records, num_labels
    from .errors import DataError, ModelError
    from .metrics import evaluate
    from .model import TaskModel, build_task_model
    from .settings import DataSettings, LoRASettings, ModelSettings

_HOMES = {
    "DataError": "errors",
    "DataSettings": "settings",
    "LoRASettings": "settings",
    "ModelError": "errors",
    "ModelSettings": "settings",
    "Records": "data",
    "TaskModel": "model",
    "build_task_model": "model",
    "evaluate": "metrics",
    "load_client_records": "data",
    "load_test_records": "data",
    "num_labels": "data",
}

__all__ = [
    "DataError",
    "DataSettings",
    "LoRASettings",
    "ModelError",
    "ModelSettings",
    "Records",
    "TaskModel",
    "build_task_model",
    "evaluate",
    "load_client_records",
    "load_test_records",
    "num_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
