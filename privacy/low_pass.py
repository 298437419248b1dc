"""The low-pass filter of LA-LoRA on noised factor gradients."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Fixed 5-tap binomial kernel (LA-LoRA, arXiv 2602.19926).
KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def binomial_low_pass(gradient: Tensor, factor: Literal["A", "B"]) -> Tensor:
    """Smooth one factor's gradient along its long axis (LA-LoRA, arXiv 2602.19926).

    Parameters
    ----------
    gradient : Tensor
        Noised gradient, (r, n) for factor A, (m, r) for factor B.
    factor : {"A", "B"}
        A is filtered along its input axis, row by row; B along its output axis, column by
        column.  Never across the rank.

    Returns
    -------
    Tensor
        Same shape: the convolution with ``[1, 4, 6, 4, 1] / 16`` under symmetric padding (the
        edge sample repeated).  White noise keeps 0.523 of its standard deviation inside.

    Notes
    -----
    Formal guarantee: post-processing of an already noised release; costs no privacy.
    """
    axis = 1 if factor == "A" else 0
    length = gradient.shape[axis]
    if length == 1:  # every tap meets the same sample
        return gradient.clone()
    edge = gradient.narrow(axis, 0, 2).flip(axis)
    end = gradient.narrow(axis, length - 2, 2).flip(axis)
    padded = torch.cat([edge, gradient, end], dim=axis)
    result = torch.zeros_like(gradient)
    for offset, weight in enumerate(KERNEL):
        result.add_(padded.narrow(axis, offset, length), alpha=weight)
    return result
