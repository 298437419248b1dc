"""Which ``privacy.*`` keys belong to modes whose unit of protection is a client."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .settings import PrivacySettings

CLIENT_MODES = ("client", "client-distributed")
"""Modes whose unit is a whole client; elsewhere it is a record, or nothing is protected."""

SECURE_MODES = ("client-distributed",)
"""Modes in which clients put on the noise and the server sees sums only."""

# What each key is where it has no meaning.
_NEUTRAL = {
    "max_update_norm": 0.0,
    "registered_clients": 0,
    "client_sample_rate": 1.0,
    "participation": "public",
    "least_clients": 0,
    "colluding_clients": 0,
}
_OF_SECURE = ("least_clients", "colluding_clients")


def check_client_settings(settings: PrivacySettings) -> None:
    """Refuse keys of the clients' unit in another mode, and such a mode without them.

    Raises
    ------
    ValueError
        Naming the key, what it got and what it takes.
    """
    if settings.mode not in CLIENT_MODES:
        for name, neutral in _NEUTRAL.items():
            owner = "client-distributed" if name in _OF_SECURE else "client"
            if (value := getattr(settings, name)) != neutral:
                raise ValueError(
                    f"privacy.{name.replace('_', '-')} belongs to privacy.mode = {owner!r}, got "
                    f"{value!r}: accepted with mode {settings.mode!r} is {neutral!r}"
                )
        return
    for name in ("max_update_norm", "registered_clients"):
        if not getattr(settings, name):
            raise ValueError(
                f"privacy.{name.replace('_', '-')} must be above 0 with privacy.mode = "
                f"{settings.mode!r}, got {getattr(settings, name)!r}"
            )
    for name in ("max_grad_norm_a", "max_grad_norm_b"):
        if value := getattr(settings, name):
            raise ValueError(
                f"privacy.{name.replace('_', '-')} clips records, which privacy.mode = "
                f"{settings.mode!r} does not do, got {value:g}: accepted is 0; updates are clipped "
                "to privacy.max-update-norm"
            )
    if settings.target_delta >= 1 / settings.registered_clients:
        raise ValueError(
            "privacy.target-delta must be below 1 / privacy.registered-clients = "
            f"{1 / settings.registered_clients:.2e} with privacy.mode = {settings.mode!r}, got "
            f"{settings.target_delta:g}"
        )
    if settings.mode in SECURE_MODES:
        _check_secure(settings)
    elif settings.least_clients or settings.colluding_clients:
        raise ValueError(
            "privacy.least-clients and privacy.colluding-clients belong to privacy.mode = "
            f"'client-distributed', got {settings.least_clients} and "
            f"{settings.colluding_clients} with mode {settings.mode!r}: accepted is 0"
        )


def _check_secure(settings: PrivacySettings) -> None:
    if settings.participation != "public":
        raise ValueError(
            "privacy.participation must be 'public' with privacy.mode = "
            f"{settings.mode!r}, got {settings.participation!r}: the server sees who takes part"
        )
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
