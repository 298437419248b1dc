"""A client's noised evaluation: the right count, the stated noise, charged with the round."""

from __future__ import annotations

import numpy as np

from client_app.round_handler import handle_train
from federation.messages import METRICS_KEY, NOISED_ACCURACY_KEY, ClientFailure
from task.data import load_client_records
from task.metrics import evaluate
from tests.client_app.replies import RECORDS, failure_of, ledger_of, same

NOISE = 5.0
ASKED = {"privacy__evaluation_noise_multiplier": NOISE, "strategy__weighting": "uniform"}


def stated(site, context, **plan) -> float:
    reply = handle_train(site.message(**plan), context)
    assert list(reply.content[METRICS_KEY]) == [NOISED_ACCURACY_KEY]
    return reply.content[METRICS_KEY][NOISED_ACCURACY_KEY]


def test_the_count_is_right_and_its_noise_has_the_stated_scale(site):
    """40 fresh clients on the same records; chi-square, false alarm 1e-3, secure noise."""
    settings = site.settings(**ASKED)
    context = site.context(**ASKED)
    records = load_client_records(
        settings.data, site.server_model.encoder, context.node_config, seed=settings.seed
    )
    truth = evaluate(site.server_model, records)["accuracy"] * RECORDS
    counts = [stated(site, site.context(**ASKED)) * RECORDS for _ in range(40)]
    residual = (np.array(counts) - truth) / NOISE
    assert 16.9 < float(residual @ residual) < 76.1


def test_an_evaluation_is_charged_with_each_round_and_never_more_often_than_planned(site):
    context = site.context(**ASKED)
    for server_round in (1, 2):
        stated(site, context, server_round=server_round, local_steps=1, mode="B")
    (plan,) = ledger_of(context).book().plans.values()
    assert (plan.steps, plan.evaluations, plan.most_evaluations) == (2, 2, 2)
    # Steps are left, evaluations are not.
    reply = handle_train(site.message(server_round=3, local_steps=1, mode="B"), context)
    assert failure_of(reply) is ClientFailure.BUDGET_EXHAUSTED


def test_a_repeated_round_tells_the_same_count_again(site):
    """A second draw of the noise would halve it."""
    context = site.context(**ASKED)
    first = handle_train(site.message(), context)
    again = handle_train(site.message(), context)
    assert same(first, again)
    assert first.content[METRICS_KEY] == again.content[METRICS_KEY]


def test_the_steps_get_more_noise_for_it(site):
    uniform = {"strategy__weighting": "uniform"}
    noise = [
        handle_train(site.message(), site.context(**asked)).content["privacy"]["noise-multiplier"]
        for asked in (uniform, ASKED)
    ]
    assert noise[1] > noise[0]
