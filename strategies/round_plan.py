"""The round plan: what a round trains, decided by the strategy and obeyed by every client."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, get_args

import numpy as np
from flwr.app import ConfigRecord

from .tensor_names import kind_of, layer_of

Mode = Literal["A", "B", "both", "alternate"]
Optimizer = Literal["sgd", "adamw"]
ScoredBy = Literal["none", "block", "module"]

# A larger rate cannot multiply a float32 gradient.
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """One round's instructions.

    Parameters
    ----------
    server_round : int
        Round, from 1.
    mode : {"A", "B", "both", "alternate"}
        What each layer trains, unless ``layer_modes`` says otherwise.  ``alternate``: B in odd
        local steps, A in even ones (LA-LoRA), B first because with B = 0 a step on A is noise.
    layer_modes : mapping of str to mode
        Exceptions by layer (module name).
    train_head : bool
        Whether every step also trains the head.
    local_steps : int
        Private steps E in this round.
    optimizer : {"sgd", "adamw"}
        Local optimizer; factors keep their own states, only active ones are stepped.
    lr_a, lr_b, lr_head : float
        This round's learning rates, decay included.
    low_pass : bool
        Whether noised factor gradients are smoothed before the optimizer step.
    scores : {"none", "block", "module"}
        Whether clients send AS-LoRA scores of what they trained, and one for what.
    """

    server_round: int
    mode: Mode
    local_steps: int
    lr_a: float
    lr_b: float
    lr_head: float
    train_head: bool = True
    low_pass: bool = False
    optimizer: Optimizer = "sgd"
    layer_modes: Mapping[str, Mode] = dataclasses.field(default_factory=dict)
    scores: ScoredBy = "none"

    def __post_init__(self) -> None:
        """Refuse a plan that no client could follow."""
        if self.server_round < 1:
            raise ValueError(f"server_round must be >= 1, got {self.server_round}")
        if self.local_steps < 1:
            raise ValueError(f"local_steps must be >= 1, got {self.local_steps}")
        for name in ("lr_a", "lr_b", "lr_head"):
            rate = getattr(self, name)
            if not 0 <= rate <= _LARGEST_FLOAT32:  # never true of a NaN
                raise ValueError(f"{name} must be from 0 to {_LARGEST_FLOAT32:.2g}, got {rate}")
        for mode in (self.mode, *self.layer_modes.values()):
            if mode not in get_args(Mode):
                raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        if self.optimizer not in get_args(Optimizer):
            raise ValueError(
                f"optimizer must be one of {get_args(Optimizer)}, got {self.optimizer!r}"
            )
        if self.scores not in get_args(ScoredBy):
            raise ValueError(f"scores must be one of {get_args(ScoredBy)}, got {self.scores!r}")
        alternates = "alternate" in (self.mode, *self.layer_modes.values())
        if alternates and self.local_steps % 2:
            raise ValueError(
                f"alternation needs an even number of local steps, got {self.local_steps}: with an "
                "odd one B would be trained more often than A"
            )

    def active(self, step: int, names: Iterable[str]) -> tuple[str, ...]:
        """Tensors that local step ``step`` (from 1) trains, in the order of ``names``."""
        return tuple(name for name in names if self._is_active(step, name))

    def uploaded(self, names: Iterable[str]) -> tuple[str, ...]:
        """Tensors that any step of the round trains: exactly what travels up."""
        first_two = range(1, min(self.local_steps, 2) + 1)
        return tuple(n for n in names if any(self._is_active(step, n) for step in first_two))

    def learning_rate(self, name: str) -> float:
        """Learning rate of a tensor in this round."""
        return {"A": self.lr_a, "B": self.lr_b, "head": self.lr_head}[kind_of(name)]

    def _is_active(self, step: int, name: str) -> bool:
        kind = kind_of(name)
        if kind == "head":
            return self.train_head
        if kind == "fold":
            return False
        mode = self.layer_modes.get(layer_of(name), self.mode)
        if mode == "alternate":
            return kind == ("B" if step % 2 else "A")
        return mode in ("both", kind)

    def describe(self) -> str:
        """Say in a word what layers train: the mode, with the exceptions counted."""
        modes = list(self.layer_modes.values())
        others = [f"{mode} in {modes.count(mode)}" for mode in sorted(set(modes))]
        return self.mode + (f" ({', '.join(others)} layers)" if others else "")

    def to_record(self) -> ConfigRecord:
        """Pack the plan for a message."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["layer_modes"] = json.dumps(dict(self.layer_modes))
        return ConfigRecord({name.replace("_", "-"): value for name, value in fields.items()})

    @classmethod
    def from_record(cls, record: ConfigRecord) -> Self:
        """Unpack a plan; anything missing, unknown or of the wrong type is refused.

        Raises
        ------
        ValueError
            Naming what is wrong.
        """
        fields: dict[str, Any] = {n.replace("-", "_"): value for n, value in record.items()}
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != expected:
            raise ValueError(f"a round plan has {sorted(expected)}, got {sorted(fields)}")
        kinds: dict[str, tuple[type, ...]] = {
            "server_round": (int,), "local_steps": (int,), "mode": (str,), "optimizer": (str,),
            "lr_a": (float, int), "lr_b": (float, int), "lr_head": (float, int),
            "train_head": (bool,), "low_pass": (bool,), "layer_modes": (str,), "scores": (str,),
        }  # fmt: skip
        for name, types in kinds.items():
            if type(fields[name]) not in types:
                raise ValueError(f"{name} of a round plan must be {types[0].__name__}")
        modes = json.loads(str(fields["layer_modes"]))
        if not isinstance(modes, dict):
            raise ValueError("layer_modes of a round plan must be a JSON object")
        fields["layer_modes"] = modes
        return cls(**fields)
