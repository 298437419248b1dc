"""The attacks: their bounds by closed form, their algebra, and small arms against a real client."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from benchmarks import attack_site, attacks
from benchmarks.attack_bounds import (
    TradeOff,
    area_under_curve,
    clopper_pearson,
    operate,
    trade_off,
)
from benchmarks.attack_inversion import (
    Inversion,
    chance_cosine,
    identify,
    layer_inputs,
    leading_direction,
)
from benchmarks.attack_membership import Evidence, Game, play, read_adapter, rows_of, summary
from benchmarks.attack_pixels import (
    PixelSearch,
    Search,
    differentiable_encoder,
    global_ssim,
    quality,
)
from benchmarks.attack_site import LEVELS, TRAINED, Server, ask_site, site_context
from benchmarks.attack_table import draw_figure, table
from client_app.session import forget
from privacy import HookEngine, PrivacyPlan, pld_epsilon, privatize
from privacy.randomness import SeededTestSource

SMALL = attacks.Size(
    trained=("B", "A", "B and head"),
    levels=("none", "epsilon 8"),
    worlds=20,
    open_worlds=20,
    rounds=2,
    candidates=12,
    trials=1,
    pixel_records=1,
    search=Search(starts=2, first_steps=3, kept=1, last_steps=3),
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory):
    """A small scene on disk; needs the embedded backbone, as the demo does."""
    folder = tmp_path_factory.mktemp("scene")
    attacks._be_a_worker()
    attacks.set_scene(folder, SMALL, seed=1)
    yield folder
    forget()


# The bound


@pytest.mark.parametrize(("noise", "steps"), [(0.6, 1), (2.0, 4)])
def test_without_subsampling_the_bound_is_the_gaussian_trade_off(noise, steps):
    """Dong et al. (2022): T Gaussian releases have power Phi(Phi^-1(a) + sqrt(T) / sigma)."""
    curve = trade_off(sample_rate=1.0, noise_multiplier=noise, steps=steps)
    shift = np.sqrt(steps) / noise
    for fpr in (1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9):
        exact = norm.cdf(norm.ppf(fpr) + shift)
        assert exact - 1e-9 <= curve.power(fpr) <= exact + 2e-3
    assert curve.auc() == pytest.approx(norm.cdf(shift / np.sqrt(2)), abs=2e-3)


def test_one_subsampled_step_is_bounded_by_its_mixture():
    """Telling N(0, s^2) from (1 - q) N(0, s^2) + q N(1, s^2): the exact power is in closed form."""
    rate, noise = 0.2, 0.7
    curve = trade_off(sample_rate=rate, noise_multiplier=noise, steps=1)
    for fpr in (1e-3, 0.01, 0.1, 0.3):
        threshold = norm.isf(fpr) * noise
        exact = (1 - rate) * fpr + rate * norm.sf(threshold, loc=1, scale=noise)
        # Above, since both directions share the larger delta; not by much where the power is.
        assert exact - 1e-9 <= curve.power(fpr) <= exact + 0.02


def test_the_bounds_pairs_are_those_of_the_accountant():
    numbers = {"sample_rate": 0.2, "noise_multiplier": 0.9, "steps": 2}
    curve = trade_off(**numbers)
    index = 300
    epsilon = pld_epsilon(**numbers, delta=float(curve.deltas[index]))
    assert 0 < curve.deltas[index] < 0.01
    assert epsilon == pytest.approx(curve.epsilons[index], abs=1e-3)


def test_one_pair_gives_the_known_corner_points():
    curve = TradeOff(np.array([np.log(3)]), np.array([0.01]))
    assert curve.power(0.0) == pytest.approx(0.01)
    assert curve.power(0.1) == pytest.approx(0.31)
    assert curve.power(0.9) == pytest.approx(1 - (1 - 0.01 - 0.9) / 3)
    with pytest.raises(ValueError, match="fpr must be from 0 to 1, got 2"):
        curve.power(2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.sampled_from([0.025, 0.001]))
def test_the_interval_is_that_of_the_binomial_tails(hits, error):
    low, high = clopper_pearson(hits, 40, error)
    assert low <= hits / 40 <= high
    if hits:
        assert binom.sf(hits - 1, 40, low) == pytest.approx(error)
    if hits < 40:
        assert binom.cdf(hits, 40, high) == pytest.approx(error)


def test_rates_at_a_chosen_threshold_are_covered():
    """1000 tests of N(0, 1) against N(1, 1); each side misses with probability 5 % at most.

    False alarm: binomial(1000, 0.05) above 80 has probability 2e-5, twice.
    """
    draw = np.random.default_rng(0)
    misses = np.zeros(2)
    for _ in range(1000):
        outside, inside = draw.normal(size=60), draw.normal(1.0, size=60)
        found = operate(inside, outside, 0.1, 0.05)
        true = norm.sf(np.sort(outside)[-6])
        misses += (true > found.fpr_high, norm.sf(norm.isf(true) - 1) < found.tpr_low)
        assert found.resolved == 6 / 61
    assert (misses <= 80).all() and misses[0] >= 20


def test_the_area_is_that_of_the_curve():
    inside, outside = np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0])
    assert area_under_curve(inside, outside)[0] == pytest.approx((1 + 1.5 + 1.5) / 6)
    draw = np.random.default_rng(1)
    area, deviation = area_under_curve(draw.normal(1, 1, 2000), draw.normal(0, 1, 2000))
    assert abs(area - norm.cdf(1 / np.sqrt(2))) < 4 * deviation  # false alarm 6e-5
    assert 0.003 < deviation < 0.012


# The score


def simulated_scores(score, worlds=6000, rate=1.0, others=3, std=0.8):
    """Scores of sums ``z g + others + noise`` for worlds with and without the target."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(others + 1, 12))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    evidence = Evidence(rows[:1], rows[1:], rate, std)
    noise = std * draw.normal(size=(worlds, 12))
    batches = (draw.random((worlds, others)) < rate) @ rows[1:] if others else 0.0
    drawn = (draw.random(worlds) < rate) * (np.arange(worlds) % 2)
    sums = noise + batches + drawn[:, None] * rows[0]
    values = np.array([score(evidence, rows, total) for total in sums])
    return values[1::2], values[::2]


