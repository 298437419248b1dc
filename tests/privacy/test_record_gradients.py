"""Both forms of a record's gradient against float64, and C per record whatever cancels in it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import clip_and_sum, joint_norms, record_gradients
from privacy.record_gradients import Rows, Sides, of_bias, of_weight

FORMS = ("rows", "transposed rows", "sides")


def form_of(form: str, g: torch.Tensor, x: torch.Tensor) -> Rows | Sides:
    """Hold gradients in a form, whatever their shape would choose."""
    if form == "sides":
        return Sides(g, x)
    if form == "rows":
        return Rows(torch.bmm(g.transpose(1, 2), x))
    return Rows(torch.bmm(x.transpose(1, 2), g), transposed=True)


def exact(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ntp,ntq->npq", g.double(), x.double())


def magnitudes(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sum over positions of |g_t| |x_t|: what rounding is relative to, (n,)."""
    return (g.double().norm(dim=2) * x.double().norm(dim=2)).sum(dim=1)


def drawn(n: int, t: int, p: int, q: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, t, p, generator=generator), torch.randn(n, t, q, generator=generator)


def contribution(gradient: Rows | Sides, norm: float) -> float:
    """L2 norm, in float64, of what the only record adds to a sum."""
    return float(clip_and_sum({"w": gradient}, norm)["w"].double().norm())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 10**6),
)
def test_every_form_equals_float64(form, n, t, p, q, seed):
    g, x = drawn(n, t, p, q, seed)
    gradient, true, scale = form_of(form, g, x), exact(g, x), magnitudes(g, x)
    near = float(scale.max()) * 1e-6
    torch.testing.assert_close(gradient.rows().double(), true, rtol=0, atol=near)
    norms = gradient.squared_norms().double().sqrt()
    assert bool((norms >= true.flatten(1).norm(dim=1) - 1e-6 * scale).all())
    torch.testing.assert_close(norms, true.flatten(1).norm(dim=1), rtol=1e-6, atol=near)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    total = gradient.weighted_sum(weights)
    assert total.shape == (p, q) and total.dtype == torch.float32
    expected = torch.einsum("n,npq->pq", weights.double(), true)
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=n * near)
    kept = torch.arange(n) % 2 == 0
    expected = torch.einsum("n,npq->pq", (weights * kept).double(), true)
    got = gradient.weighted_sum(weights, kept).double()
    torch.testing.assert_close(got, expected, rtol=0, atol=n * near)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 30),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 10**6),
)
def test_the_form_is_chosen_by_shape_and_changes_no_sum(n, t, p, q, seed):
    g, x = drawn(n, t, p, q, seed)
    chosen = of_weight(g, x)
    assert isinstance(chosen, Sides) == (t * (p + q) <= p * q)
    assert chosen.rows().shape == (n, p, q)
    norm = float(joint_norms({"w": chosen}).min()) / 2
    got = clip_and_sum({"w": chosen}, norm)["w"]
    for form in FORMS:
        other = clip_and_sum({"w": form_of(form, g, x)}, norm)["w"]
        torch.testing.assert_close(got, other, rtol=1e-4, atol=norm * 1e-4)


@pytest.mark.parametrize(
    ("t", "p", "q", "kind"),
    [
        (197, 8, 192, Rows),  # LoRA's A: the matrix is smaller than its sides
        (197, 576, 8, Rows),  # and its B, kept transposed
        (1, 10, 192, Sides),  # a head on pooled features
        (7, 8, 768, Sides),
        (8, 8, 768, Rows),
        (1, 1, 5, Rows),
    ],
)
def test_the_cheaper_form(t, p, q, kind):
    g, x = drawn(2, t, p, q, 0)
    gradient = of_weight(g, x)
    assert type(gradient) is kind
    held = sum(v.numel() for v in vars(gradient).values() if isinstance(v, torch.Tensor))
    assert held == 2 * min(t * (p + q), p * q)


