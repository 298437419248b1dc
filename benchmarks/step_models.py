"""The models whose steps are measured: random weights in the published shapes, no download.

Speed and memory depend on shapes alone.  Dropout is off everywhere, as in the product, and B is
not zero: a zero factor would make half of the gradients zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strategies import kind_of
from task.adapters import adapter_parameters
from task.torchvision_ops import declare_missing_torchvision_ops

LABELS = 10
RANK, ALPHA = 8, 16
SETS = ("B", "A", "both")  # what a step trains; the head always
_B_STD = 0.02
_ALL_LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_QUERY_VALUE = ("query", "value")
_IMAGES = ("vit", "swin")
_HEADS = {"vit": "head", "swin": "head.fc", "roberta": "classifier", "bert": "classifier"}
_FIRST_BLOCKS = {
    "vit": "blocks.0",
    "swin": "layers.0",
    "roberta": "roberta.encoder.layer.0",
    "bert": "bert.encoder.layer.0",
}
_PADDING = {"roberta": 1, "bert": 0}
_FIRST_WORD = 5  # tokens below are special


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What to build.

    Parameters
    ----------
    family : {"vit", "swin", "roberta", "bert"}
        The first two are timm's, the others transformers'.
    arguments : mapping
        For timm's ``create_model`` or the family's configuration.
    size : int
        Pixels of an image's side, or tokens of a text.
    targets : sequence of str
        Endings of the layers that get an adapter.
    """

    family: str
    arguments: Mapping[str, Any]
    size: int
    targets: Sequence[str]

    @property
    def of_images(self) -> bool:
        """Whether a record is an image; else it is a text."""
        return self.family in _IMAGES

    @property
    def suits_opacus(self) -> bool:
        """Whether a layer's first dimension is the batch: not inside Swin's windows."""
        return self.family != "swin"


def _timm(family: str, name: str, size: int, **arguments: Any) -> ModelSpec:
    return ModelSpec(family, {"model_name": name, **arguments}, size, _ALL_LINEAR)


def _text(family: str, layers: int, width: int, heads: int, inner: int, words: int) -> ModelSpec:
    arguments = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": words,
        "max_position_embeddings": 514,
        "type_vocab_size": 1 if family == "roberta" else 2,
    }
    return ModelSpec(family, arguments, 128, _QUERY_VALUE)


CPU_MODELS: dict[str, ModelSpec] = {
    "vit-tiny": _timm("vit", "vit_tiny_patch16_224", 224),
    "swin-tiny": _timm("swin", "swin_tiny_patch4_window7_224", 64, img_size=64, window_size=4),
    "roberta-small": _text("roberta", 6, 512, 8, 2048, 50265),
    "minilm": _text("bert", 6, 384, 12, 1536, 30522),
}
GPU_MODELS: dict[str, ModelSpec] = {
    "vit-base": _timm("vit", "vit_base_patch16_224", 224),
    "swin-base": _timm("swin", "swin_base_patch4_window7_224", 224),
    "roberta-large": _text("roberta", 24, 1024, 16, 4096, 50265),
}
MODELS = CPU_MODELS | GPU_MODELS


class Subject:
    """A model with its adapter and one batch of made-up records.

    Parameters
    ----------
    spec : ModelSpec
        What to build.
    records : int
        Size of the batch.
    seed : int
        Of weights and records: equal seeds make equal subjects.
    device : str
        ``"cpu"`` or ``"cuda"``.
    dtype : str
        ``"float32"``, or ``"bfloat16"`` for the forward under autocast.

    Attributes
    ----------
    model : nn.Module
        PEFT's model; no parameter requires a gradient.
    adapter : dict of str to nn.Parameter
        Factors and head by the names that PEFT saves.
    """

    def __init__(self, spec: ModelSpec, records: int, seed: int, device: str, dtype: str) -> None:
        self.spec, self.records, self._seed = spec, records, seed
        self._device, self._dtype = device, dtype
        with _seeded(seed):
            self.model = _with_adapter(_backbone(spec), spec).to(device).train()
            self._inputs = {name: each.to(device) for name, each in _batch(spec, records).items()}
            self._labels = torch.randint(LABELS, (records,)).to(device)
        self.adapter = adapter_parameters(self.model)

    def active(self, trained: str) -> list[str]:
        """Names of the tensors that a step on the set ``trained`` trains."""
        kinds = {"B": {"B", "head"}, "A": {"A", "head"}, "both": {"A", "B", "head"}}[trained]
        return [name for name in self.adapter if kind_of(name) in kinds]

    def losses(self, model: nn.Module, records: int) -> Tensor:
        """Cross entropy of each of the first records, (records,)."""
        values = {name: each[:records] for name, each in self._inputs.items()}
        with self._precision():
            # timm's models take the pixels and give logits, transformers' take names and give more.
            images = self.spec.of_images
            logits = model(*values.values()) if images else model(**values).logits
            losses: Tensor = F.cross_entropy(logits, self._labels[:records], reduction="none")
        return losses

    def frozen_backbone(self) -> nn.Module:
        """The same model without an adapter, cut before its first block.

        Gradients flow back to the input of the first block and no further, as in a step that
        trains adapters: nobody needs the gradient of pixels or embeddings.
        """
        with _seeded(self._seed):
            backbone = _backbone(self.spec).to(self._device).train().requires_grad_(False)
        first = backbone.get_submodule(_FIRST_BLOCKS[self.spec.family])
        first.register_forward_pre_hook(_cut)
        return backbone

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=getattr(torch, self._dtype))


def _cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = args
    return hidden.detach().requires_grad_(True), *others


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Everything is drawn on the CPU, so that devices start from the same numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _backbone(spec: ModelSpec) -> nn.Module:
    declare_missing_torchvision_ops()
    if spec.of_images:
        import timm

        made: nn.Module = timm.create_model(
            **spec.arguments, num_classes=LABELS, drop_rate=0.0, drop_path_rate=0.0
        )
        return made
    import transformers

    name = {"roberta": "Roberta", "bert": "Bert"}[spec.family]
    config = getattr(transformers, f"{name}Config")(
        **spec.arguments,
        num_labels=LABELS,
        pad_token_id=_PADDING[spec.family],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = getattr(transformers, f"{name}ForSequenceClassification")(config)
    return model


def _with_adapter(backbone: nn.Module, spec: ModelSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(spec.targets),
        modules_to_save=[_HEADS[spec.family]],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, about what transformers renames
        model: Any = get_peft_model(backbone, config)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=_B_STD)
    return model.requires_grad_(False)


def _batch(spec: ModelSpec, records: int) -> dict[str, Tensor]:
    if spec.of_images:
        return {"pixels": torch.randn(records, 3, spec.size, spec.size)}
    # Texts of a quarter of the length and more, padded to the longest, which has all tokens.
    lengths = torch.randint(spec.size // 4, spec.size + 1, (records, 1))
    lengths[0] = spec.size
    mask = torch.arange(spec.size) < lengths
    tokens = torch.randint(_FIRST_WORD, spec.arguments["vocab_size"], (records, spec.size))
    tokens[~mask] = _PADDING[spec.family]
    return {"input_ids": tokens, "attention_mask": mask.long()}