def test_the_score_reaches_the_likelihood_ratios_power_and_others_do_not():
    """3000 worlds a side: Neyman and Pearson's ROC is Phi(Phi^-1(a) + |g| / s); 4 sigma bands."""
    inside, outside = simulated_scores(lambda e, rows, total: e.along(total, 0))
    area, deviation = area_under_curve(inside, outside)
    best = norm.cdf(1 / 0.8 / np.sqrt(2))
    assert abs(area - best) < 4 * deviation
    for fpr in (0.1, 0.01):
        found = operate(inside, outside, fpr, 3e-5)
        assert found.tpr_low <= norm.cdf(norm.ppf(found.fpr_high) + 1 / 0.8)
        assert found.tpr_high >= norm.cdf(norm.ppf(fpr / 2) + 1 / 0.8)
    ratio = simulated_scores(lambda e, rows, total: e.log_ratio(total, 0))
    assert area_under_curve(*ratio)[0] == pytest.approx(area, abs=1e-9)  # the same order
    # Any other direction tells less.
    worse = simulated_scores(lambda e, rows, total: total @ (rows[0] + 0.7 * rows[1]))
    assert area_under_curve(*worse)[0] < area - 4 * deviation


def test_knowing_the_other_records_helps_where_batches_are_drawn():
    numbers = {"rate": 0.5, "others": 8, "std": 0.2}
    alone = simulated_scores(lambda e, rows, total: e.along(total, 0), **numbers)
    knowing = simulated_scores(lambda e, rows, total: e.log_ratio(total, 0), **numbers)
    first, second = area_under_curve(*alone), area_under_curve(*knowing)
    assert second[0] > first[0] + 4 * max(first[1], second[1])


def test_the_log_ratio_is_that_of_gaussian_densities():
    from scipy.stats import multivariate_normal

    draw = np.random.default_rng(3)
    target, others, total = draw.normal(size=5), draw.normal(size=(3, 5)), draw.normal(size=5)
    rate, std = 0.3, 0.6
    covariance = std**2 * np.eye(5) + rate * (1 - rate) * others.T @ others
    mean = rate * others.sum(axis=0)
    without = multivariate_normal(mean, covariance).pdf(total)
    drawn = multivariate_normal(mean + target, covariance).pdf(total)
    evidence = Evidence(target[None], others, rate, std)
    expected = np.log((1 - rate) + rate * drawn / without)
    assert evidence.log_ratio(total, 0) == pytest.approx(expected)


@pytest.mark.parametrize(("noise", "holds"), [(1.0, True), (0.5, False)])
def test_half_the_noise_is_above_the_bound(noise, holds):
    """The check can fail: 4000 worlds a side of a mechanism with half the noise it states."""
    draw = np.random.default_rng(4)
    bound = trade_off(sample_rate=1.0, noise_multiplier=1.0, steps=1)
    row = summary(draw.normal(1, noise, 4000), draw.normal(0, noise, 4000), bound, 1e-5)
    assert all(point["ok"] for point in row["points"]) == holds
    rows = [{"attack": "membership", "trained": "B", "level": "epsilon 8", **row}]
    assert all(promise["ok"] for promise in attacks.judge(rows).values()) == holds