def test_transposed_rows_are_those_of_the_tensor():
    g, x = drawn(3, 20, 9, 2, 0)  # q < p: as of LoRA's B
    gradient = of_weight(g, x)
    assert isinstance(gradient, Rows)
    true = exact(g, x)
    torch.testing.assert_close(gradient.rows().double(), true, rtol=1e-5, atol=1e-5)
    total = gradient.weighted_sum(torch.tensor([1.0, 0.0, 2.0]))
    assert total.is_contiguous()
    torch.testing.assert_close(total.double(), true[0] + 2 * true[2], rtol=1e-5, atol=1e-4)


def test_a_bias_gets_the_sum_over_positions():
    g, _ = drawn(3, 5, 4, 1, 0)
    torch.testing.assert_close(of_bias(g).rows(), g.sum(dim=1))


def test_forms_are_clipped_jointly():
    """A head held as sides and a factor held as rows share one norm."""
    (g, x), (h, z) = drawn(4, 1, 6, 9, 0), drawn(4, 12, 5, 3, 1)
    held = {"head": of_weight(g, x), "factor": of_weight(h, z), "bias": of_bias(h)}
    true = {"head": exact(g, x), "factor": exact(h, z), "bias": h.double().sum(dim=1)}
    norms = sum(value.flatten(1).square().sum(dim=1) for value in true.values()).sqrt()
    torch.testing.assert_close(joint_norms(held).double(), norms, rtol=1e-6, atol=0)
    norm = float(norms.median())
    got = clip_and_sum(held, norm)
    weights = (norm / norms).clamp(max=1)
    for name, value in true.items():
        expected = torch.einsum("n,n...->...", weights, value)
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-5, atol=1e-5)


# --- the bound of C, whatever the record is ---------------------------------------------------


def cancelling(t: int, p: int, q: int, off: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One record of 2 t positions that cancel pairwise, but for a share ``off``, in any order."""
    generator = torch.Generator().manual_seed(seed)
    g, x = drawn(1, t, p, q, seed)
    order = torch.randperm(2 * t, generator=generator)
    g, x = torch.cat([g, -g * (1 + off)], dim=1)[:, order], torch.cat([x, x], dim=1)[:, order]
    return g * 1e4, x * 1e4


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 16),
    st.sampled_from([(1, 1), (3, 40), (40, 3), (48, 64)]),
    st.sampled_from([0.0, 1e-7, 1e-5, 1e-3]),
    st.floats(-9, -1),
    st.integers(0, 10**6),
)
def test_a_record_whose_positions_cancel_is_held_to_its_bound(form, t, shape, off, log_c, seed):
    g, x = cancelling(t, *shape, off, seed)
    norm = float(magnitudes(g, x)) * 10**log_c
    assert contribution(form_of(form, g, x), norm) <= norm * (1 + 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rounding_that_goes_one_way_is_held_to_the_bound(form):
    """A crafted record: between 2^24 and -2^24 small terms are lost one by one.

    Mistake: rounding taken to be as large for many positions as for few.  It grows with them.
    """
    for t, p, q in ((7, 8, 768), (16, 64, 64), (64, 256, 256), (200, 420, 420)):
        x = torch.ones(1, t, q)
        for small in (0.45, 0.9, 1.9):
            for norm in (0.25, 0.3, 0.37):
                for last in (t // 2, t - 1):
                    g = torch.full((1, t, p), small)
                    g[:, 0], g[:, last] = 2.0**24, -(2.0**24)
                    assert contribution(form_of(form, g, x), norm) <= norm * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(768, 768), (2000, 2000), (8, 3072), (3000,)])
def test_the_norm_of_a_large_matrix_of_equal_numbers_is_not_too_small(shape):
    """Mistake: one float32 sum over all of it, which drops its small addends (0.2 % at 2000^2)."""
    for value in (0.7, 117.8):
        rows = torch.full((2, *shape), value)
        for form in (Rows(rows), Rows(rows, transposed=True)):
            got = form.squared_norms().double().sqrt()
            torch.testing.assert_close(got, rows.double().flatten(1).norm(dim=1), rtol=5e-6, atol=0)
        assert contribution(Rows(rows[:1]), 0.3) <= 0.3 * (1 + 1e-5)


def test_without_its_rounding_the_norm_of_sides_would_be_too_small(monkeypatch):
    """The reason for what Sides adds: squares that cancel lose half of float64's digits."""

    def largest_contribution() -> float:
        """In units of C, over records that nearly cancel."""
        worst = 0.0
        for seed in range(40):
            for off in (3e-8, 6e-8, 1e-7):
                for positions in (2, 8):
                    g, x = cancelling(positions, 48, 64, off, seed)
                    norm = float(magnitudes(g, x)) * 1e-9
                    worst = max(worst, contribution(Sides(g, x), norm) / norm)
        return worst

    assert largest_contribution() <= 1 + 1e-6
    monkeypatch.setattr(record_gradients, "_ROUNDING", 0.0)
    assert largest_contribution() > 1 + 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_cancelling_record_moves_a_batch_by_at_most_c(form):
    """Its large terms must not wash out what the other records add, either."""
    others = drawn(30, 8, 20, 30, 1)
    worst = 0.0
    for place in (0, 15, 30):
        for off in (0.0, 1e-5):
            g, x = cancelling(4, 20, 30, off, place)
            batch = [
                torch.cat([o[:place], r, o[place:]]) for o, r in zip(others, (g, x), strict=True)
            ]
            whole = clip_and_sum({"w": form_of(form, *batch)}, 0.3)["w"].double()
            part = clip_and_sum({"w": form_of(form, *others)}, 0.3)["w"].double()
            worst = max(worst, float((whole - part).norm()))
    assert 0 < worst <= 0.3 * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMS), st.integers(-30, 15), st.integers(-30, 15), st.integers(0, 10**6))
