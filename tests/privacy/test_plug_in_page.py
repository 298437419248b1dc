"""The private step of docs/plug-in.md, run as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from privacy import BudgetExhausted

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plug-in.md"


def test_the_pages_private_step_runs():
    code = PAGE.read_text(encoding="utf-8").split("## The private step")[1]
    code = code.split("```python\n")[1].split("```")[0]
    assert "from dp_lora.privacy import" in code  # as in the wheel; here the room itself
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 3, generator=generator), torch.randn(100, 2, generator=generator)
    model = nn.Linear(3, 2).requires_grad_(False)
    names = {
        "data": x,
        "model": model,
        "adapter": dict(model.named_parameters()),
        "active": ["weight", "bias"],
        "losses": lambda indices: (model(x[indices]) - y[indices]).square().sum(dim=1),
    }
    exec(code.replace("dp_lora.privacy", "privacy"), names)
    noised, gradient = names["noised"], names["gradient"]
    assert {name: tuple(value.shape) for name, value in noised.items()} == {
        "weight": (2, 3),
        "bias": (2,),
    }
    for _ in range(9):
        gradient.step(["weight"], kind="B")
    with pytest.raises(BudgetExhausted, match="all 10 steps"):
        gradient.step(["weight"], kind="B")
