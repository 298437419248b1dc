"""Find a backbone's folder: local, or one pinned commit of a hub repository.

Both kinds of model are loaded from a folder on disk, so there is one loading path, and it reads
safetensors only: nothing is ever unpickled.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError
from ..settings import ModelSettings, is_local

_WANTED = ("*.json", "*.txt", "*.model", "model*.safetensors")


def model_folder(settings: ModelSettings) -> Path:
    """Return the folder with ``config.json`` and safetensors weights.

    A hub repository is downloaded once at the pinned commit into Hugging Face's cache; without a
    network the cached copy of that commit is used.

    Raises
    ------
    ModelError
        If there is no such folder or repository, or no safetensors weights in it.
    """
    folder = Path(settings.name).expanduser() if is_local(settings.name) else _download(settings)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.name {settings.name!r}: no config.json there; accepted is a folder with "
            "config.json and model.safetensors"
        )
    check_safetensors(folder)
    return folder


def check_safetensors(folder: Path) -> None:
    """Raise :class:`ModelError` unless the folder holds safetensors weights."""
    if any(folder.glob("model*.safetensors")):
        return
    pickled = sorted(
        path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}")
    )
    found = f"only {', '.join(pickled)}" if pickled else "no weights"
    raise ModelError(
        f"{folder}: found {found}; accepted is model.safetensors (pickled weights can run code "
        "when they are read; convert them once, on a machine that may run it)"
    )


def _download(settings: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download

    name = settings.name
    if settings.source == "timm" and "/" not in name:
        name = f"timm/{name}"  # timm's own models, by the names that timm.list_models gives
    reason = ""
    # The second try needs no network: it takes the copy of this commit in the cache, if any.
    for cached_only in (False, True):
        try:
            folder = snapshot_download(
                name,
                revision=settings.revision,
                allow_patterns=list(_WANTED),
                local_files_only=cached_only,
            )
            return Path(folder)
        except Exception as error:
            # Network, offline mode, access and spelling errors have no common base.
            reason = reason or f"{type(error).__name__}: {error}"
    raise ModelError(
        f"model.name {settings.name!r} at model.revision {settings.revision!r} could not be "
        f"fetched from the hub and is not in its cache ({reason})"
    )
