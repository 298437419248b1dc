"""The records that are learned from: loading, checking, splitting over clients, encoding."""

from __future__ import annotations

from .cache import ProcessCache, simulation_cache
from .labels import class_names, num_labels
from .load import data_stamp, load_client_records, load_test_records
from .records import Records

__all__ = [
    "ProcessCache",
    "Records",
    "class_names",
    "data_stamp",
    "load_client_records",
    "load_test_records",
    "num_labels",
    "simulation_cache",
]
