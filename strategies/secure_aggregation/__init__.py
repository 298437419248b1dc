"""Secure aggregation: the server learns the sum of clients' vectors and no single one.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning"
(CCS 2017), honest-but-curious form: pairwise masks that cancel in the sum, a mask of each client's
own, and Shamir shares of both secrets among the clients, so that those that drop out can be taken
off.  Flower's own protocol is not part of its Message API.
"""

from .client import (
    SECURE_KEY,
    MaskLimits,
    ProtocolError,
    answer_stage,
    masked_records,
)
from .server import ModularMechanism, SecureAggregation, SecureMean

__all__ = [
    "SECURE_KEY",
    "MaskLimits",
    "ModularMechanism",
    "ProtocolError",
    "SecureAggregation",
    "SecureMean",
    "answer_stage",
    "masked_records",
]
