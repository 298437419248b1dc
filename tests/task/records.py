"""Made-up texts and pictures, and files that hold them."""

from __future__ import annotations

import io
import json

from PIL import Image

from task.data import load_client_records
from task.encoders import ImageEncoder
from task.settings import DataSettings

GREY = ImageEncoder(1, 8, "bicubic", (0.5,), (0.25,))
COLOUR = ImageEncoder(3, 8, "bilinear", (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
SECRET = "Xanthippe"
TEXTS = ["the film was good", "", "NA", "not a good plot", "bad", "007", "very bad film", "good"]
PETS = DataSettings(source="image-folder", label_names="dog,bird,cat")


def rows(n=24):
    return [
        {"text": TEXTS[i % len(TEXTS)], "label": i % 2, "who": f"user-{i % 5}"} for i in range(n)
    ]


def write_table(path, source, records):
    import datasets

    if source in ("csv", "tsv"):
        table = datasets.Dataset.from_list(records)
        table.to_csv(str(path), sep="," if source == "csv" else "\t", index=False)
    elif source == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        datasets.Dataset.from_list(records).to_parquet(str(path))
    return path


def site(settings, encoder, path):
    return load_client_records(settings, encoder, {"data-path": str(path)}, seed=0)


def picture(value, size=(10, 12), mode="L"):
    return Image.new(mode, size, value)


def png(value, **options):
    stream = io.BytesIO()
    picture(value, **options).save(stream, "PNG")
    return stream.getvalue()
