"""Layers that see a record at many positions: what is summed, and in which precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privacy import HookEngine, clipped_sum_by_autograd, per_record_gradients_by_autograd

RECORDS, POSITIONS = 3, 5


class Sequence(nn.Module):
    """A layer with a bias that sees every position of a sequence, as a token classifier does."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3)
            self.x = torch.randn(RECORDS, POSITIONS, 4)
            self.y = torch.randn(RECORDS, POSITIONS, 3)
        self.requires_grad_(False).to(dtype)
        self.x, self.y = self.x.to(dtype), self.y.to(dtype)
        self.adapter = dict(self.named_parameters())

    def losses(self, rows: slice = slice(None)) -> torch.Tensor:
        return (self.layer(self.x[rows]) - self.y[rows]).square().sum(dim=(1, 2))

    def rows_by_autograd(self) -> dict[str, torch.Tensor]:
        return per_record_gradients_by_autograd(
            self.adapter, lambda j: self.losses(slice(j, j + 1)), RECORDS
        )


def test_a_bias_gets_the_sum_over_positions_not_their_mean():
    """Mistake: the mean, which also makes the joint norm too small by the number of positions."""
    model = Sequence()
    engine = HookEngine(model, model.adapter)
    got = engine.per_record_gradients(list(model.adapter), model.losses, RECORDS)
    expected = model.rows_by_autograd()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)
    clipped = engine.clipped_sum(list(model.adapter), model.losses, RECORDS, 0.1)
    reference = clipped_sum_by_autograd(
        model.adapter, lambda j: model.losses(slice(j, j + 1)), RECORDS, 0.1
    )
    for name, value in reference.items():
        torch.testing.assert_close(clipped[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_model_in_half_precision_are_float32(dtype):
    """In half precision norms would be off by 0.4 %, and the bound of C with them."""
    model = Sequence(dtype)
    engine = HookEngine(model, model.adapter)
    rows = engine.per_record_gradients(list(model.adapter), model.losses, RECORDS)
    assert {row.dtype for row in rows.values()} == {torch.float32}
    sums = engine.clipped_sum(list(model.adapter), model.losses, RECORDS, 1e-3)
    assert {value.dtype for value in sums.values()} == {torch.float32}
    one = {name: row[:1] for name, row in rows.items()}
    norm = sum(float(row.double().square().sum()) for row in one.values()) ** 0.5
    weight_and_bias = {name: row.double()[0] * (1e-3 / norm) for name, row in one.items()}
    alone = engine.clipped_sum(list(model.adapter), lambda: model.losses(slice(0, 1)), 1, 1e-3)
    for name, value in weight_and_bias.items():
        torch.testing.assert_close(alone[name].double(), value, rtol=2e-2, atol=1e-8)
    moved = sum(float(value.double().square().sum()) for value in alone.values()) ** 0.5
    assert moved <= 1e-3 * (1 + 1e-5)
