"""Where the embedded backbone is kept, and how it gets there exactly once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from .pretraining import ARCHITECTURE, Pretrained, Recipe, pretrain
from .progress import shown_on_stderr, silent

BACKBONE_LABEL = "embedded-glyph-vit"
"""Name of the backbone in reports and in the cache."""

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_CHECKSUMS = "SHA256SUMS"

_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Folder that may hold what the project can make again.

    Returns
    -------
    pathlib.Path
        ``$FLOWER_DP_LORA_CACHE``, else ``$XDG_CACHE_HOME/flower-dp-lora``, else
        ``~/.cache/flower-dp-lora``; not necessarily there yet.
    """
    own = os.environ.get("FLOWER_DP_LORA_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification tells programs to ignore a relative folder.
    base = Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache"
    return base / "flower-dp-lora"


def ensure_backbone(progress: bool = True, recipe: Recipe | None = None) -> Path:
    """Return the folder of the pretrained backbone, pretraining it if it is not there.

    ``timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10)`` loads it.  A file
    that does not match its checksum is reported and the backbone is made again.  Of several
    processes one pretrains and the others wait.

    Parameters
    ----------
    progress : bool
        Whether to show the pretraining on stderr.
    recipe : Recipe, optional
        Another recipe than the default one, kept in a folder of its own.

    Returns
    -------
    pathlib.Path
        Folder with ``model.safetensors``, ``config.json`` and ``SHA256SUMS``.

    Raises
    ------
    OSError
        If the cache folder cannot be written.
    """
    from filelock import FileLock

    recipe = recipe or Recipe()
    root = cache_folder()
    folder = root / _folder_name(recipe)
    if _damage(folder) is None:
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        damage = _damage(folder)  # another process may have made it while this one waited
        if damage is None:
            return folder
        if folder.exists():
            _logger.warning("the cached backbone is damaged (%s) and is made again", damage)
        for leftover in root.glob(f"{folder.name}.partial-*"):
            shutil.rmtree(leftover)
        if progress:
            with shown_on_stderr() as report:
                made = pretrain(recipe, report)
        else:
            made = pretrain(recipe, silent)
        _publish(folder, recipe, made)
    return folder


def _folder_name(recipe: Recipe) -> str:
    text = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{BACKBONE_LABEL}-v{recipe.version}-{digest}"


def _damage(folder: Path) -> str | None:
    """What is wrong with a cached backbone; None if nothing is."""
    try:
        lines = (folder / _CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return f"{_CHECKSUMS} is missing"
    except UnicodeDecodeError:
        return f"{_CHECKSUMS} is not text"
    noted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in (_WEIGHTS, _CONFIG):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if hashlib.sha256(path.read_bytes()).hexdigest() != noted.get(name):
            return f"{name} does not match its checksum"
    return None


def _publish(folder: Path, recipe: Recipe, made: Pretrained) -> None:
    """Write the backbone beside its place and rename it there, so that no half is ever seen."""
    from safetensors.torch import save

    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        contents = {
            _WEIGHTS: save({name: tensor.contiguous() for name, tensor in made.weights.items()}),
            _CONFIG: json.dumps(_timm_config(recipe, made), indent=2).encode(),
        }
        sums = [f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in contents.items()]
        contents[_CHECKSUMS] = ("\n".join(sums) + "\n").encode()
        for name, data in contents.items():
            _write_durably(partial / name, data)
        _sync_folder(partial)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(folder.parent)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _timm_config(recipe: Recipe, made: Pretrained) -> dict[str, object]:
    """The description that timm's hub format keeps beside the weights."""
    size = recipe.image_size
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": recipe.width,
        "model_args": recipe.model_args(),
        "pretrained_cfg": {
            "tag": BACKBONE_LABEL,
            "num_classes": 0,
            "input_size": [1, size, size],
            "fixed_input_size": True,
            "interpolation": recipe.interpolation,
            "crop_pct": 1.0,
            "mean": [recipe.mean],
            "std": [recipe.std],
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "pretraining": {"glyph_accuracy": made.accuracy, "glyph_shapes": made.num_shapes},
    }
