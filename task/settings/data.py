"""Settings of the records, their labels and their split: ``data.*``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .base import COMMIT, Settings, refusal

FILE_SOURCES = ("csv", "tsv", "jsonl", "parquet", "npz", "image-folder")
"""Values of ``data.source`` that name files or folders of a machine."""

TABLE_SOURCES = ("csv", "tsv", "jsonl", "parquet", "hub")
"""Values of ``data.source`` whose records have named columns."""

EMBEDDED_LABELS = 10
"""Number of classes of the embedded data: the ten digits."""


class DataSettings(Settings):
    """Which records are learned from, their labels and their split (keys ``data.*``)."""

    source: Literal["embedded", "csv", "tsv", "jsonl", "parquet", "npz", "image-folder", "hub"] = (
        Field(
            default="embedded",
            description="Kind of data: embedded (scikit-learn's handwritten digits), a kind of "
            "file, a folder with one sub-folder of images per class, or a data set on the hub.",
        )
    )
    path: str = Field(
        default="",
        description="File or folder with the training records, for simulation only; in deployment "
        "each site names its own as data-path in its node config.",
    )
    test_path: str = Field(
        default="",
        description="The server's public test file or folder. Empty with npz: the arrays x_test "
        "and y_test of data.path.",
    )
    name: str = Field(default="", description="Name of the data set on the hub.")
    subset: str = Field(default="", description="Configuration of a hub data set; empty: its only.")
    revision: str = Field(
        default="",
        description="Commit of the hub data set, 40 hexadecimal digits: required for hub.",
    )
    train_split: str = Field(
        default="train", min_length=1, description="Split of a hub data set that is trained on."
    )
    test_split: str = Field(
        default="test", min_length=1, description="Public test split of a hub data set."
    )
    text_column: str = Field(default="text", min_length=1, description="Column with the text.")
    text_pair_column: str = Field(
        default="", description="Column with the second text of a pair; empty: single texts."
    )
    image_column: str = Field(
        default="image",
        min_length=1,
        description="Column with the image: encoded bytes (parquet, hub) or a file's path relative "
        "to the table's folder (csv, tsv, jsonl).",
    )
    label_column: str = Field(
        default="label",
        min_length=1,
        description="Column with the class: a number from 0, or one of data.label-names.",
    )
    num_labels: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Number of classes, at least 2. It is public and must be declared unless "
        "data.label-names is; 0: by data.label-names, or embedded (10).",
    )
    label_names: str = Field(
        default="",
        description="The public class names in their order: comma-separated, or the path of a "
        ".json list or of a .txt file with one name a line.",
    )
    partitioner: Literal["iid", "dirichlet", "shards", "natural-id"] = Field(
        default="dirichlet",
        description="How a simulation splits the records over its clients: at random, by Dirichlet "
        "shares of each class, by shards of the label-sorted records, or by a column.",
    )
    alpha: float = Field(
        default=0.5,
        ge=0.01,
        le=1e6,
        description="Dirichlet concentration; small: each class at few clients, large: even.",
    )
    shards_per_client: int = Field(
        default=2, ge=1, le=10_000, description="Shards that each client gets (shards)."
    )
    partition_column: str = Field(
        default="",
        description="Column whose values say whose a record is (natural-id): a user, a hospital.",
    )
    min_records: int = Field(
        default=16,
        ge=1,
        description="A client with fewer records than this does not take part. The "
        "dirichlet partitioner draws again, a few times, until every client has as many.",
    )

    validation_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the server's public test records, drawn by the seed, that only "
        "decides when to stop early; accuracy is reported on the others.",
    )

    def columns_read(self, texts: bool) -> tuple[str, ...]:
        """Columns of a site's table that are read; none where the data are no table."""
        if self.source not in TABLE_SOURCES:
            return ()
        inputs = [self.text_column, self.text_pair_column] if texts else [self.image_column]
        return tuple(name for name in (*inputs, self.label_column) if name)

    @model_validator(mode="after")
    def _where_fits_source(self) -> Self:
        because = f"data.source is {self.source!r}"
        if self.source != "hub":
            self.must_be_unset("data", ("name", "subset", "revision"), because)
        if self.source not in FILE_SOURCES:
            self.must_be_unset("data", ("path", "test_path"), because)
        if self.source == "hub" and not self.name.strip():
            raise refusal("data.name", self.name, "the name of a data set on the hub")
        if self.source == "hub" and not COMMIT.fullmatch(self.revision):
            raise refusal(
                "data.revision",
                self.revision,
                "the commit of the hub data set, 40 hexadecimal digits in lower case",
            )
        return self

    @model_validator(mode="after")
    def _labels_are_declared(self) -> Self:
        if self.source == "embedded":
            self.must_be_unset("data", ("label_names",), "data.source is 'embedded'")
            if self.num_labels not in (0, EMBEDDED_LABELS):
                raise refusal("data.num-labels", self.num_labels, "0 or 10 (the embedded digits)")
            return self
        if self.source == "image-folder" and not self.label_names:
            raise refusal(
                "data.label-names",
                "",
                "the sub-folders' names, because a site may "
                "lack some classes and the order must be the same everywhere",
            )
        if self.num_labels == 1 or not (self.num_labels or self.label_names):
            raise refusal(
                "data.num-labels",
                self.num_labels,
                "2 or more, or data.label-names instead: the classes are public and never read "
                "from private records",
            )
        return self

    @model_validator(mode="after")
    def _partition_fits_source(self) -> Self:
        if self.partitioner != "natural-id":
            self.must_be_unset(
                "data", ("partition_column",), f"data.partitioner is {self.partitioner!r}"
            )
        elif self.source not in TABLE_SOURCES:
            raise refusal(
                "data.partitioner",
                self.partitioner,
                f"iid, dirichlet or shards, because data.source {self.source!r} has no columns",
            )
        elif not self.partition_column.strip():
            raise refusal("data.partition-column", self.partition_column, "a column's name")
        return self
