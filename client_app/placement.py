"""Which device a client computes on."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from federation.settings import SettingsError, Value


def choose_device(wanted: str, node_config: Mapping[str, Value]) -> torch.device:
    """Choose the device of this client.

    Parameters
    ----------
    wanted : str
        ``device`` of the run config: ``auto``, ``cpu`` or ``cuda:N``.
    node_config : mapping
        The site's own ``device`` overrides it: the operator of a SuperNode knows the machine.

    Returns
    -------
    torch.device
        ``auto`` is the first visible GPU, else the CPU.  In simulation Ray shows each worker
        only its share of the GPUs, renumbered from 0; a SuperNode sees all GPUs of its machine
        unless told one.

    Raises
    ------
    SettingsError
        If the device named is not there.
    """
    device = str(node_config.get("device", wanted))
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return torch.device("cpu")
    if (match := re.fullmatch(r"cuda:(0|[1-9][0-9]*)", device)) is None:
        raise SettingsError(f"device: got {device!r}; accepted are auto, cpu and cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1]) >= count:
        raise SettingsError(
            f"device: got {device!r}, but {count} GPUs are visible here; accepted are auto, cpu"
            + "".join(f", cuda:{n}" for n in range(count))
        )
    return torch.device(device)
