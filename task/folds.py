"""Low-rank terms from the server, folded into the frozen weights under the LoRA layers.

A fold is a pair of tensors with the names

    ``<layer>.fold_A.<number>.weight``  (R, n)
    ``<layer>.fold_B.<number>.weight``  (m, R)

where ``<layer>`` is what PEFT writes before ``.lora_A.`` and ``<number>`` is a round with at least
six digits (``000007``). FLoRA (Wang et al. 2024) and FedEx-LoRA (Singhal et al. 2025) need them:
the layer's weight is ``W0 + s * B_1 @ A_1 + s * B_2 @ A_2 + ...`` with its LoRA scaling ``s``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

FOLD_MARKS = (".fold_A.", ".fold_B.")
"""What a fold tensor's name contains."""

Term = tuple[int, Tensor, Tensor]
"""(number, B, A)."""

Terms = dict[str, list[Term]]
"""Per layer its terms, by ascending number."""

_NAME = re.compile(r"(?P<layer>.+)\.fold_(?P<side>[AB])\.(?P<number>[0-9]{6,})\.weight")


def is_fold(name: str) -> bool:
    """Tell a fold tensor from an adapter tensor by its name."""
    return any(mark in name for mark in FOLD_MARKS)


def pair_folds(state: Mapping[str, Tensor]) -> Terms:
    """Sort fold tensors into pairs.

    Parameters
    ----------
    state : mapping of str to Tensor
        Fold tensors only: A (R, n) and B (m, R).

    Returns
    -------
    dict of str to list of (int, Tensor, Tensor)
        Per layer its (number, B, A), by ascending number. The tensors are those given.

    Raises
    ------
    ModelError
        If a name has another form, a partner is missing, a tensor is not a floating-point matrix,
        or the inner ranks of a pair differ or are 0.
    """
    sides: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = _NAME.fullmatch(name)
        # The padding is checked so that one number cannot be written in two ways.
        if found is None or found["number"] != f"{int(found['number']):06d}":
            raise ModelError(
                f"{name} does not name a fold; accepted is <layer>.fold_A.<number>.weight or "
                f".fold_B., the number with zeros to six digits, such as 000007"
            )
        if not tensor.is_floating_point() or tensor.dim() != 2 or 0 in tensor.shape:
            raise ModelError(
                f"fold tensor {name} is {tensor.dtype} {tuple(tensor.shape)}; "
                f"accepted is a floating-point matrix that is not empty"
            )
        sides.setdefault((found["layer"], int(found["number"])), {})[found["side"]] = tensor
    terms: Terms = {}
    for (layer, number), pair in sorted(sides.items(), key=lambda item: item[0]):
        for side, other in (("A", "B"), ("B", "A")):
            if side not in pair:
                there, lost = (_name(layer, s, number) for s in (other, side))
                raise ModelError(f"fold tensor {there} has no partner; {lost} is missing")
        if pair["B"].shape[1] != pair["A"].shape[0]:
            raise ModelError(
                f"fold tensor {_name(layer, 'B', number)} is {tuple(pair['B'].shape)}, its partner "
                f"{tuple(pair['A'].shape)}; accepted are (m, R) and (R, n)"
            )
        terms.setdefault(layer, []).append((number, pair["B"], pair["A"]))
    return terms


@dataclass(frozen=True)
class Layer:
    """A LoRA layer: its module and its name within the backbone, and PEFT's two saved names."""

    module: Any
    inner: str
    name_a: str
    name_b: str

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weight (m, n)."""
        return self.module.get_base_layer().weight  # type: ignore[no-any-return]

    @property
    def scaling(self) -> float:
        """PEFT's factor on B @ A."""
        return float(self.module.scaling["default"])


