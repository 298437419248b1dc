"""Two ways in which eval mode or a caller's precision would void the bound."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privacy import EngineError, HookEngine, clip_and_sum


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)
        self.requires_grad_(False)

    def forward(self, x):
        return self.layer(self.norm(x))


def test_batchnorm_without_running_statistics_is_refused_even_in_eval_mode():
    """It averages over the batch in eval mode too: one record moved the sum by 8 C."""
    model = Normed().eval()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    engine = HookEngine(model, {"weight": model.layer.weight})
    with pytest.raises(EngineError, match="norm is a BatchNorm1d"):
        engine.clipped_sum(["weight"], lambda: model(x).square().sum(dim=1), 5, 1.0)


def norm_of(sums) -> float:
    return sum(float(value.double().square().sum()) for value in sums.values()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_bound_holds_in_any_precision(dtype, autocast):
    """Under autocast, or with rows in half precision, one record gave up to 1.007 C."""
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for _ in range(100):
            rows = {"w": torch.randn((1, 5), generator=generator).to(dtype)}
            sums = clip_and_sum(rows, 1.0)
            assert sums["w"].dtype == torch.float32
            assert norm_of(sums) <= 1 + 1e-5
