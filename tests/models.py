"""Tiny models with random weights in local folders, in the formats that the hub uses."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from task.torchvision_ops import declare_missing_torchvision_ops

declare_missing_torchvision_ops()

WORDS = ("a", "bad", "film", "good", "not", "plot", "the", "very", "was")
IMAGE_KINDS = ("vit", "swin")
TEXT_KINDS = ("roberta", "bert")
TINY_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def make_vit(folder: Path, *, num_classes: int = 0, channels: int = 1) -> Path:
    """Write a timm ViT of 16 x 16 pixels."""
    arguments = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "in_chans": channels,
    }
    return _make_timm(folder, "vit_tiny_patch16_224", arguments, num_classes)


def make_swin(folder: Path, *, num_classes: int = 7) -> Path:
    """Write a timm Swin of 32 x 32 pixels with shifted windows."""
    arguments = {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 2],
    }
    return _make_timm(folder, "swin_tiny_patch4_window7_224", arguments, num_classes)


def _make_timm(folder: Path, name: str, arguments: dict, num_classes: int) -> Path:
    import timm
    from timm.models import save_for_hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=num_classes, **arguments)
    save_for_hf(
        model,
        str(folder),
        model_config={"num_classes": num_classes},
        model_args=arguments,
        safe_serialization=True,
    )
    return folder


def make_text(folder: Path, kind: str, **changes: object) -> Path:
    """Write a tiny RoBERTa, BERT, DistilBERT or Llama trunk with a word tokenizer."""
    import transformers as tf

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {word: index for index, word in enumerate([*special, *WORDS])}
    common = {"vocab_size": len(vocab), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    tiny = {**TINY_TEXT, **common, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "roberta":
            config = tf.RobertaConfig(type_vocab_size=1, **tiny)
            model = tf.RobertaForMaskedLM(config)
        elif kind == "bert":
            model = tf.BertModel(tf.BertConfig(**tiny))
        elif kind == "distilbert":
            config = tf.DistilBertConfig(
                dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=40, **common
            )
            model = tf.DistilBertModel(config)
        elif kind == "llama":
            model = tf.LlamaModel(tf.LlamaConfig(num_key_value_heads=2, **tiny))
        else:
            raise ValueError(kind)
    model.save_pretrained(folder)
    _write_tokenizer(folder, vocab, types=kind == "bert")
    return folder


def _write_tokenizer(folder: Path, vocab: dict[str, int], *, types: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_input_names=names,
    )
    fast.save_pretrained(folder)


def write_json(path: Path, value: object) -> Path:
    """Write a value as JSON."""
    path.write_text(json.dumps(value))
    return path