class Folds:
    """What is folded into a model at present, and the weights as they were before.

    The pristine weights and the folds lie on the CPU, so that a move of the model to another
    device does not concern them. A layer's weight is copied when it is folded the first time.

    Parameters
    ----------
    model : peft.PeftModel
        Its frozen weights are the pristine ones.
    adapter : mapping of str to torch.nn.Parameter
        The adapter's tensors by PEFT's saved names.
    """

    def __init__(self, model: PeftModel, adapter: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._layers = _layers(model, adapter)
        self._pristine: dict[str, Tensor] = {}
        self._present: Terms = {}

    def check(self, folds: Mapping[str, Tensor]) -> Terms:
        """Pair folds and compare them with the layers; nothing is changed.

        Raises
        ------
        ModelError
            As :func:`pair_folds`; if a layer is not an adapted one, a shape does not fit its
            weight, or the weight also serves another layer, which the fold would change, too.
        """
        terms = pair_folds(folds)
        if not terms:
            return terms
        uses = Counter(id(p) for _, p in self._model.named_parameters(remove_duplicate=False))
        for name, pairs in terms.items():
            first = _name(name, "A", pairs[0][0])
            layer = self._layers.get(name)
            if layer is None:
                known = ", ".join(list(self._layers)[:3])
                raise ModelError(
                    f"fold tensor {first}: no LoRA layer is called {name}; accepted are the "
                    f"{len(self._layers)} adapted layers, such as {known}"
                )
            weight = layer.weight
            if uses[id(weight)] > 1:
                raise ModelError(f"fold tensor {first}: the layer shares its weight with another")
            m, n = weight.shape
            for number, b, a in pairs:
                if a.shape[1] != n or b.shape[0] != m:
                    side, bad = ("A", a) if a.shape[1] != n else ("B", b)
                    raise ModelError(
                        f"fold tensor {_name(name, side, number)} is {tuple(bad.shape)}; "
                        f"accepted are A (R, {n}) and B ({m}, R)"
                    )
        return terms

    def set(self, terms: Terms) -> None:
        """Make every layer's weight the pristine one plus these terms, whatever was set before.

        The sum runs in float32 by ascending number, on the weight's device. A layer whose terms
        are the present ones, bit for bit, is left alone.

        Parameters
        ----------
        terms : dict
            From :meth:`check`. Copies are kept.
        """
        for name in sorted(self._present.keys() | terms.keys()):
            old, new = self._present.get(name, []), _plain(terms.get(name, []))
            if _same(old, new):
                continue
            weight = self._layers[name].weight
            if name not in self._pristine:
                self._pristine[name] = weight.detach().to("cpu", copy=True)
            _write(weight, self._pristine[name], self._layers[name].scaling, new)
            if new:
                self._present[name] = [(i, b.clone(), a.clone()) for i, b, a in new]
            else:
                self._present.pop(name, None)

    def export(self, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Write the folds into an adapter, so that it stands for the whole change of W0.

        ``[B, B_1, ...] @ [A; A_1; ...]`` is the sum of the products. Where the rank R' would
        exceed min(m, n), a singular value decomposition in float64 brings it down without loss.

        Parameters
        ----------
        state : mapping of str to Tensor
            The adapter's tensors on the CPU.
        config : peft.LoraConfig
            The adapter's; gets the ranks of the layers with folds. It keeps ``alpha / R'`` at the
            layer's scaling.

        Returns
        -------
        dict of str to Tensor
            ``state`` with other factors at the layers that have folds.

        Raises
        ------
        ModelError
            If factors that must be compressed are not finite.
        """
        result = dict(state)
        for name, terms in self._present.items():
            layer = self._layers[name]
            a = torch.cat([state[layer.name_a], *(a for _, _, a in terms)])
            b = torch.cat([state[layer.name_b], *(b for _, b, _ in terms)], dim=1)
            if a.shape[0] > min(layer.weight.shape):
                b, a = _compress(name, b, a)
            result[layer.name_a], result[layer.name_b] = a, b
            # PEFT looks for .*\.(key)$; anchored and escaped it can mean no other layer.
            key, rank = f"^{re.escape(layer.inner)}", a.shape[0]
            alpha = layer.scaling * rank
            config.rank_pattern[key] = rank
            config.alpha_pattern[key] = int(alpha) if alpha.is_integer() else alpha
        return result


def _layers(model: PeftModel, adapter: Mapping[str, nn.Parameter]) -> dict[str, Layer]:
    from peft.tuners.lora import LoraLayer

    names = {id(parameter): name for name, parameter in adapter.items()}
    result = {}
    inner: nn.Module = model.get_base_model()
    for name, module in inner.named_modules():
        if isinstance(module, LoraLayer):
            saved = [names[id(f["default"].weight)] for f in (module.lora_A, module.lora_B)]
            result[saved[0].removesuffix(".lora_A.weight")] = Layer(module, name, *saved)
    return result


def _name(layer: str, side: str, number: int) -> str:
    return f"{layer}.fold_{side}.{number:06d}.weight"


def _plain(terms: list[Term]) -> list[Term]:
    def plain(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float32)

    return [(number, plain(b), plain(a)) for number, b, a in terms]


def _same(one: list[Term], two: list[Term]) -> bool:
    def equal(x: Tensor, y: Tensor) -> bool:
        # As bits: NaN equals itself and -0 is not 0.
        return torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))

    return [number for number, *_ in one] == [number for number, *_ in two] and all(
        equal(old_b, new_b) and equal(old_a, new_a)
        for (_, old_b, old_a), (_, new_b, new_a) in zip(one, two, strict=True)
    )


def _write(weight: nn.Parameter, pristine: Tensor, scaling: float, terms: list[Term]) -> None:
    value = pristine
    # Under autocast the products would be in half precision.
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        if terms:
            value = pristine.to(weight.device, torch.float32)
        for _, b, a in terms:
            value = value + scaling * (b.to(weight.device) @ a.to(weight.device))
        # Another tensor, not other values: other sessions of this process may share the old one.
        weight.data = value.to(weight.device, weight.dtype)


def _compress(name: str, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (m, k) and (k, n) with the product of b (m, R) and a (R, n), k its rank."""
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModelError(f"the factors of {name} are not finite, so they cannot be exported")
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    # What rounding made of zeros is left out; one column stays, as PEFT takes no rank 0.
    k = max(1, int((s > s[0] * max(b.shape[0], a.shape[1]) * torch.finfo(s.dtype).eps).sum()))
    root = s[:k].sqrt()
    left, right = q_b @ (u[:, :k] * root), (root[:, None] * vh[:k]) @ q_a.T
    return left.float().contiguous(), right.float().contiguous()
