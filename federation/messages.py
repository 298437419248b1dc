"""Keys and error codes of the messages between ServerApp and ClientApp.

Only fixed codes and texts leave a client: an exception's own text may quote a record.
"""

from __future__ import annotations

import enum

from flwr.app import Error

FINGERPRINT_KEY = "backbone-fingerprint"
METRICS_KEY = "metrics"
COUNT_KEY = "num-examples"
NOISED_ACCURACY_KEY = "noised-accuracy"
TRAINING_KEY = "training-id"


class ClientFailure(enum.IntEnum):
    """Why a client did not train; the details are in the client's own log."""

    SETTINGS = 1001
    DATA = 1002
    MODEL = 1003
    BACKBONE_DIFFERS = 1004
    BUDGET_EXHAUSTED = 1005
    PRIVACY = 1006
    MESSAGE = 1007
    OUT_OF_MEMORY = 1008
    POLICY = 1009
    LEDGER = 1010
    INTERNAL = 1099

    def to_error(self) -> Error:
        """The error that is sent, with a text that depends on the code alone."""
        return Error(code=int(self), reason=_REASONS[self])


_REASONS = {
    ClientFailure.SETTINGS: "the run config was refused by the client",
    ClientFailure.DATA: "the client's data cannot be used (see the client's log)",
    ClientFailure.MODEL: "the model cannot be built on the client (see the client's log)",
    ClientFailure.BACKBONE_DIFFERS: "the client's frozen backbone differs from the server's",
    ClientFailure.BUDGET_EXHAUSTED: "the client's privacy budget does not allow this round",
    ClientFailure.PRIVACY: "the client refused for privacy's sake (see the client's log)",
    ClientFailure.MESSAGE: "the client could not use the message (another version?)",
    ClientFailure.OUT_OF_MEMORY: "the client ran out of memory",
    ClientFailure.POLICY: "the client's own policy does not allow this run (see its log)",
    ClientFailure.LEDGER: "the client's privacy ledger cannot be used (see the client's log)",
    ClientFailure.INTERNAL: "the client failed (see the client's log)",
}
