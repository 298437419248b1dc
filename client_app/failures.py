"""What goes wrong on a client, and the fixed code that stands for it."""

from __future__ import annotations

import torch

from federation.messages import ClientFailure
from federation.settings import SettingsError
from privacy import (
    AccountingError,
    BudgetExhausted,
    DataChanged,
    EngineError,
    LedgerError,
    PlanChanged,
    PolicyError,
    PolicyRefusal,
)
from strategies import ProtocolError, UnusableMessage
from task.errors import DataError, ModelError

from .local_training import TrainingError

_CPU_MEMORY = "DefaultCPUAllocator"


class MessageError(ValueError):
    """A train message that this client cannot use."""


class BackboneDiffers(ValueError):
    """Server and client do not hold the same frozen weights."""


# Which code stands for which exception; the first that fits.
_FAILURES: tuple[tuple[type[Exception], ClientFailure], ...] = (
    (SettingsError, ClientFailure.SETTINGS),
    (MessageError, ClientFailure.MESSAGE),
    (UnusableMessage, ClientFailure.MESSAGE),
    (ProtocolError, ClientFailure.PRIVACY),
    (BackboneDiffers, ClientFailure.BACKBONE_DIFFERS),
    (DataError, ClientFailure.DATA),
    (ModelError, ClientFailure.MODEL),
    (PolicyError, ClientFailure.POLICY),
    (PolicyRefusal, ClientFailure.POLICY),
    (BudgetExhausted, ClientFailure.BUDGET_EXHAUSTED),
    (LedgerError, ClientFailure.LEDGER),
    (PlanChanged, ClientFailure.PRIVACY),
    (DataChanged, ClientFailure.PRIVACY),
    (AccountingError, ClientFailure.PRIVACY),
    (EngineError, ClientFailure.PRIVACY),
    (TrainingError, ClientFailure.PRIVACY),
)
_OWN_TEXTS = {code for _, code in _FAILURES}


def failure_of(error: Exception) -> ClientFailure:
    """The code that leaves this machine for an exception."""
    for kind, code in _FAILURES:
        if isinstance(error, kind):
            return code
    # On the CPU torch raises a plain RuntimeError for want of memory.
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_MEMORY in str(error)
    return ClientFailure.OUT_OF_MEMORY if memory else ClientFailure.INTERNAL


def log_text(error: Exception) -> str:
    """What the client's own log may say: our texts quote no record, others' might."""
    return str(error) if failure_of(error) in _OWN_TEXTS else _where(error)


def _where(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    code = trace.tb_frame.f_code
    return f"{type(error).__name__} in {code.co_name}, {code.co_filename}:{trace.tb_lineno}"
