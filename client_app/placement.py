"""Which device a client computes on, with how many threads, and with adapters of which rank."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from federation.settings import Settings, SettingsError, Value

# What a process that plays several clients goes back to.
_TORCHS_OWN_THREADS = torch.get_num_threads()
_MOST_THREADS = 4096


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


def set_threads(node_config: Mapping[str, Value]) -> int:
    """Let torch use as many CPU threads as the site says; return how many it uses.

    Parameters
    ----------
    node_config : mapping
        The site's own ``threads``, for a machine on which other things run, too.  Without it
        torch's own number stays: all cores, or in simulation the cores that Ray gives a worker
        (it sets ``OMP_NUM_THREADS``), so that workers do not fight over them.

    Raises
    ------
    SettingsError
        If ``threads`` is not a whole number from 1 on.
    """
    wanted = node_config.get("threads", _TORCHS_OWN_THREADS)
    if type(wanted) is not int or not 1 <= wanted <= _MOST_THREADS:
        raise SettingsError(
            f"node config threads: got {wanted!r}; accepted is a whole number from 1 to "
            f"{_MOST_THREADS}"
        )
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)
    return wanted


def choose_rank(settings: Settings, node_config: Mapping[str, Value]) -> int:
    """Choose the rank of this client's adapters.

    Parameters
    ----------
    settings : Settings
        ``lora.r`` is the rank of all, but for ``flex-lora``: there it is the largest, and
        ``lora.client-ranks`` gives simulated clients theirs, by partition and in turn.
    node_config : mapping
        The site's own ``lora-r`` comes first (``flex-lora``).

    Raises
    ------
    SettingsError
        If the rank named is none that this run has.
    """
    largest = settings.lora.r
    own = node_config.get("lora-r", 0)
    if settings.strategy.method != "flex-lora":
        if own not in (0, largest):
            raise SettingsError(
                f"node config lora-r: got {own!r}; only strategy.method = 'flex-lora' has ranks by "
                f"client, accepted is lora.r = {largest}"
            )
        return largest
    if own:
        if type(own) is not int or not 1 <= own <= largest:
            raise SettingsError(
                f"node config lora-r: got {own!r}; accepted are 1 to lora.r = {largest}"
            )
        return own
    ranks = settings.lora.ranks_by_client
    partition = node_config.get("partition-id")
    return ranks[int(partition) % len(ranks)] if ranks and partition is not None else largest
