"""Settings: what is refused, and that the message says what is accepted."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from task.settings import DataSettings, LoRASettings, ModelSettings, is_local

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("model", [ModelSettings, LoRASettings, DataSettings])
def test_defaults_are_valid_kebab_case_and_described(model):
    settings = model()
    flat = settings.model_dump(by_alias=True)
    assert model(**flat) == settings
    assert all("_" not in key for key in flat)
    assert all(isinstance(value, (int, float, str, bool)) for value in flat.values())
    assert all(field.description for field in model.model_fields.values())
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, next(iter(model.model_fields)), "x")


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (ModelSettings, {"sourcing": "timm"}, "Extra inputs"),
        (ModelSettings, {"source": "keras"}, "'embedded', 'timm' or 'transformers'"),
        (ModelSettings, {"image-size": "32"}, "valid integer"),
        (ModelSettings, {"image-size": True}, "valid integer"),
        (ModelSettings, {"name": "timm/vit"}, r"model\.name is 'timm/vit'; accepted: not set"),
        (ModelSettings, {"source": "timm"}, r"model\.name is ''; accepted"),
        (ModelSettings, {"source": "timm", "name": "o/vit"}, r"model\.revision is ''; accepted"),
        (ModelSettings, {"source": "timm", "name": "o/vit", "revision": "main"}, "40 hexadecimal"),
        (ModelSettings, {"source": "timm", "name": "/x", "revision": COMMIT}, "local folder"),
        (
            ModelSettings,
            {"source": "transformers", "name": "./x", "image-size": 32},
            r"model\.image-size is 32; accepted: not set",
        ),
        (LoRASettings, {"r": 0}, "greater than or equal to 1"),
        (LoRASettings, {"r": 4.0}, "valid integer"),
        (LoRASettings, {"lora-dropout": 1.0}, "less than 1"),
        (LoRASettings, {"lora-dropout": float("nan")}, "finite"),
        (LoRASettings, {"target-modules": " , "}, r"lora\.target-modules"),
        (DataSettings, {"num-labels": 3}, r"data\.num-labels is 3; accepted: 0 or 10"),
        (DataSettings, {"path": "x"}, r"data\.path is 'x'; accepted: not set"),
        (DataSettings, {"source": "csv"}, r"data\.num-labels is 0; accepted: 2 or more"),
        (DataSettings, {"source": "csv", "num-labels": 1}, "2 or more"),
        (DataSettings, {"source": "csv", "num-labels": 2, "name": "x"}, r"data\.name is 'x'"),
        (DataSettings, {"source": "hub", "num-labels": 2}, r"data\.name is ''"),
        (DataSettings, {"source": "hub", "num-labels": 2, "name": "o/d"}, r"data\.revision is ''"),
        (DataSettings, {"source": "image-folder", "num-labels": 2}, r"data\.label-names is ''"),
        (DataSettings, {"partitioner": "natural-id"}, "has no columns"),
        (
            DataSettings,
            {"source": "csv", "num-labels": 2, "partitioner": "natural-id"},
            r"data\.partition-column is ''",
        ),
        (DataSettings, {"partition-column": "user"}, r"data\.partition-column is 'user'"),
        (DataSettings, {"alpha": 0.0}, r"greater than or equal to 0\.01"),
        (DataSettings, {"alpha": float("inf")}, "finite"),
    ],
)
def test_refused(model, values, message):
    with pytest.raises(ValidationError, match=message):
        model(**values)


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (ModelSettings, {"source": "timm", "name": "timm/vit", "revision": COMMIT}),
        (ModelSettings, {"source": "transformers", "name": "../roberta"}),
        (LoRASettings, {"target_modules": "attn.qkv,mlp.fc1"}),
        (DataSettings, {"source": "csv", "label-names": "no,yes", "alpha": 1}),
        (DataSettings, {"source": "hub", "name": "o/d", "revision": COMMIT, "num-labels": 2}),
        (
            DataSettings,
            {
                "source": "parquet",
                "num_labels": 2,
                "partitioner": "natural-id",
                "partition_column": "user",
            },
        ),
    ],
)
def test_accepted(model, values):
    settings = model(**values)
    kept = {**settings.model_dump(), **settings.model_dump(by_alias=True)}
    assert {key: kept[key] for key in values} == values


def test_what_counts_as_a_local_folder():
    assert all(is_local(name) for name in ("/a", "./a", "../a", "~/a", "C:\\a"))
    assert not any(is_local(name) for name in ("a", "o/a", "o/a.b-c"))


def test_settings_and_the_package_import_neither_torch_nor_models():
    code = (
        "import sys, task, task.settings, task.errors; task.DataSettings; "
        "heavy = {'torch', 'timm', 'transformers', 'peft', 'datasets'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_imported():
    import task

    assert all(getattr(task, name) is not None for name in task.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        task.nothing  # noqa: B018
