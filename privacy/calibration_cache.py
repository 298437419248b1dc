"""Noise multipliers found before, kept on disk for the processes to come.

Flower starts a new process for every message, and a calibration takes seconds.  Each is kept in a
small file of its own, named by a hash of all that it depends on: every input to the last bit, the
versions of both accountants, the version of our own search.

What is trusted: nothing that another user could have written.  The folder and its files must
belong to the user who runs the process and be closed to everybody else (modes 0700 and 0600);
otherwise they are not used.  A number that is read is still only a proposal:
:func:`privacy.accounting.calibrate_noise_multiplier` asks the accountant of record whether it
meets the budget.  A file that was changed can therefore never give less privacy than is
accounted; it could give more noise.

No record is kept.  But with ``privacy.expected-batch-size`` the rate, and so a file's content and
even its name, tells the record count to whoever can read the folder: another reason to close it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

Inputs = Mapping[str, str | int]

_NUMBER = "noise-multiplier"
_INPUTS = "inputs"
# A file holds about 300 bytes; of anything larger no more than this is read.
_MOST_BYTES = 4096

_LOGGER = logging.getLogger(__name__)


def calibration_folder() -> Path:
    """Folder of the kept calibrations, beside the embedded backbone unless told otherwise.

    Returns
    -------
    pathlib.Path
        ``$FLOWER_DP_LORA_CALIBRATIONS``, else ``calibrations`` in ``$FLOWER_DP_LORA_CACHE``, else
        in ``$XDG_CACHE_HOME/flower-dp-lora``, else in ``~/.cache/flower-dp-lora``; not
        necessarily there yet.

    Raises
    ------
    RuntimeError
        If the user has no home folder and no variable names another.
    """
    own = os.environ.get("FLOWER_DP_LORA_CALIBRATIONS")
    if own:
        return Path(own).expanduser()
    project = os.environ.get("FLOWER_DP_LORA_CACHE")
    if project:
        return Path(project).expanduser() / "calibrations"
    shared = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification tells programs to ignore a relative folder.
    base = Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache"
    return base / "flower-dp-lora" / "calibrations"


def load(inputs: Inputs, *, smallest: float, largest: float) -> float | None:
    """Noise multiplier kept for these inputs; a proposal, which the caller must check.

    Parameters
    ----------
    inputs : mapping of str to str or int
        All that the number depends on but the accountants' versions; floats as ``float.hex``.
    smallest, largest : float
        What a calibration can give; a number outside is not returned.

    Returns
    -------
    float or None
        ``None`` if there is none, or none that may be used.  A file or folder that is damaged or
        open to others is reported once by a warning.
    """
    key = _key(inputs)
    if key is None:
        return None
    with _open_folder(create=False) as folder:
        content = None if folder is None else _read(folder, _name(key))
    if content is None:
        return None
    noise_multiplier = _parse(content, key)
    if noise_multiplier is None or not smallest <= noise_multiplier <= largest:
        _warn_once(f"the kept calibration {_name(key)} is damaged and is computed anew")
        return None
    return noise_multiplier


def store(inputs: Inputs, noise_multiplier: float) -> None:
    """Keep a noise multiplier, in place of any kept before; a folder that cannot be used is none.

    Parameters
    ----------
    inputs : mapping of str to str or int
        As for :func:`load`.
    noise_multiplier : float
        What was found.

    Notes
    -----
    Several processes may write at once: each writes a file of its own and renames it, so a reader
    sees one of them whole or none.
    """
    key = _key(inputs)
    if key is None:
        return
    content = json.dumps({_INPUTS: json.loads(key), _NUMBER: noise_multiplier}).encode()
    with _open_folder(create=True) as folder:
        if folder is not None:
            try:
                _replace(folder, _name(key), content)
            except OSError as error:
                _LOGGER.debug("a calibration was not kept: %s", error.strerror)


def _key(inputs: Inputs) -> str | None:
    try:
        versions = {name: importlib.metadata.version(name) for name in ("dp-accounting", "opacus")}
    except importlib.metadata.PackageNotFoundError:  # an accountant without a version
        return None
    return json.dumps({**inputs, **versions}, sort_keys=True)


def _name(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _parse(content: bytes, key: str) -> float | None:
    """The number in a file; None if the file is not exactly what :func:`store` writes for it."""
    try:
        kept = json.loads(content)
        same = json.dumps(kept[_INPUTS], sort_keys=True) == key and len(kept) == 2
        number = kept[_NUMBER]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return number if same and type(number) is float else None


@contextlib.contextmanager
def _open_folder(*, create: bool) -> Iterator[int | None]:
    """Descriptor of the folder, or None if there is none that may be used.

    All that follows is done relative to it, so the folder that was checked is the one used.
    """
    descriptor = None
    if os.name == "posix":  # elsewhere nothing tells who owns a file
        try:
            folder = calibration_folder()
            if create:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            _LOGGER.debug("no calibration was kept yet")
        except (OSError, RuntimeError) as error:
            _LOGGER.debug("the folder of calibrations cannot be used: %s", error)
    try:
        if descriptor is not None and not _is_private(os.fstat(descriptor)):
            _warn_once(
                f"{folder} is not used: it must belong to the user of this process and be closed "
                "to all others (mode 0700), for the numbers in it decide the noise"
            )
            yield None
        else:
            yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077


def _read(folder: int, name: str) -> bytes | None:
    try:
        # Without O_NONBLOCK a named pipe would be waited for.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOGGER.debug("a kept calibration cannot be read: %s", error.strerror)
        return None
    try:
        status = os.fstat(file)
        if stat.S_ISREG(status.st_mode) and _is_private(status):
            return os.read(file, _MOST_BYTES)
    except OSError as error:
        _LOGGER.debug("a kept calibration cannot be read: %s", error.strerror)
        return None
    finally:
        os.close(file)
    _warn_once(
        f"the kept calibration {name} is not used: it must be a file of the user of this process, "
        "closed to all others (mode 0600)"
    )
    return None


def _replace(folder: int, name: str, content: bytes) -> None:
    beside = f".{name}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(beside, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside, dir_fd=folder)


@functools.lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    _LOGGER.warning(text)
