"""The model that a federation trains: a frozen backbone, LoRA adapters and a head."""

from __future__ import annotations

import copy
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters import adapter_parameters, is_lora, wrap_with_lora
from .backbones import Backbone, load_backbone
from .encoders import Encoder
from .errors import ModelError
from .folds import Folds, is_fold
from .settings import LoRASettings, ModelSettings

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class TaskModel:
    """A PEFT model, and what the other rooms need to know about it.

    Parameters
    ----------
    model : peft.PeftModel
        Gives logits. No parameter requires a gradient; train and eval mode are the caller's.
    adapter : mapping of str to torch.nn.Parameter
        The tensors that training may change, named as PEFT saves them (``...lora_A.weight``,
        ``...lora_B.weight``, the head's), in PEFT's order. The head is always among them.
    num_labels : int
        Number of classes.
    encoder : Encoder
        Brings raw records into the form that the model takes.
    fingerprint : str
        SHA-256 (hex) of the frozen weights; equal on all machines that hold the same backbone.
        Folds do not change it.
    precision : {"float32", "bfloat16"}
        What :meth:`per_record_losses` computes in; weights are float32 in any case.
    folds : Folds
        What :meth:`set_folds` set, not an argument.
    """

    model: PeftModel
    adapter: Mapping[str, torch.nn.Parameter]
    num_labels: int
    encoder: Encoder
    fingerprint: str
    precision: Literal["float32", "bfloat16"] = "float32"
    folds: Folds = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folds", Folds(self.model, self.adapter))

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the adapter tensors that belong to the head, not to a LoRA factor."""
        return tuple(name for name in self.adapter if not is_lora(name))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.adapter.values())).device

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits (n, num_labels) of a batch, which may lie on another device."""
        inputs = {k: v.to(self.device) for k, v in batch.items() if k != "labels"}
        if "pixel_values" in inputs:
            return self.model(inputs["pixel_values"])  # type: ignore[no-any-return]
        return self.model(**inputs).logits  # type: ignore[no-any-return]

    def per_record_losses(
        self, batch: Mapping[str, Tensor], *, full_precision: bool = False
    ) -> Tensor:
        """Return each record's own cross entropy in nats: float32 (n,), never averaged.

        The model runs in :attr:`precision`, or in float32 with ``full_precision``.
        """
        labels = batch["labels"].to(self.device)
        low = self.precision == "bfloat16" and not full_precision
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            logits = self.logits(batch)
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def made_up_batch(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Return ``n`` random public records with labels, on the CPU, for self-checks."""
        generator = torch.Generator().manual_seed(seed)
        batch = self.encoder.made_up(n, generator)
        batch["labels"] = torch.randint(0, self.num_labels, (n,), generator=generator)
        return batch

    def to(self, device: torch.device | str) -> TaskModel:
        """Move the model in place; :attr:`adapter` keeps naming the same parameters."""
        self.model.to(device)
        return self

    def adapter_state(self) -> dict[str, Tensor]:
        """Return detached copies of the adapter tensors on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.adapter.items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors into the adapter, in place, and set the folds.

        Parameters
        ----------
        state : mapping of str to Tensor
            The adapter's tensors, and any fold tensors (:mod:`task.folds`). Without folds the
            frozen weights become the backbone's own again.

        Raises
        ------
        ModelError
            Unless ``state`` has exactly the adapter's names and shapes, in floating point, and
            folds that fit. Then nothing is changed.
        """
        folds = {k: t for k, t in state.items() if k not in self.adapter and is_fold(k)}
        missing = [name for name in self.adapter if name not in state]
        unknown = [name for name in state if name not in self.adapter and name not in folds]
        if missing or unknown:
            raise ModelError(
                f"adapter tensors do not fit: missing {missing[:3]}, unknown {unknown[:3]} "
                f"({len(missing)} and {len(unknown)}; accepted are exactly {len(self.adapter)})"
            )
        for name, parameter in self.adapter.items():
            if state[name].shape != parameter.shape or not state[name].is_floating_point():
                raise ModelError(
                    f"adapter tensor {name} is {state[name].dtype} {tuple(state[name].shape)}; "
                    f"accepted is {parameter.dtype} {tuple(parameter.shape)}"
                )
        terms = self.folds.check(folds)
        self.folds.set(terms)
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.copy_(state[name])

    def set_folds(self, folds: Mapping[str, Tensor]) -> None:
        """Make the frozen weights W0 plus these low-rank terms, whatever was set before.

        Parameters
        ----------
        folds : mapping of str to Tensor
            Pairs A (R, n) and B (m, R), named as :mod:`task.folds` says. Each layer's weight
            becomes ``W0 + s * B_1 @ A_1 + s * B_2 @ A_2 + ...`` in float32, by ascending number,
            with the layer's LoRA scaling ``s``. An empty mapping restores W0 bit for bit.

        Raises
        ------
        ModelError
            If a name or a shape does not fit, or a partner is missing. Then nothing is changed.
        """
        self.folds.set(self.folds.check(folds))

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's format: adapter_config.json, adapter_model.safetensors.

        It stands for the whole change of the original backbone: folds are written into the LoRA
        factors, whose ranks grow (``rank_pattern``, ``alpha_pattern``).

        The files appear at once: they are written beside ``folder`` and then renamed. A folder
        that is already there is replaced.

        Raises
        ------
        ModelError
            If ``folder`` exists and is not an adapter's folder, or folds are not finite.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        _check_replaceable(folder)
        config = copy.deepcopy(self.model.peft_config["default"])
        config.inference_mode = True
        state = self.folds.export(self.adapter_state(), config)
        beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        beside.mkdir(parents=True)
        try:
            save_file(
                state,
                beside / "adapter_model.safetensors",
                metadata={"format": "pt", "backbone-sha256": self.fingerprint},
            )
            config.save_pretrained(str(beside))
            if folder.exists():
                shutil.rmtree(folder)
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def build_task_model(
    model: ModelSettings,
    lora: LoRASettings,
    num_labels: int,
    *,
    seed: int,
    backbone: Backbone | None = None,
) -> TaskModel:
    """Build the model of a run; equal arguments give equal models on every machine.

    Torch's global random state is neither read nor changed.

    Parameters
    ----------
    model, lora : ModelSettings, LoRASettings
        Which backbone, which adapters.
    num_labels : int
        Number of classes, at least 2.
    seed : int
        Seed of the adapters' and the head's start. It is public.
    backbone : Backbone, optional
        What :func:`~task.backbones.load_backbone` gave for these arguments; its tensors are
        shared, its module is left alone. Not given: it is loaded.

    Returns
    -------
    TaskModel
        Where the backbone is (a loaded one: the CPU), in train mode as PEFT leaves it, without
        gradients.

    Raises
    ------
    ModelError
        If the backbone cannot be loaded or does not suit the settings.
    """
    if num_labels < 2:
        raise ModelError(f"the model needs at least 2 classes, got {num_labels}")
    backbone = backbone.share() if backbone else load_backbone(model, num_labels, seed=seed)
    fingerprint = backbone.fingerprint()
    peft_model = wrap_with_lora(backbone, lora, seed=seed)
    return TaskModel(
        model=peft_model,
        adapter=MappingProxyType(adapter_parameters(peft_model)),
        num_labels=num_labels,
        encoder=backbone.encoder,
        fingerprint=fingerprint,
        precision=model.precision,
    )


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    adapter = folder.is_dir() and (folder / "adapter_config.json").is_file()
    empty = folder.is_dir() and not any(folder.iterdir())
    if not (adapter or empty):
        raise ModelError(f"{folder} exists and holds no adapter, so it is not overwritten")
