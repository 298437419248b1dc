"""Settings of what is learned: the keys ``model.*``, ``lora.*`` and ``data.*`` of the run config.

Flower's run config knows numbers, booleans and strings only. Lists are therefore comma-separated
strings, and an empty string or a zero means "not set" where a description says so. Importing this
module loads neither torch nor a model, so that a mistake is reported before anything is loaded.
"""

from __future__ import annotations

from .base import is_local, split_list
from .data import EMBEDDED_LABELS, FILE_SOURCES, TABLE_SOURCES, DataSettings
from .model import LoRASettings, ModelSettings

__all__ = [
    "EMBEDDED_LABELS",
    "FILE_SOURCES",
    "TABLE_SOURCES",
    "DataSettings",
    "LoRASettings",
    "ModelSettings",
    "is_local",
    "split_list",
]