# Inversion


def step_on(kind, num_positions, noise_multiplier, seed=0):
    """The released gradient of one factor of a LoRA layer, and the layer's inputs (1, T, q)."""
    torch.manual_seed(seed)
    down, up = torch.nn.Linear(24, 4, bias=False), torch.nn.Linear(4, 20, bias=False)
    model = torch.nn.Sequential(down, up).requires_grad_(False)
    adapter = {"lora_A.weight": down.weight, "lora_B.weight": up.weight}
    inputs, goal = torch.randn(1, num_positions, 24), torch.randn(20)
    name = f"lora_{kind}.weight"
    clip = 0.1 if noise_multiplier else float("inf")
    sums = HookEngine(model, adapter).clipped_sum(
        [name], lambda: ((model(inputs) - goal) ** 2).sum(dim=(1, 2)), 1, clip
    )
    plan = PrivacyPlan(
        sample_rate=1.0,
        expected_batch_size=1.0,
        max_grad_norm=clip,
        noise_multiplier=noise_multiplier,
        steps=1,
        target_delta=1e-5,
    )
    released = privatize(sums, plan, kind, SeededTestSource([seed]))[name].double().numpy()
    shown = inputs[0] @ down.weight.T if kind == "B" else inputs[0]
    return released, shown.double().numpy()


@pytest.mark.parametrize("kind", ["A", "B"])
def test_one_position_is_read_off_a_step_and_noise_hides_it(kind):
    """What each factor shows: x from A, A x from B; epsilon 1 in one step needs sigma 3.7."""
    clear, noised = [], []
    for seed in range(20):
        for noise, kept in ((0.0, clear), (3.7, noised)):
            released, shown = step_on(kind, 1, noise, seed)
            direction = leading_direction(released)
            kept.append(abs(direction @ shown[0]) / np.linalg.norm(shown[0]))
    assert min(clear) > 0.999
    # By chance 0.14 in 24 dimensions and 0.40 in 4; the standard error of a median is below 0.1.
    assert np.median(noised) < chance_cosine(24 if kind == "A" else 4) + 0.3 < 0.75


def test_a_step_on_a_stays_in_the_span_of_several_positions():
    released, inputs = step_on("A", 3, 0.0)
    basis = np.linalg.qr(inputs.T)[0]
    direction = leading_direction(released)
    assert np.linalg.norm(direction @ basis) == pytest.approx(1, abs=1e-6)
    likeness = np.abs(inputs @ direction) / np.linalg.norm(inputs, axis=1)
    assert likeness.max() < 0.99


def test_what_chance_gives():
    draw = np.random.default_rng(5)
    rows = draw.normal(size=(20_000, 10))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert chance_cosine(10) == pytest.approx(np.median(np.abs(rows[:, 0])), abs=0.01)
    lengths = np.linalg.norm(rows[:, :3], axis=1)
    assert chance_cosine(10, 3) == pytest.approx(np.median(lengths), abs=0.01)


def test_quality_knows_a_perfect_and_a_blank_image():
    draw = np.random.default_rng(6)
    candidates = draw.random((5, 8, 8))
    perfect = quality(candidates[:2], candidates, range(2))
    assert (perfect["nearest"], perfect["psnr"][1]) == (2, pytest.approx(60))
    assert perfect["ssim"] == pytest.approx([1, 1, 1])
    assert global_ssim(candidates[0], np.full((8, 8), candidates[0].mean())) < 0.1
    noise = quality(candidates[:1] * 0 + 0.5, candidates, range(1))
    assert noise["psnr"][1] == pytest.approx(-10 * np.log10(((candidates[0] - 0.5) ** 2).mean()))


# Against the production client


@pytest.mark.slow
def test_the_server_computes_what_the_site_sends(scene):
    """Without privacy and at rate 1 the update is the record's own gradient."""
    for trained in TRAINED:
        arm = Inversion(str(scene), trained, "none", 1.0)
        server = Server(arm.config)
        adapter = read_adapter(str(scene), 1)
        records = attack_site.read_records(scene / "candidates.npz")
        batch = server.batch(*records)
        own = server.gradients(adapter, TRAINED[trained], batch)[3]
        context = site_context(arm.config, scene / "one-3.npz")
        plan = attack_site.round_plan(TRAINED[trained], 1)
        update = ask_site(context, plan, adapter, server.model.fingerprint)
        total = attack_site.released_sum(server, TRAINED[trained], update, 1.0)
        assert np.linalg.norm(total - own) < 1e-4 * np.linalg.norm(own)
        search = PixelSearch(server, trained)
        pixels = torch.from_numpy(records[0][3:4].astype(np.float32) / 255)
        found = search.gradients(pixels, torch.from_numpy(records[1][3:4]))
        flat = np.concatenate([part.reshape(-1).double().numpy() for part in found])
        # The attacker's encoder differs by the rounding to grey levels.
        assert np.linalg.norm(flat - own) < 0.1 * np.linalg.norm(own)
    images = torch.from_numpy(records[0].astype(np.float32) / 255)
    encoded = differentiable_encoder(server.model.encoder)(images)
    assert (encoded - batch["pixel_values"]).abs().max() < 0.01


