"""What an adapter tensor is, told by its name as PEFT saves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Kind = Literal["A", "B", "head"]

_MARKS: dict[str, Kind] = {".lora_A.": "A", ".lora_B.": "B"}


def kind_of(name: str) -> Kind:
    """Say whether ``name`` is a LoRA factor A, a factor B, or part of the head.

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


def layers_of(names: Iterable[str]) -> tuple[str, ...]:
    """Adapted modules among ``names``, in order of first appearance."""
    return tuple(dict.fromkeys(layer for layer in map(layer_of, names) if layer))
