"""Error codes: fixed, unique, and none of Flower's own."""

from __future__ import annotations

import pytest
from flwr.common.constant import ErrorCode

import strategies
from federation import messages
from federation.messages import ClientFailure


@pytest.mark.parametrize("failure", list(ClientFailure), ids=lambda failure: failure.name)
def test_each_failure_has_a_text_that_depends_on_the_code_alone(failure):
    error = failure.to_error()
    assert error.code == int(failure) and type(error.code) is int
    assert isinstance(error.reason, str) and len(error.reason) > 10
    assert not any(digit in error.reason for digit in "0123456789{}%")
    assert (error.code, error.reason) == (failure.to_error().code, failure.to_error().reason)


def test_codes_and_texts_are_unique_and_not_flowers():
    flowers = {value for name, value in vars(ErrorCode).items() if name.isupper()}
    assert len(flowers) > 5
    codes = [int(failure) for failure in ClientFailure.__members__.values()]
    assert len(set(codes)) == len(codes)
    assert not set(codes) & flowers
    assert len({failure.to_error().reason for failure in ClientFailure}) == len(codes)


def test_keys_do_not_collide():
    rooms = {**vars(messages), **vars(strategies)}
    keys = {n: value for n, value in rooms.items() if n.endswith("_KEY")}
    assert len(keys) >= 5 and len(set(keys.values())) == len(keys)
