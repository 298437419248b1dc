"""From settings to records: one loader for simulation, deployment and the server's test split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..encoders import Encoder, ImageEncoder, TextEncoder
from ..errors import DataError
from ..settings import TABLE_SOURCES, DataSettings
from . import tables
from .arrays import read_npz
from .cache import simulation_cache
from .images import SUFFIXES, EncodedImages, array_inputs, image_inputs
from .labels import class_names, encode_labels
from .partitions import split_rows
from .records import Inputs, Records, TextInputs

Split = Literal["train", "test"]
NodeConfig = Mapping[str, str | int | float | bool]


def load_client_records(
    settings: DataSettings,
    encoder: Encoder,
    node_config: NodeConfig,
    *,
    seed: int,
    public_records: int = 0,
) -> Records:
    """Load the records of one client.

    Parameters
    ----------
    settings : DataSettings
        What the records are and how a simulation splits them.
    encoder : Encoder
        The model's encoder.
    node_config : mapping
        Either ``data-path`` (deployment: the site's own file or folder, read whole and kept
        nowhere), or ``partition-id`` and ``num-partitions`` (simulation).
    seed : int
        Seed of the simulation's split, 0 or more.
    public_records : int (default: 0)
        The figure that stands for the number of records, where that is not public; 0: the number.
        Otherwise a server that tries one ``data.min-records`` after the other would learn it from
        the refusals.

    Returns
    -------
    Records
        At least ``data.min-records`` of them, by the public figure.

    Raises
    ------
    DataError
        If the data cannot be used; the message holds no record's content and no number of records.
    """
    if "data-path" in node_config:
        records = _load_site(settings, encoder, node_config)
    else:
        records = _load_partition(settings, encoder, node_config, seed)
    if (public_records or len(records)) < settings.min_records:
        # How many there are stays here: it is the site's own business.
        raise DataError(
            f"this client has too few records; data.min-records asks for {settings.min_records}"
        )
    return records


def data_stamp(settings: DataSettings, node_config: NodeConfig, *, seed: int) -> str:
    """Tell cheaply whether a client's records may be others than they were.

    Parameters
    ----------
    settings, node_config, seed
        As for :func:`load_client_records`.

    Returns
    -------
    str
        Hash of what chooses the records and of the names, sizes and times of their files.  Other
        stamps need not mean other records; images that a table names by path are not looked at.
        Settings that leave a site's records as they are leave its stamp as it is.
    """
    chosen: list[Any]
    if "data-path" in node_config:
        path = Path(str(node_config["data-path"])).expanduser()
        chosen = [settings.source]
        if settings.source in TABLE_SOURCES:
            chosen += [settings.text_column, settings.text_pair_column, settings.image_column]
    else:
        chosen = [settings.model_dump(mode="json")]
        path = Path(settings.path).expanduser()
        chosen += [seed, *(node_config.get(key) for key in ("partition-id", "num-partitions"))]
    if settings.path or "data-path" in node_config:
        try:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            chosen += [(str(f.relative_to(path.parent)), *_marks(f)) for f in files]
        except OSError:
            raise DataError("the data's files cannot be looked at") from None
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()


def _marks(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    # The time of the last change cannot be set back by copying tools, as that of the content can.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def load_test_records(settings: DataSettings, encoder: Encoder) -> Records:
    """Load the server's public test records.

    Raises
    ------
    DataError
        If ``data.test-path`` is needed and not set, or the data cannot be used.
    """
    path = settings.test_path
    if settings.source == "npz" and not path:
        path = settings.path
    if settings.source not in ("embedded", "hub") and not path:
        raise DataError("data.test-path is not set; accepted: the server's public test data")
    records = _load(settings, encoder, path, "test", "data.test-path").records
    if len(records) == 0:
        raise DataError("the test data have no records; accepted: at least one")
    return records


@dataclass(frozen=True)
class _Loaded:
    records: Records
    owners: Sequence[Any] | None = None


def _load_site(settings: DataSettings, encoder: Encoder, node_config: NodeConfig) -> Records:
    path = node_config["data-path"]
    if "partition-id" in node_config:
        raise DataError("the node config has both data-path and partition-id; accepted is one")
    if not isinstance(path, str) or not path.strip():
        raise DataError("the node config's data-path is not a path; accepted: a file or folder")
    if settings.source in ("embedded", "hub"):
        raise DataError(
            f"the node config has a data-path, but data.source {settings.source!r} has no files; "
            "accepted: partition-id and num-partitions, or another data.source"
        )
    return _load(settings, encoder, path, "train", "data-path").records


def _load_partition(
    settings: DataSettings, encoder: Encoder, node_config: NodeConfig, seed: int
) -> Records:
    part, count = (_number(node_config, key) for key in ("partition-id", "num-partitions"))
    if not 0 <= part < count:
        raise DataError(
            f"partition-id is {part} with num-partitions {count}; accepted: 0 to num-partitions - 1"
        )
    if settings.source not in ("embedded", "hub") and not settings.path:
        raise DataError("data.path is not set; accepted: the training data of the simulation")
    loaded = simulation_cache.get(
        ("records", settings, encoder.key),
        lambda: _load(settings, encoder, settings.path, "train", "data.path"),
    )
    rows = simulation_cache.get(
        ("rows", settings, count, seed),
        lambda: split_rows(settings, loaded.records.labels, loaded.owners, count, seed=seed),
    )
    return loaded.records.subset(rows[part])


def _number(node_config: NodeConfig, key: str) -> int:
    value = node_config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(
            f"the node config's {key} is {value!r}; accepted: data-path, or whole numbers "
            "partition-id and num-partitions"
        )
    return value


def _load(settings: DataSettings, encoder: Encoder, path: str, split: Split, key: str) -> _Loaded:
    where = f"{key} {path}" if path else f"data.source {settings.source!r}"
    file = Path(path).expanduser()
    wants_folder = settings.source == "image-folder"
    if path and not (file.is_dir() if wants_folder else file.is_file()):
        raise DataError(f"{where}: no such {'folder' if wants_folder else 'file'}")
    if settings.source in TABLE_SOURCES:
        return _load_table(settings, encoder, file, split, where)
    if not isinstance(encoder, ImageEncoder):
        raise DataError(f"{where}: holds images, but the model takes text")
    if settings.source == "image-folder":
        return _load_folder(settings, encoder, file, where)
    if settings.source == "embedded":
        from ..embedded.digits import load_digits_arrays

        images, labels = load_digits_arrays(split)
        return _Loaded(Records(array_inputs(images, encoder, where), labels.astype(np.int64)))
    images, classes = read_npz(file, split, where)
    encoded = encode_labels(classes.tolist(), settings, f"{where}, labels")
    return _Loaded(Records(array_inputs(images, encoder, where), encoded))


def _load_table(
    settings: DataSettings, encoder: Encoder, file: Path, split: Split, where: str
) -> _Loaded:
    if settings.source == "hub":
        name = settings.train_split if split == "train" else settings.test_split
        table = tables.read_hub(settings, name)
        where = f"data.name {settings.name!r}, split {name!r}"
    else:
        table = tables.read_file(file, settings.source, where)
    label = settings.label_column
    labels = encode_labels(
        tables.column(table, label, "data.label-column", where),
        settings,
        f"{where}, column {label!r}",
        tables.feature_names(table, label),
    )
    owners = None
    if settings.partition_column and split == "train":
        owners = tables.column(table, settings.partition_column, "data.partition-column", where)
    return _Loaded(Records(_table_inputs(settings, encoder, table, file, where), labels), owners)


def _table_inputs(
    settings: DataSettings, encoder: Encoder, table: Any, file: Path, where: str
) -> Inputs:
    if isinstance(encoder, TextEncoder):
        texts = tables.texts(table, settings.text_column, "data.text-column", where)
        pairs = None
        if settings.text_pair_column:
            pair_column = settings.text_pair_column
            pairs = tables.texts(table, pair_column, "data.text-pair-column", where)
        return TextInputs(encoder, encoder.tokens(texts, pairs), _text_digests(texts, pairs))
    if not isinstance(encoder, ImageEncoder):
        raise TypeError(f"no loader for a {type(encoder).__name__}")
    name = settings.image_column
    cells = tables.image_cells(table, name, where)
    images = EncodedImages(encoder, cells[name], file.parent, f"{where}, column {name!r}")
    return image_inputs(images, encoder)


def _text_digests(texts: Sequence[str], pairs: Sequence[str] | None) -> list[bytes]:
    # JSON keeps ("ab", "c") and ("a", "bc") apart.
    both = texts if pairs is None else zip(texts, pairs, strict=True)
    return [hashlib.sha256(json.dumps(one).encode()).digest() for one in both]


def _load_folder(
    settings: DataSettings, encoder: ImageEncoder, folder: Path, where: str
) -> _Loaded:
    names = class_names(settings)
    hidden = (".", "__")
    found = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(hidden)}
    if not found <= set(names):
        # An undeclared folder's name may be content, so only the declared ones are repeated.
        raise DataError(
            f"{where}: {len(found - set(names))} sub-folders are not declared; accepted are the "
            f"classes in data.label-names: {', '.join(names)}"
        )
    files: list[Path] = []
    labels: list[int] = []
    for index, name in enumerate(names):
        images = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        files += images
        labels += [index] * len(images)
    pictures = EncodedImages(encoder, files, folder, f"{where} (in the order of classes and names)")
    return _Loaded(Records(image_inputs(pictures, encoder), np.asarray(labels, np.int64)))
