"""What an adapter tensor is, told by its name as PEFT saves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Kind = Literal["A", "B", "head", "fold"]

_MARKS: dict[str, Kind] = {
    ".lora_A.": "A",
    ".lora_B.": "B",
    ".fold_A.": "fold",
    ".fold_B.": "fold",
}


def kind_of(name: str) -> Kind:
    """Say whether ``name`` is a LoRA factor A, a factor B, part of the head, or of a fold.

    Folds are the low-rank terms that FedEx-LoRA and FLoRA add to the frozen weights; no client
    trains them.

    >>> kind_of("base_model.model.blocks.0.attn.qkv.lora_A.weight")
    'A'
    >>> kind_of("base_model.model.head.bias")
    'head'
    """
    for mark, kind in _MARKS.items():
        if mark in name:
            return kind
    return "head"


def layer_of(name: str) -> str:
    """Name of the adapted module that a factor belongs to; "" for a head tensor.

    >>> layer_of("base_model.model.blocks.0.attn.qkv.lora_A.weight")
    'base_model.model.blocks.0.attn.qkv'
    """
    for mark in _MARKS:
        before, found, _ = name.partition(mark)
        if found:
            return before
    return ""


def factor_names(layer: str) -> tuple[str, str]:
    """Names of a layer's factors A and B.

    >>> factor_names("model.query")
    ('model.query.lora_A.weight', 'model.query.lora_B.weight')
    """
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def fold_names(layer: str, number: int) -> tuple[str, str]:
    """Names of the two thin factors, right (R, n) and left (m, R), of a layer's fold.

    >>> fold_names("model.query", 7)[0]
    'model.query.fold_A.000007.weight'
    """
    return f"{layer}.fold_A.{number:06d}.weight", f"{layer}.fold_B.{number:06d}.weight"


def layers_of(names: Iterable[str]) -> tuple[str, ...]:
    """Adapted modules among ``names``, in order of first appearance."""
    return tuple(dict.fromkeys(layer_of(name) for name in names if kind_of(name) in ("A", "B")))
