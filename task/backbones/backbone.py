"""What all backbones have in common: head, dropout, guards, fingerprint."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..encoders import Encoder
from ..errors import ModelError

_HEAD_STD = 0.02


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator of its own for one tensor, so that the order does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Backbone:
    """A pretrained module whose head is new.

    Parameters
    ----------
    module : torch.nn.Module
        Gives logits; on the CPU, float32.
    heads : tuple of str
        Names of the sub-modules that make up the new head.
    encoder : Encoder
        Brings raw records into the form that ``module`` takes.
    family : str
        Name for looking up the usual LoRA targets, for example ``"timm"`` or ``"roberta"``.
    origin : str
        What ``base_model_name_or_path`` of an exported adapter says.
    revision : str
        Commit on the hub, or empty.
    """

    module: nn.Module
    heads: tuple[str, ...]
    encoder: Encoder
    family: str
    origin: str
    revision: str

    def prepare(self, *, seed: int, trained_head: bool) -> None:
        """Refuse what mixes records, switch dropout off, give the head its seeded start.

        The noise of differential privacy regularises more than dropout would, and the checks of
        the per-example engines compare two passes over the same records, which must be equal.
        """
        _refuse_batch_norm(self.module)
        _switch_dropout_off(self.module)
        layers = [
            entry for name in self.heads for entry in _layers(self.module.get_submodule(name), name)
        ]
        _start_head(layers, seed, trained_head)

    def checkpoint_gradients(self) -> None:
        """Make training keep each block's input only and compute the rest of it again.

        Raises
        ------
        ModelError
            If the model cannot do so.
        """
        module: Any = self.module
        if getattr(module, "supports_gradient_checkpointing", False):  # transformers
            # The re-entrant kind would run blocks without the graph that engines listen to.
            module.gradient_checkpointing_enable({"use_reentrant": False})
        elif hasattr(module, "set_grad_checkpointing"):  # timm
            module.set_grad_checkpointing(True)
        else:
            raise ModelError(
                f"model.gradient-checkpointing: {type(module).__name__} does not support it; "
                "accepted is false"
            )

    def share(self) -> Backbone:
        """Return a backbone whose module is another one, but whose tensors are these.

        Layers can be wrapped or replaced in it without a trace here.  Tensors changed in place are
        changed here, too (PEFT's ``merge_adapter`` does that, and nothing in this app).
        """
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.module.parameters()
        }
        memo |= {id(buffer): buffer for buffer in self.module.buffers()}
        return replace(self, module=copy.deepcopy(self.module, memo))

    def in_head(self, name: str) -> bool:
        """Tell whether a parameter or module called ``name`` belongs to the head."""
        return any(name == head or name.startswith(f"{head}.") for head in self.heads)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of names, dtypes, shapes and bytes of all but the head.

        Covered are parameters and persistent buffers, in the order of their names. Machines with
        equal fingerprints hold the same frozen weights, on whichever device.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            if self.in_head(name):
                continue
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _refuse_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, _BatchNorm):
            raise ModelError(
                f"the backbone has a BatchNorm layer ({name}): in training it mixes the records of "
                "a batch, so one record's gradient depends on the others; accepted are backbones "
                "with LayerNorm, RMSNorm or GroupNorm, such as ViT, Swin, BERT or RoBERTa"
            )


def _switch_dropout_off(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            child.p = 0.0
        # Stochastic depth and patch dropout of timm; attention dropout of timm and transformers.
        for attribute in ("drop_prob", "prob", "attention_dropout"):
            if isinstance(getattr(child, attribute, None), float):
                setattr(child, attribute, 0.0)


def _start_head(layers: list[tuple[str, nn.Module]], seed: int, trained: bool) -> None:
    single = sum(isinstance(layer, nn.Linear) for _, layer in layers) == 1
    with torch.no_grad():
        for path, layer in layers:
            if isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()
                continue
            if not isinstance(layer, nn.Linear):
                raise ModelError(
                    f"the head's layer {path} is a {type(layer).__name__}; accepted are heads of "
                    "linear layers and LayerNorm"
                )
            if single and trained:
                layer.weight.zero_()
            else:
                # Zeros in a head of two layers, or in one that is never trained, would stop every
                # gradient. A frozen head cannot grow: its logits are of the features' size.
                std = _HEAD_STD if trained else layer.in_features**-0.5
                layer.weight.normal_(0.0, std, generator=seeded_generator(seed, path))
            if layer.bias is not None:
                layer.bias.zero_()


def _layers(head: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the sub-modules that own parameters themselves, with their full names."""
    for path, layer in head.named_modules(prefix=name):
        if next(layer.parameters(recurse=False), None) is not None:
            yield path, layer
