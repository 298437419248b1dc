"""Adapter dropout under privacy: masks that an adversary knows couple the records of a batch."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import nn

from client_app import private_round
from client_app.private_round import own_random_state
from client_app.round_handler import handle_train
from privacy import HookEngine

DROPOUT = {"lora__lora_dropout": 0.5}


def seeds_of(site, monkeypatch, **changes) -> list[int]:
    """Torch's seed inside the round, for the same message twice."""
    seen: list[int] = []
    train_round = private_round.train_round

    def watch(*args):
        seen.append(torch.initial_seed())
        return train_round(*args)

    monkeypatch.setattr(private_round, "train_round", watch)
    for _ in range(2):
        assert handle_train(site.message(), site.context(0, **DROPOUT, **changes)).has_content()
    return seen


def test_masks_of_a_private_round_come_from_no_public_seed(site, monkeypatch):
    """A record's mask depends on its place in the batch, so on who else was drawn.

    With masks that are independent and secret, that is a mixture over masks and the bound of C
    holds for each of them.  With masks from a public seed one record's absence hands every later
    record another mask, and the sum moves by up to 2 C for each.
    """
    first, second = seeds_of(site, monkeypatch)
    assert first != second


def test_masks_of_a_test_run_are_reproducible(site, monkeypatch):
    first, second = seeds_of(site, monkeypatch, privacy__insecure_test_seed=3)
    assert first == second


class Dropped(nn.Module):
    """LoRA factors behind dropout, as PEFT has them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 4, bias=False)
            self.x = 20 * torch.randn(30, 8)
        self.dropout = nn.Dropout(0.5)
        self.requires_grad_(False).train()

    def total(self, rows: list[int], state: contextlib.AbstractContextManager) -> torch.Tensor:
        engine = HookEngine(self, {"b": self.b.weight})

        def losses() -> torch.Tensor:
            return self.b(self.a(self.dropout(self.x[rows]))).square().sum(dim=1)

        with state:
            return engine.clipped_sum(["b"], losses, len(rows), 1.0)["b"]


def test_why_known_masks_break_the_bound(site):
    """The first record leaves, all others keep their values, and the sum moves by over 2 C."""
    model, everybody = Dropped(), list(range(30))
    known = site.settings(privacy__insecure_test_seed=0)
    whole, fewer = (
        model.total(rows, own_random_state(known, site.context(), 1))
        for rows in (everybody, everybody[1:])
    )
    assert math.sqrt(float((whole - fewer).square().sum())) > 2.0