@pytest.mark.slow
def test_a_site_that_fails_ends_the_attack(scene):
    config = attack_site.run_config(8.0, rounds=1, sample_rate=1.0, max_grad_norm=1.0)
    server = Server(config)
    context = site_context(config, scene / "no-such-file.npz")
    plan = attack_site.round_plan(TRAINED["B"], 1)
    with pytest.raises(RuntimeError, match="the attacked site does not answer"):
        ask_site(context, plan, server.start(), server.model.fingerprint)


@pytest.mark.slow
def test_a_weaker_claim_than_the_noise_gives_is_found_out(scene, monkeypatch):
    """Updates at epsilon 8, judged as if they were at epsilon 0.2: above the bound."""
    arm = Inversion(str(scene), "B", "epsilon 8", attacks.MAX_GRAD_NORM)
    honest = identify(arm, 8, 1e-3)
    assert honest["ok"] and honest["rate"] > 0.2
    strong = trade_off(sample_rate=1.0, noise_multiplier=18.0, steps=1)
    monkeypatch.setattr("benchmarks.attack_inversion.trade_off", lambda **_: strong)
    claimed = identify(arm, 8, 1e-3)
    assert not claimed["ok"]
    assert not all(promise["ok"] for promise in attacks.judge([claimed]).values())


@pytest.mark.slow
def test_without_privacy_the_target_is_found_whenever_it_is_drawn(scene):
    """60 worlds of 2 rounds: drawn with probability 0.36; binomial(30, 0.36) < 3 has 0.01 %."""
    numbers = {"sample_rate": attacks.SAMPLE_RATE, "max_grad_norm": attacks.MAX_GRAD_NORM}
    game = Game(str(scene), "A", "none", 2, 10, **numbers)
    rows = rows_of(game, play(game, 60), 1e-3)
    knowing = next(r for r in rows if r["rounds"] == 2 and r["attacker"] == "knows all records")
    assert knowing["worlds"] == [30, 30]
    assert knowing["points"][0]["tpr"] >= 3 / 30
    assert knowing["auc_bound"] == 1.0
    assert not [row for row in attacks.judge(rows) if "bound" in row]


@pytest.mark.slow
def test_layer_inputs_come_out_exactly_and_only_without_privacy(scene):
    backbone = str(scene / "class-token-vit")
    for trained, shown in (("A", {"x"}), ("B and head", {"A x", "features"})):
        clear = layer_inputs(Inversion(str(scene), trained, "none", 0.01, backbone))
        assert {row["shows"] for row in clear} == shown
        assert all(row["cosine"][0] > 0.999 and row["identified"] == 1 for row in clear)
    (noised,) = layer_inputs(Inversion(str(scene), "A", "epsilon 1", 0.01, backbone))
    assert noised["cosine"][1] < 0.4 and noised["identified"] < 0.6


@pytest.mark.slow
def test_a_small_run_of_the_whole_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(attacks, "QUICK", SMALL)
    figure = tmp_path / "images" / "attacks.png"
    status = attacks.main(["--quick", "--json", "--jobs", "1", "--figure", str(figure)])
    result = json.loads(capsys.readouterr().out)
    failed = [name for name, promise in result["bars"].items() if not promise["ok"]]
    assert status == bool(failed)
    # Twelve candidates and twenty worlds are few: what must hold are the guarantees.
    assert not [name for name in failed if "bound" in name]
    attacks_seen = {row["attack"] for row in result["rows"]}
    assert attacks_seen == {"membership", "identification", "layer input", "pixels"}
    assert {row["level"] for row in result["rows"]} >= {"none", "epsilon 8"} <= set(LEVELS)
    assert figure.stat().st_size < 100_000
    text = table(result["rows"], result["bars"])
    assert "| B | epsilon 8 | 2 | knows all records | 10 + 10 |" in text
    draw_figure(result["rows"], Path(tmp_path / "again.png"))
    assert (tmp_path / "again.png").read_bytes() == figure.read_bytes()


def test_a_number_of_jobs_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        attacks.main(["--jobs", "0"])
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err
