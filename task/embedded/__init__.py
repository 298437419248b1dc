"""The embedded default: real private records and a public backbone, without any hub.

The private records are the handwritten digits of scikit-learn; the backbone is a small vision
transformer that the project pretrains once on rendered letters and keeps in the user's cache.
"""

from .backbone import BACKBONE_LABEL, cache_folder, ensure_backbone
from .digits import NUM_LABELS, load_digits_arrays

__all__ = [
    "BACKBONE_LABEL",
    "NUM_LABELS",
    "cache_folder",
    "ensure_backbone",
    "load_digits_arrays",
]
