"""Tables by ``datasets``: csv, tsv, jsonl and parquet files, and data sets on the hub."""

from __future__ import annotations

import contextlib
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..settings import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset

_SEPARATORS = {"csv": ",", "tsv": "\t"}


def read_file(path: Path, source: str, where: str) -> Dataset:
    """Read a table file into memory.

    ``datasets`` works in a folder that is thrown away afterwards: no copy of a site's records
    stays in a cache.

    Raises
    ------
    DataError
        If it cannot be read. The reader's own message is dropped, since it may quote a record.
    """
    import datasets

    options: dict[str, Any] = {"keep_in_memory": True}
    if source in _SEPARATORS:
        separator = _SEPARATORS[source]
        columns = _header(path, separator, where)
        # Cells stay text: a text "NA" or "007" must not become a missing value or a number.
        options |= {
            "sep": separator,
            "keep_default_na": False,
            "features": datasets.Features({name: datasets.Value("string") for name in columns}),
        }
    readers = {
        "csv": datasets.Dataset.from_csv,
        "tsv": datasets.Dataset.from_csv,
        "jsonl": datasets.Dataset.from_json,
        "parquet": datasets.Dataset.from_parquet,
    }
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            return readers[source](str(path), cache_dir=folder, **options)
        except Exception as error:
            # Readers raise their own kinds of errors, and those of pandas and Arrow.
            raise DataError(
                f"{where}: cannot be read as {source} ({type(error).__name__}); accepted: a "
                f"well-formed {source} file with at least one record"
            ) from None


def read_hub(settings: DataSettings, split: str) -> Dataset:
    """Load one split of a data set on the hub at its pinned commit; the hub's cache is used.

    Raises
    ------
    DataError
        If it cannot be fetched and is not in the cache, or has no such split.
    """
    import datasets

    with _quiet():
        try:
            return datasets.load_dataset(
                settings.name,
                settings.subset or None,
                split=split,
                revision=settings.revision,
            )
        except Exception as error:
            # Network, cache, format and configuration errors have no common base.
            raise DataError(
                f"data.name {settings.name!r} at data.revision {settings.revision!r}, split "
                f"{split!r}: cannot be loaded ({type(error).__name__}); accepted: a data set on "
                "the hub, or in its cache, without a loading script"
            ) from None


def column(table: Dataset, name: str, key: str, where: str) -> list[Any]:
    """Return a column's values; a missing column is a :class:`DataError` that lists the others."""
    check_column(table, name, key, where)
    return list(table[name])


def check_column(table: Dataset, name: str, key: str, where: str) -> None:
    """Raise :class:`DataError` if there is no such column."""
    if name not in table.column_names:
        raise DataError(
            f"{where}: no column {name!r} ({key}); the columns here are "
            f"{', '.join(table.column_names)}"
        )


def texts(table: Dataset, name: str, key: str, where: str) -> list[str]:
    """Return a column of texts. Empty texts are records too; missing ones are refused."""
    values = column(table, name, key, where)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            found = "missing" if value is None else f"a {type(value).__name__}"
            raise DataError(f"{where}, column {name!r}, row {row + 1}: {found}; accepted: text")
    return values


def image_cells(table: Dataset, name: str, where: str) -> Dataset:
    """Return the table with a column of images as mappings with ``bytes`` and ``path``."""
    import datasets

    check_column(table, name, "data.image-column", where)
    try:
        cells = table.select_columns([name]).cast_column(name, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):
        raise DataError(
            f"{where}, column {name!r}: holds {table.features[name]}; accepted: images as encoded "
            "bytes or as paths of files"
        ) from None
    return cells


def feature_names(table: Dataset, name: str) -> tuple[str, ...]:
    """Return the class names that the table itself gives to the numbers of a column."""
    import datasets

    feature = table.features.get(name)
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _header(path: Path, separator: str, where: str) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            columns = next(csv.reader(file, delimiter=separator), [])
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{where}: cannot be read ({type(error).__name__}); accepted: UTF-8 text with a header"
        ) from None
    if not columns or len(set(columns)) < len(columns):
        raise DataError(f"{where}: no header, or a column twice; accepted: distinct column names")
    return columns


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: a federation has its own display, and clients are many."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
