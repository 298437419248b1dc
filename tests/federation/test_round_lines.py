"""One round in one line."""

from __future__ import annotations

import pytest

from federation.round_lines import human_bytes, human_epsilon, round_line

ROW = {
    "round": 4,
    "accuracy": 0.8772,
    "epsilon": 3.14159,
    "bytes_up": 1_234_567,
    "bytes_down": 0,
    "clients": 3,
    "failures": 2,
    "seconds": 40.0,
    "round_seconds": 10.0,
}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (14_244, "14.2 kB"),
        (1_234_567, "1.2 MB"),
        (5.5e9, "5.5 GB"),
        (7e12, "7000.0 GB"),
    ],
)
def test_bytes(count, text):
    assert human_bytes(count) == text


def test_epsilon():
    assert human_epsilon(3.14159) == "3.14"
    assert human_epsilon(0.0) == "0.00"
    assert human_epsilon(None) == "none (NOT PRIVATE)"


def test_a_round_in_the_middle():
    assert round_line(ROW, 20) == (
        "round  4/20  accuracy  87.7%  epsilon 3.14  up 1.2 MB  down 0 B  clients 3/5  160 s left"
    )


def test_the_first_round_foretells_nothing():
    assert round_line({**ROW, "round": 1}, 20).endswith("clients 3/5")


def test_the_last_round_says_how_long_it_took():
    line = round_line({**ROW, "round": 20}, 20)
    assert line.startswith("round 20/20") and line.endswith("clients 3/5  40 s")


def test_the_start_names_no_clients_and_divides_by_nothing():
    line = round_line({**ROW, "round": 0, "seconds": 0.0, "epsilon": 0.0}, 20)
    assert line == "round  0/20  accuracy  87.7%  epsilon 0.00  up 1.2 MB  down 0 B"


def test_a_run_without_privacy_says_so_in_every_line():
    assert "NOT PRIVATE" in round_line({**ROW, "epsilon": None}, 20)


def test_a_round_without_evaluation_keeps_its_place():
    line = round_line({**ROW, "accuracy": None}, 20)
    assert line.startswith("round  4/20  accuracy      -  epsilon 3.14")
    assert len(line) == len(round_line(ROW, 20))
