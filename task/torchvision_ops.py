"""Let torchvision be imported beside a CPU-only torch.

The torchvision wheel on the package index is built for CUDA. Its compiled part does not load with
a CPU-only torch, so the operators it would have registered do not exist, and torchvision (hence
timm) fails on import while it attaches shape functions to them. Declaring the operators' schemas
beforehand is enough: nothing in this project calls them.
"""

from __future__ import annotations

import torch

_NAMESPACE = "torchvision"
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A schema lives only as long as the Library object that defined it.
_kept_alive: list[torch.library.Library] = []


def declare_missing_torchvision_ops() -> tuple[str, ...]:
    """Declare the torchvision operators that a CPU-only torch lacks.

    Call it before the first import of timm or torchvision. With a CUDA build of torch it does
    nothing (there torchvision brings its own operators), and calling it again does nothing either.

    Returns
    -------
    tuple of str
        Names of the operators declared by this call; empty when none was missing.
    """
    if torch.version.cuda is not None:
        return ()
    missing = tuple(name for name in _SCHEMAS if not _is_declared(name))
    if missing:
        library = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in missing:
            library.define(_SCHEMAS[name])  # type: ignore[no-untyped-call]
        _kept_alive.append(library)
    return missing


def _is_declared(name: str) -> bool:
    return hasattr(getattr(torch.ops, _NAMESPACE), name)
