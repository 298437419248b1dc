"""How a simulation splits records over its clients, by the partitioners of flwr-datasets.

Every process computes the same split from the same seed. A split is complete: each record is with
exactly one client. The partitioners see labels and owners only, never the records.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..settings import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

Rows = npt.NDArray[np.int64]


def split_rows(
    settings: DataSettings,
    labels: npt.NDArray[np.int64],
    owners: Sequence[Any] | None,
    num_partitions: int,
    *,
    seed: int,
) -> list[Rows]:
    """Split the rows 0 ... n - 1 over clients.

    Parameters
    ----------
    settings : DataSettings
        The partitioner and its numbers.
    labels : numpy.ndarray
        int64, (n,).
    owners : sequence, optional
        For natural-id: whose each record is.
    num_partitions : int
        Number of clients.
    seed : int
        Seed of the split, 0 or more.

    Returns
    -------
    list of numpy.ndarray
        Per client its rows, sorted: disjoint, and together all rows.

    Raises
    ------
    DataError
        If the records cannot be split over so many clients.
    """
    if len(labels) < num_partitions:
        raise DataError(f"fewer records than the {num_partitions} clients of the simulation")
    if settings.partitioner == "natural-id":
        parts = _by_owner(settings, owners, num_partitions)
    else:
        parts = _by_label(settings, labels, num_partitions, seed)
    rows = np.concatenate(parts)
    if len(rows) != len(labels) or len(np.unique(rows)) != len(labels):
        raise DataError(
            f"data.partitioner {settings.partitioner!r} could not place every record once (with a "
            "very small data.alpha shares vanish); accepted: a larger data.alpha or another seed"
        )
    return [np.sort(part) for part in parts]


def _by_label(
    settings: DataSettings, labels: npt.NDArray[np.int64], num_partitions: int, seed: int
) -> list[Rows]:
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner, ShardPartitioner

    # Files are often sorted, and the partitioners cut in the order they find: shuffle first.
    order = np.random.default_rng(seed).permutation(len(labels))
    table = Dataset.from_dict({"label": labels[order], "row": order})
    if settings.partitioner == "iid":
        return _load(IidPartitioner(num_partitions), table, num_partitions)
    if settings.partitioner == "dirichlet":
        return _dirichlet(settings, table, num_partitions, seed)
    shards = num_partitions * settings.shards_per_client
    if len(labels) < shards:
        raise DataError(
            f"data.shards-per-client: {shards} shards need as many records; accepted: fewer shards"
        )
    partitioner = ShardPartitioner(
        num_partitions, "label", num_shards_per_partition=settings.shards_per_client, seed=seed
    )
    return _with_leftovers(_load(partitioner, table, num_partitions), len(labels))


def _dirichlet(
    settings: DataSettings, table: Dataset, num_partitions: int, seed: int
) -> list[Rows]:
    from flwr_datasets.partitioner import DirichletPartitioner

    # A few draws try to give every client data.min-records; if none does, the first draw stands
    # and the clients with too few records say so themselves.
    for smallest in (settings.min_records, 0):
        partitioner = DirichletPartitioner(
            num_partitions, "label", settings.alpha, min_partition_size=smallest, seed=seed
        )
        with warnings.catch_warnings(), contextlib.suppress(ValueError):
            warnings.simplefilter("ignore")
            return _load(partitioner, table, num_partitions)
    raise DataError(
        "data.partitioner 'dirichlet' found no split; accepted: a larger data.alpha or another seed"
    )


def _by_owner(
    settings: DataSettings, owners: Sequence[Any] | None, num_partitions: int
) -> list[Rows]:
    from datasets import Dataset
    from flwr_datasets.partitioner import NaturalIdPartitioner

    column = settings.partition_column
    if owners is None:
        raise DataError(f"data.partition-column {column!r}: these records have no such column")
    for row, owner in enumerate(owners):
        if owner is None:
            raise DataError(f"column {column!r}, row {row + 1}: missing; accepted: an id")
    ids, codes = np.unique(np.asarray(owners), return_inverse=True)
    if len(ids) < num_partitions:
        raise DataError(
            f"column {column!r}: fewer different ids than the {num_partitions} clients of the "
            "simulation; accepted: at most one client per id"
        )
    table = Dataset.from_dict({"owner": codes, "row": np.arange(len(codes))})
    # The partitioner draws a progress bar that has no switch.
    with contextlib.redirect_stderr(io.StringIO()):
        by_id = _load(NaturalIdPartitioner("owner"), table, len(ids))
    return [np.concatenate(by_id[client::num_partitions]) for client in range(num_partitions)]


def _load(partitioner: Partitioner, table: Dataset, count: int) -> list[Rows]:
    partitioner.dataset = table
    return [
        np.asarray(partitioner.load_partition(part)["row"], dtype=np.int64) for part in range(count)
    ]


def _with_leftovers(parts: list[Rows], total: int) -> list[Rows]:
    """Hand out the few rows that equal shards leave over, one client after the other."""
    left = np.setdiff1d(np.arange(total), np.concatenate(parts))
    return [np.concatenate([part, left[client :: len(parts)]]) for client, part in enumerate(parts)]
