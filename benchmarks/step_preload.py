"""Loads the libraries once for all processes that measure memory, which are forked off afterwards.

Nothing is computed here: a process that has started threads or a GPU must not be forked.
"""

from __future__ import annotations

import importlib

from task.torchvision_ops import declare_missing_torchvision_ops

declare_missing_torchvision_ops()

for _name in (
    "timm",
    "peft",
    "opacus.grad_sample",
    "opacus.optimizers",
    "transformers.models.bert.modeling_bert",
    "transformers.models.roberta.modeling_roberta",
    "benchmarks.step_memory",
):
    importlib.import_module(_name)
