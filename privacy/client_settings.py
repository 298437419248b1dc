"""Which ``privacy.*`` keys belong to modes in which only sums over clients are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .settings import PrivacySettings

CLIENT_MODES = ("client", "client-distributed")
"""Modes whose unit is a whole client; elsewhere it is a record, or nothing is protected."""

SECURE_MODES = ("client-distributed", "record-distributed")
"""Modes in which each client puts on a share of the noise and the server sees sums only."""

SUM_MODES = ("client", *SECURE_MODES)
"""Modes in which nothing but a round's noised sum is used."""

# Modes that each key belongs to, and what it is in all others.
_KEYS: dict[str, tuple[tuple[str, ...], object]] = {
    "max_update_norm": (CLIENT_MODES, 0.0),
    "registered_clients": (SUM_MODES, 0),
    "client_sample_rate": (SUM_MODES, 1.0),
    "participation": (("client",), "public"),
    "least_clients": (SECURE_MODES, 0),
    "colluding_clients": (SECURE_MODES, 0),
    "registered_records": (("record-distributed",), 0),
}
# Of the mode in which each site accounts for itself; allowed, and without effect, without privacy.
_OWN_ACCOUNT = ("record", "none")


def check_sum_settings(settings: PrivacySettings) -> None:
    """Refuse keys in a mode to which they do not belong, and a mode without its keys.

    Raises
    ------
    ValueError
        Naming the key, what it got and what it takes.
    """
    for name, (modes, neutral) in _KEYS.items():
        value = getattr(settings, name)
        if settings.mode not in modes and value != neutral:
            raise ValueError(
                f"privacy.{_kebab(name)} belongs to privacy.mode = {' or '.join(map(repr, modes))}"
                f", got {value!r}: accepted with mode {settings.mode!r} is {neutral!r}"
            )
        if settings.mode in modes and neutral == 0 and not value and name != "colluding_clients":
            raise ValueError(
                f"privacy.{_kebab(name)} must be above 0 with privacy.mode = {settings.mode!r}, "
                f"got {value!r}"
            )
    if settings.evaluation_noise_multiplier and settings.mode not in _OWN_ACCOUNT:
        raise ValueError(
            "privacy.evaluation-noise-multiplier belongs to privacy.mode = 'record', got "
            f"{settings.evaluation_noise_multiplier:g}: accepted with mode {settings.mode!r} is 0"
        )
    if settings.mode not in SUM_MODES:
        return
    for name in ("max_grad_norm_a", "max_grad_norm_b"):
        if value := getattr(settings, name):
            raise ValueError(
                f"privacy.{_kebab(name)} must be 0 with privacy.mode = {settings.mode!r}, which "
                f"has one clip norm for all rounds, got {value:g}"
            )
    units = "registered_clients" if settings.mode in CLIENT_MODES else "registered_records"
    if settings.target_delta >= 1 / getattr(settings, units):
        raise ValueError(
            f"privacy.target-delta must be below 1 / privacy.{_kebab(units)} = "
            f"{1 / getattr(settings, units):.2e} with privacy.mode = {settings.mode!r}, got "
            f"{settings.target_delta:g}"
        )
    if settings.mode in SECURE_MODES:
        _check_secure(settings)


def _check_secure(settings: PrivacySettings) -> None:
    if not 2 <= settings.least_clients <= settings.registered_clients:
        raise ValueError(
            "privacy.least-clients must be from 2 to privacy.registered-clients = "
            f"{settings.registered_clients} with privacy.mode = {settings.mode!r}, got "
            f"{settings.least_clients}"
        )
    if settings.colluding_clients >= settings.least_clients:
        raise ValueError(
            "privacy.colluding-clients must be below privacy.least-clients = "
            f"{settings.least_clients}, got {settings.colluding_clients}: somebody's noise must "
            "stay secret"
        )
    if settings.mode == "record-distributed" and settings.expected_batch_size:
        raise ValueError(
            "privacy.expected-batch-size must be 0 with privacy.mode = 'record-distributed', got "
            f"{settings.expected_batch_size}: all clients sample at one privacy.sample-rate"
        )


def _kebab(name: str) -> str:
    return name.replace("_", "-")
