"""Gradient inversion from the update of one step on one record, by algebra and by search.

What a step on one factor of a LoRA layer ``y = W x + s B A x`` shows of its input x, with the
gradient g of the loss with respect to y at each of a record's T positions:

* a step on B: ``s sum_t g_t (A x_t)'``.  Of each x it holds A x, r numbers.
* a step on A: ``s sum_t (B' g_t) x_t'``.  Its r rows lie in the span of the x_t: nothing where
  B = 0, x itself up to its length where T = 1.
* a head on pooled features f: ``(softmax - y) f'``, so f itself.

With one position each is a rank-one matrix, whose right singular vector is the direction sought.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import beta

from .attack_bounds import Floats, clopper_pearson, trade_off
from .attack_membership import read_adapter
from .attack_site import (
    LEVELS,
    TRAINED,
    RunConfig,
    Server,
    Trained,
    ask_site,
    clipped,
    plan_of,
    read_records,
    released_sum,
    round_plan,
    run_config,
    site_context,
    write_records,
)

# LoRA sees one position where only the class token goes on: in a ViT's last block, behind its
# attention.  The head always does.
_WIDTH, _DEPTH = 48, 2
LAYER = f"base_model.model.blocks.{_DEPTH - 1}.mlp.fc1"
_HEAD = "base_model.model.head"
# Where many positions meet: the embedded backbone's first layer with an adapter.
_FIRST = "base_model.model.blocks.0.attn.qkv"


@dataclass(frozen=True)
class Inversion:
    """One arm of the inversion attacks: a site of one record, which is in the one batch.

    The whole budget goes into one step without subsampling, so all that epsilon allows is shown
    at once.

    Parameters
    ----------
    folder : str
        Where :func:`write_candidates` put the records, and the adapters are.
    trained, level : str
        Keys of ``TRAINED`` and ``LEVELS``.
    max_grad_norm : float
        Clip norm C.
    backbone : str
        Folder of another backbone than the embedded one, with adapters on ``mlp.fc1``.
    """

    folder: str
    trained: str
    level: str
    max_grad_norm: float
    backbone: str = ""

    @property
    def config(self) -> RunConfig:
        """The run config of the attacked run."""
        changes: dict[str, Any] = {}
        if self.backbone:
            changes = {
                "model.source": "timm",
                "model.name": self.backbone,
                "lora.target-modules": "mlp.fc1",
            }
        return run_config(
            LEVELS[self.level],
            rounds=1,
            sample_rate=1.0,
            max_grad_norm=self.max_grad_norm,
            **changes,
        )


def write_candidates(
    folder: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> None:
    """Write all candidate records, and a site of each."""
    write_records(folder / "candidates.npz", images, labels)
    for number in range(len(labels)):
        one = slice(number, number + 1)
        write_records(folder / f"one-{number}.npz", images[one], labels[one])


def write_class_token_vit(folder: Path, seed: int) -> None:
    """Write a small ViT with a class token and random weights in the hub's format."""
    from task.torchvision_ops import declare_missing_torchvision_ops

    declare_missing_torchvision_ops()
    import timm
    from timm.models import save_for_hf

    arguments = {
        "img_size": 16,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": _WIDTH,
        "depth": _DEPTH,
        "num_heads": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    config = {"num_classes": 0, "model_args": arguments, "input_size": [1, 16, 16]}
    config |= {"mean": [0.3], "std": [0.4]}
    save_for_hf(model, str(folder), model_config=config, safe_serialization=True)


def ask(arm: Inversion, server: Server, adapter: Any, record: int) -> Floats:
    """The released sum of one step at the site that holds this candidate alone, (d,)."""
    trained = TRAINED[arm.trained]
    context = site_context(arm.config, Path(arm.folder) / f"one-{record}.npz")
    update = ask_site(context, round_plan(trained, 1), adapter, server.model.fingerprint)
    return released_sum(server, trained, update, 1.0)


def identify(arm: Inversion, trials: int, error: float) -> dict[str, Any]:
    """Ask which of the candidate records made the update.

    Each candidate is the site's record ``trials`` times.  The guess is the candidate whose own
    clipped gradient is nearest to the released sum: the most likely one under Gaussian noise.

    Notes
    -----
    The bound: compare each candidate's update with that of a site whose record contributes zero.
    Over n candidates the chances of guessing i in that reference world add up to at most 1, so
    they average at most 1/n, and by the trade-off curve's concavity the mean chance of a right
    guess is at most its power at a false positive rate of 1/n (as in Hayes et al., 2023).
    """
    trained = TRAINED[arm.trained]
    server = Server(arm.config)
    adapter = read_adapter(arm.folder, 1)
    records = read_records(Path(arm.folder) / "candidates.npz")
    count = len(records[1])
    plan = plan_of(arm.config, 1)
    norm = plan.clip_norm(trained.kind)
    gradients = clipped(server.gradients(adapter, trained, server.batch(*records)), norm)
    half = 0.5 * (gradients**2).sum(axis=1)
    hits = sum(
        int((gradients @ ask(arm, server, adapter, record) - half).argmax()) == record
        for record in range(count)
        for _ in range(trials)
    )
    shown = clopper_pearson(hits, count * trials, 0.025)
    checked = clopper_pearson(hits, count * trials, error)
    allowed = 1.0
    if plan.is_private:
        curve = trade_off(sample_rate=1.0, noise_multiplier=plan.noise_multiplier, steps=1)
        allowed = curve.power(1 / count)
    return {
        "attack": "identification",
        "trained": arm.trained,
        "level": arm.level,
        "max_grad_norm": arm.max_grad_norm,
        "candidates": count,
        "trials": count * trials,
        "noise_multiplier": plan.noise_multiplier,
        "rate": hits / (count * trials),
        "low": shown[0],
        "high": shown[1],
        "bound": allowed,
        "checked_low": checked[0],
        "ok": checked[0] <= allowed,
    }


def layer_inputs(arm: Inversion) -> list[dict[str, Any]]:
    """What the layers' inputs were, by algebra alone: a row per layer that shows one.

    ``cosine``: quartiles over the candidates of |cos| between the recovered direction and the
    true one; ``chance``: the median for a random direction; ``identified``: share of candidates
    that are nearest, by |cos|, to what was recovered from their own update.
    """
    trained = TRAINED[arm.trained]
    server = Server(arm.config)
    adapter = known_adapter(server) if arm.backbone else read_adapter(arm.folder, 1)
    images, labels = read_records(Path(arm.folder) / "candidates.npz")
    server.load(adapter)
    if not arm.backbone:
        return [_spans(arm, server, adapter, images, labels)]
    batch = server.batch(images, labels)
    wanted = {"head": (f"{_HEAD}.weight", _HEAD)} if trained.head else {}
    if trained.mode in ("A", "B"):
        wanted[trained.mode] = (f"{LAYER}.lora_{trained.mode}.weight", LAYER)
    truths = {what: inputs_of(server, layer, batch)[:, 0] for what, (_, layer) in wanted.items()}
    if "B" in truths:
        truths["B"] = truths["B"] @ adapter[f"{LAYER}.lora_A.weight"].astype(np.float64).T
    found: dict[str, list[Floats]] = {what: [] for what in wanted}
    for record in range(len(labels)):
        total = ask(arm, server, adapter, record)
        for what, (tensor, _) in wanted.items():
            found[what].append(leading_direction(part_of(server, trained, total, tensor)))
    rows = []
    for what in wanted:
        likeness = np.abs(cosines(np.stack(found[what]), truths[what]))
        own = likeness.diagonal()
        rows.append(
            {
                "attack": "layer input",
                "trained": arm.trained,
                "level": arm.level,
                "shows": {"B": "A x", "A": "x", "head": "features"}[what],
                "numbers": truths[what].shape[1],
                "cosine": quartiles(own),
                "chance": chance_cosine(truths[what].shape[1]),
                "identified": float((likeness.argmax(axis=1) == np.arange(len(own))).mean()),
            }
        )
    return rows


def _spans(
    arm: Inversion,
    server: Server,
    adapter: Any,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """How much of what a step on A shows lies in the span of the layer's inputs (T positions)."""
    trained = TRAINED[arm.trained]
    inputs = inputs_of(server, _FIRST, server.batch(images, labels))
    shares = np.empty((len(labels), len(labels)))
    bases = [np.linalg.qr(positions.T)[0] for positions in inputs]
    for record in range(len(labels)):
        total = ask(arm, server, adapter, record)
        direction = leading_direction(part_of(server, trained, total, f"{_FIRST}.lora_A.weight"))
        shares[record] = [np.linalg.norm(direction @ basis) for basis in bases]
    positions, width = inputs.shape[1:]
    return {
        "attack": "layer input",
        "trained": arm.trained,
        "level": arm.level,
        "shows": f"span of {positions} x",
        "numbers": width,
        "cosine": quartiles(shares.diagonal()),
        "chance": chance_cosine(width, positions),
        "identified": float((shares.argmax(axis=1) == np.arange(len(labels))).mean()),
    }


def known_adapter(server: Server) -> dict[str, npt.NDArray[np.float32]]:
    """An adapter for the random backbone whose B and head are not at their zero start."""
    draw = np.random.default_rng(0)
    return {
        name: value
        if name.endswith("lora_A.weight")
        else draw.normal(0, 0.1, value.shape).astype(np.float32)
        for name, value in server.start().items()
    }


def inputs_of(server: Server, layer: str, batch: dict[str, torch.Tensor]) -> Floats:
    """What goes into a layer, (n, T, q), for records (n) at the adapter that is loaded."""
    kept: list[torch.Tensor] = []
    module = server.model.model.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            server.model.logits(batch)
    finally:
        handle.remove()
    values = kept[0].double().numpy()
    inputs: Floats = values.reshape(len(values), -1, values.shape[-1])
    return inputs


def part_of(server: Server, trained: Trained, total: Floats, name: str) -> Floats:
    """One tensor of a released sum."""
    start = 0
    for tensor in server.names(trained):
        shape = tuple(server.model.adapter[tensor].shape)
        end = start + int(np.prod(shape))
        if tensor == name:
            return total[start:end].reshape(shape)
        start = end
    raise KeyError(f"a round on {trained} sends no {name}")


def leading_direction(gradient: Floats) -> Floats:
    """The right singular vector of the largest singular value of a weight's gradient (p, q)."""
    direction: Floats = np.linalg.svd(gradient, full_matrices=False)[2][0]
    return direction


def cosines(rows: Floats, others: Floats) -> Floats:
    """Cosine similarity of each row with each other one, (n, m)."""
    left = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    right = others / np.linalg.norm(others, axis=1, keepdims=True)
    likeness: Floats = left @ right.T
    return likeness


def chance_cosine(width: int, dimensions: int = 1) -> float:
    """Median length of a random unit vector's projection on ``dimensions`` of ``width`` axes."""
    return float(np.sqrt(beta.ppf(0.5, dimensions / 2, (width - dimensions) / 2)))


def quartiles(values: Floats) -> list[float]:
    """First quartile, median, third quartile."""
    return [float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]
