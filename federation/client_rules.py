"""What other rooms' settings must be where only noised sums over clients are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from privacy.client_settings import SECURE_MODES, SUM_MODES
from strategies.settings import PRODUCT_METHODS

if TYPE_CHECKING:
    from .settings import Settings

_NEUTRAL = {"weighting": "uniform", "trim": 0.0, "fraction_train": 1.0}
_WHY = {
    "weighting": "all clients weigh the same",
    "trim": "only the sum of all updates is used",
    "fraction_train": "privacy.client-sample-rate says who is asked",
}


def check_sum_mode(settings: Settings) -> None:
    """Refuse settings that look at single clients, or weigh them differently.

    Raises
    ------
    ValueError
        Naming the key, what it got and what it takes.
    """
    mode, strategy = settings.privacy.mode, settings.strategy
    if mode not in SUM_MODES:
        return
    for name, accepted in _NEUTRAL.items():
        if (value := getattr(strategy, name)) != accepted:
            raise ValueError(
                f"strategy.{name.replace('_', '-')} must be {accepted!r} with privacy.mode = "
                f"{mode!r}, got {value!r}: {_WHY[name]}"
            )
    if strategy.method in PRODUCT_METHODS:
        raise ValueError(
            f"strategy.method = {strategy.method!r} needs each client's own factors, of which "
            f"privacy.mode = {mode!r} uses the noised sum only: accepted are methods that average "
            "the factors (dp-lora, ffa-lora, ro-lora, la-lora, as-lora, fed-svd)"
        )
    if strategy.score not in ("auto", "debiased"):
        raise ValueError(
            f"strategy.score = {strategy.score!r} looks at single updates: accepted with "
            f"privacy.mode = {mode!r} are 'auto' and 'debiased'"
        )
    if strategy.low_pass == "on":
        raise ValueError(
            "strategy.low-pass = 'on' filters noised gradients, and with privacy.mode = "
            f"{mode!r} gradients have no noise: accepted are 'auto' and 'off'"
        )
    if mode in SECURE_MODES and settings.wire.dtype != "float32":
        raise ValueError(
            f"wire.dtype must be 'float32' with privacy.mode = {mode!r}, got "
            f"{settings.wire.dtype!r}: masked values are whole numbers of 32 bits"
        )
    if mode == "record-distributed":
        if strategy.local_steps != 1:
            raise ValueError(
                f"strategy.local-steps must be 1 with privacy.mode = {mode!r}, got "
                f"{strategy.local_steps}: a share of the noise does not protect a second step"
            )
        if strategy.optimizer != "sgd":
            raise ValueError(
                f"strategy.optimizer must be 'sgd' with privacy.mode = {mode!r}, got "
                f"{strategy.optimizer!r}: the server steps by the noised mean gradient"
            )