def test_extreme_magnitudes_are_clipped_exactly(form, log_g, log_x, seed):
    g, x = drawn(1, 2, 5, 6, seed)
    g, x = g * 10.0**log_g, x * 10.0**log_x
    true = float(exact(g, x).norm())
    got = contribution(form_of(form, g, x), 1e-3)
    assert got <= 1e-3 * (1 + 1e-5)
    if 1e-15 < true < 1e15:  # neither the norm's square nor the products leave float32
        assert got == pytest.approx(min(true, 1e-3), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_sides_of_opposite_extremes(form):
    g, x = drawn(3, 2, 5, 6, 0)
    plain = clip_and_sum({"w": form_of(form, g, x)}, 1.0)["w"]
    got = clip_and_sum({"w": form_of(form, g * 1e-20, x * 1e20)}, 1.0)["w"]
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", ["grads", "inputs", "both"])
@pytest.mark.parametrize("form", FORMS)
def test_a_record_that_is_not_finite_contributes_exactly_zero(form, where, value):
    """3e38 is finite, and its products are not."""
    g, x = drawn(4, 3, 5, 6, 0)
    others = [0, 2, 3]
    clean = clip_and_sum({"w": form_of(form, g[others], x[others])}, 1.0)["w"]
    poisoned = [g.clone(), x.clone()]
    for index, name in enumerate(("grads", "inputs")):
        if where in (name, "both"):
            poisoned[index][1, 0, 0] = value
    got = clip_and_sum({"w": form_of(form, *poisoned)}, 1.0)["w"]
    torch.testing.assert_close(got, clean, rtol=1e-6, atol=1e-6)
    zeros = [t.clone() for t in poisoned]
    for t in zeros:
        t[[0, 2, 3]] = 0
    alone = clip_and_sum({"w": form_of(form, *zeros)}, 1.0)["w"]
    assert not alone.any()


def test_an_all_zero_record_adds_nothing_and_divides_by_nothing():
    for form in FORMS:
        g, x = drawn(2, 3, 5, 6, 0)
        g[0] = 0
        got = clip_and_sum({"w": form_of(form, g, x)}, 0.5)["w"]
        assert float(got.double().norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("width", [16_384, 262_144, 1_048_576])
def test_small_numbers_beside_a_large_one_count_in_a_wide_tensor(width):
    """Mistake: a float32 sum, to which each small square is too little to add."""
    row = torch.full((1, width), 2.2e-4)
    row[0, 0] = 1.0
    clipped = clip_and_sum({"w": Rows(row)}, 1e-3)["w"].double().norm()
    assert float(clipped) <= 1e-3 * (1 + 1e-6)
