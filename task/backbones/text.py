"""Text backbones: sequence classification models of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..encoders import TextEncoder
from ..errors import ModelError
from ..settings import ModelSettings
from .backbone import Backbone
from .weights import model_folder


def load_text_backbone(settings: ModelSettings, num_labels: int) -> Backbone:
    """Load a transformers model and its tokenizer; see :func:`task.backbones.load_backbone`."""
    from transformers import AutoConfig, AutoTokenizer

    folder = model_folder(settings)
    try:
        config = AutoConfig.from_pretrained(
            folder, num_labels=num_labels, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder}: transformers cannot read its config or tokenizer: {error}"
        ) from error
    _pad(tokenizer, config, folder)
    _without_dropout(config)
    module, missing = _load(folder, config)
    heads = _heads(module)
    _check_missing(folder, heads, missing)
    _check_length(settings.max_length, module, config, tokenizer)
    return Backbone(
        module=module,
        heads=heads,
        encoder=TextEncoder(
            tokenizer=tokenizer,
            max_length=settings.max_length,
            vocab_size=int(config.vocab_size),
            name=f"{settings.name}@{settings.revision}",
        ),
        family=str(config.model_type),
        origin=settings.name,
        revision=settings.revision,
    )


def _load(folder: Path, config: Any) -> tuple[nn.Module, set[str]]:
    from transformers import AutoModelForSequenceClassification

    try:
        with _quiet():
            module, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                # A checkpoint's own head has its own number of classes and is replaced anyway.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: not a sequence classification model of transformers: {error}"
        ) from error
    mismatched = {entry[0] for entry in loading["mismatched_keys"]}
    return module, set(loading["missing_keys"]) | mismatched


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report on the missing head, which is missing on purpose."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _heads(module: Any) -> tuple[str, ...]:
    """Name the children beside the pretrained trunk that hold parameters."""
    heads = tuple(
        name
        for name, child in module.named_children()
        if name != module.base_model_prefix and any(True for _ in child.parameters())
    )
    if not heads:
        raise ModelError(f"{type(module).__name__} has no classification head of its own")
    return heads


def _check_missing(folder: Path, heads: tuple[str, ...], missing: set[str]) -> None:
    random = sorted(name for name in missing if name.split(".")[0] not in heads)
    if random:
        raise ModelError(
            f"{folder}: the weights lack or do not fit {', '.join(random[:5])}"
            f"{' and more' if len(random) > 5 else ''}; accepted are complete backbones, only the "
            f"head ({', '.join(heads)}) may be new"
        )


def _pad(tokenizer: Any, config: Any, folder: Path) -> None:
    """Make sure that there is a padding token and that the model knows it."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{folder}: the tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def _without_dropout(config: Any) -> None:
    """Set every dropout rate of the config to 0; some models read it in each forward pass."""
    for key, value in config.to_dict().items():
        rate = isinstance(value, (int, float)) and not isinstance(value, bool)
        if "drop" in key and (rate or key == "classifier_dropout"):
            setattr(config, key, 0.0)


def _check_length(max_length: int, module: nn.Module, config: Any, tokenizer: Any) -> None:
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int):
        limits.append(positions - _first_position(module))
    if max_length > min(limits):
        raise ModelError(
            f"model.max-length is {max_length}; accepted: at most {min(limits)} tokens, the "
            "longest text that this backbone takes"
        )


def _first_position(module: nn.Module) -> int:
    """RoBERTa and its kin count positions from the padding token's id + 1, the others from 0."""
    for name, child in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(child, nn.Embedding):
            return 0 if child.padding_idx is None else child.padding_idx + 1
    return 0
