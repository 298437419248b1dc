"""Evaluation at the clients: noised counts, paid for by the same target."""

from __future__ import annotations

from federation.messages import METRICS_KEY, NOISED_ACCURACY_KEY
from privacy import Ledger

NOISE = 5.0
ASKED = {"privacy__evaluation_noise_multiplier": NOISE, "strategy__weighting": "uniform"}


def test_a_run_reports_what_its_clients_see_and_stays_within_its_target(federate):
    folder, grid = federate(**ASKED)
    rows = list(folder.read_metrics())
    assert "noised_accuracy" not in rows[0]
    assert all(-1 <= row["noised_accuracy"] <= 2 for row in rows[1:])
    assert 7.9 < folder.read_result()["epsilon"] <= 8.0
    for client in range(3):
        name = f"client-{client}"
        book = Ledger(folder.ledgers / name, folder.ledgers / "heads" / f"{name}.json").book()
        (plan,) = book.plans.values()
        assert (plan.steps, plan.evaluations) == (4, 2)
        assert plan.evaluation_noise_multiplier == NOISE
    stated = [r.content[METRICS_KEY][NOISED_ACCURACY_KEY] for r in grid.received]
    assert len(set(stated)) == len(stated) == 6


def test_without_it_nothing_is_evaluated_or_stated(federate):
    folder, grid = federate()
    assert all("noised_accuracy" not in row for row in folder.read_metrics())
    assert all(NOISED_ACCURACY_KEY not in reply.content[METRICS_KEY] for reply in grid.received)
