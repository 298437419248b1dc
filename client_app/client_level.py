"""What a client does where a whole client is the unit of protection."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord

from federation.settings import Settings
from privacy import clip_update
from privacy.client_settings import CLIENT_MODES

Update = Mapping[str, npt.NDArray[np.float32]]


def outgoing(settings: Settings, update: Update) -> dict[str, npt.NDArray[np.float32]]:
    """The update as it leaves this client: clipped as a whole where clients are the unit."""
    if settings.privacy.mode not in CLIENT_MODES:
        return dict(update)
    clipped = clip_update(update, settings.privacy.max_update_norm)
    return {name: value.astype(np.float32) for name, value in clipped.items()}


def unit_statement(settings: Settings) -> ConfigRecord | None:
    """What a reply says of its privacy where clients are the unit; ``None`` elsewhere.

    Nothing of it depends on the client's data: it adds no noise and promises none.
    """
    if settings.privacy.mode not in CLIENT_MODES:
        return None
    return ConfigRecord({"unit": "client", "max-update-norm": settings.privacy.max_update_norm})
