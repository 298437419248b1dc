"""The run config: complete in pyproject.toml, and refused with reasons where it cannot be."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel

from cli.run import ROOT, default_run_config
from federation.settings import Settings, SettingsError

DEMO = default_run_config()
Leaf = tuple[str, type, object]


def leaves(owner: type[BaseModel], value: BaseModel, prefix: str = "") -> Iterator[Leaf]:
    """Key, type and value of every setting."""
    for name, field in owner.model_fields.items():
        key, inner = prefix + name.replace("_", "-"), getattr(value, name)
        if isinstance(inner, BaseModel):
            yield from leaves(type(inner), inner, f"{key}.")
        else:
            yield key, field.annotation if isinstance(field.annotation, type) else str, inner


GROUPS = {key.partition(".")[0] for key in DEMO if "." in key}
SETTINGS = {key: (kind, value) for key, kind, value in leaves(Settings, Settings())}


def refusal(**changes) -> str:
    config = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    with pytest.raises(SettingsError) as refused:
        Settings.from_run_config({**DEMO, **config})
    return str(refused.value)


def test_pyproject_names_every_setting_there_is_and_no_other():
    assert len(SETTINGS) > 40
    assert set(DEMO) == set(SETTINGS)


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_pyproject_values_have_the_settings_type_and_arrive_as_they_are(key):
    """Flower casts overrides to nothing: an int for a float in pyproject would mislead."""
    kind, _ = SETTINGS[key]
    assert type(DEMO[key]) is kind
    used = {k: v for k, _, v in leaves(Settings, Settings.from_run_config(DEMO))}
    assert used[key] == DEMO[key]


def test_flower_reads_pyproject_as_we_do():
    import tomllib

    from flwr.common.config import flatten_dict

    with (ROOT / "pyproject.toml").open("rb") as file:
        assert flatten_dict(tomllib.load(file)["tool"]["flwr"]["app"]["config"]) == DEMO


def test_the_demo_is_the_one_that_is_promised():
    demo = Settings.from_run_config(DEMO)
    assert (demo.strategy.method, demo.privacy.mode) == ("la-lora", "record")
    assert (demo.privacy.target_epsilon, demo.privacy.target_delta) == (8.0, 1e-5)
    assert (demo.data.source, demo.data.partitioner, demo.data.alpha) == (
        "embedded",
        "dirichlet",
        0.5,
    )
    assert demo.model.source == "embedded"
    assert demo.privacy.insecure_test_seed == -1
    assert demo.total_steps == demo.strategy.num_rounds * demo.strategy.local_steps


def test_settings_cannot_be_changed_afterwards():
    demo = Settings.from_run_config(DEMO)
    for owner, name in ((demo, "seed"), (demo.privacy, "target_epsilon")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(owner, name, 1)


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("seed", -1, "greater than or equal to 0"),
        ("seed", "1", "integer"),
        ("device", "gpu", "auto|cpu|cuda"),
        ("strategy.method", "fed-avg", "'la-lora'"),
        ("strategy.num-rounds", 0, "greater than or equal to 1"),
        ("strategy.num-rounds", 2.5, "integer"),
        ("strategy.num-rounds", True, "integer"),
        ("strategy.fraction-train", 0.0, "greater than 0"),
        ("strategy.fraction-train", 1.5, "less than or equal to 1"),
        ("strategy.weighting", "counts", "'public-counts'"),
        ("strategy.lr-a", 0.0, "greater than 0"),
        ("strategy.lr-decay", 1.1, "less than or equal to 1"),
        ("strategy.low-pass", True, "'auto'"),
        ("privacy.mode", "site", "'record'"),
        ("privacy.target-epsilon", 0.0, "greater than 0"),
        ("privacy.target-epsilon", 1000.0, "less than or equal to 100"),
        ("privacy.target-epsilon", math.inf, "less than or equal to 100"),
        ("privacy.target-epsilon", math.nan, "less than or equal to 100"),
        ("privacy.target-delta", 1.0, "less than 1"),
        ("privacy.max-grad-norm", 0.0, "greater than or equal to 0.000001"),
        ("privacy.max-grad-norm", math.inf, "less than or equal to 1000000"),
        ("privacy.max-grad-norm-a", 1e-9, "1e-06 to 1e+06"),
        ("privacy.sample-rate", 1.2, "less than or equal to 1"),
        ("privacy.insecure-test-seed", -2, "greater than or equal to -1"),
        ("privacy.engine", "ghost", "'hooks'"),
        ("model.source", "torch", "'timm'"),
        ("lora.r", 0, "greater than or equal to 1"),
        ("lora.lora-dropout", 1.0, "less than 1"),
        ("data.source", "sql", "'csv'"),
        ("data.alpha", 0.0, "greater than or equal to 0.01"),
        ("data.min-records", 0, "greater than or equal to 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_key_value_and_what_is_accepted(
    key, value, accepted
):
    lines = refusal(**{key: value}).splitlines()
    line = next(line for line in lines if line.strip().startswith(f"{key}:"))
    assert repr(value) in line and accepted in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy__local_steps": 3}, ["strategy.local-steps", "even", "got 3"]),
        (
            {"strategy__method": "ro-lora", "strategy__num_rounds": 1},
            ["strategy.num-rounds", "at least 2", "got 1"],
        ),
        (
            {"privacy__expected_batch_size": 32},
            ["privacy.sample-rate", "privacy.expected-batch-size", "0.2 and 32", "exactly one"],
        ),
        ({"privacy__sample_rate": 0.0}, ["privacy.sample-rate", "exactly one", "0.0 and 0"]),
        (
            {"strategy__method": "dp-lora", "privacy__max_grad_norm_a": 1.0},
            ["privacy.max-grad-norm-a", "dp-lora", "accepted is 0"],
        ),
        (
            {"model__source": "transformers", "model__name": "./roberta"},
            ["model.source", "data.source", "'embedded'", "accepted"],
        ),
        ({"model__name": "vit"}, ["model.name", "'vit'", "accepted"]),
        ({"model__source": "timm"}, ["model.name", "''", "accepted"]),
        (
            {"model__source": "timm", "model__name": "timm/vit", "model__revision": "main"},
            ["model.revision", "'main'", "40 hexadecimal"],
        ),
        ({"data__num_labels": 3}, ["data.num-labels", "3", "accepted"]),
        ({"data__path": "x.csv"}, ["data.path", "'x.csv'", "accepted"]),
        ({"data__partition_column": "user"}, ["data.partition-column", "'user'", "accepted"]),
        ({"data__partitioner": "natural-id"}, ["data.partitioner", "'natural-id'", "accepted"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(changes, words):
    text = refusal(**changes)
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("strategy.rounds", "num-rounds"),
        ("privacy.epsilon", "target-epsilon"),
        ("lora.alpha", "lora-alpha"),
        ("lora.r.x", "lora-alpha"),
        ("epsilon", "output-dir"),
        ("privac.target-epsilon", "privacy"),
    ],
)
def test_an_unknown_key_is_refused_with_those_that_are_known(key, known):
    text = refusal(**{key: 1})
    assert key.split(".")[0] in text and "no such setting" in text
    assert known in text.split("known are")[1]


def test_every_key_at_fault_is_named_at_once():
    text = refusal(seed=-1, strategy__num_rounds=0, privacy__target_delta=2.0, no_such=1)
    for key in ("seed", "strategy.num-rounds", "privacy.target-delta", "no-such"):
        assert f"  {key}: " in text


@given(
    key=st.one_of(st.sampled_from(sorted(SETTINGS)), st.from_regex(r"[a-z]{1,6}(\.[a-z]{1,6})?",
                  fullmatch=True)),
    value=st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=5)),
)  # fmt: skip
def test_any_one_change_gives_settings_or_a_settings_error_that_names_it(key, value):
    group = key.partition(".")[0]
    assume(key not in GROUPS and not ("." in key and group in SETTINGS))  # the test after this one
    try:
        settings = Settings.from_run_config({**DEMO, key: value})
    except SettingsError as error:
        refusal = str(error)
        found = None
    else:
        refusal = ""
        found = {k: v for k, _, v in leaves(Settings, settings)}
    if found is None:
        assert group in refusal
    else:
        assert found[key] == value


@pytest.mark.parametrize("config", [{"seed": 1, "seed.x": 1}, {"lora": 4, "lora.r": 4}])
def test_a_key_below_a_scalar_is_refused(config):
    with pytest.raises(SettingsError):
        Settings.from_run_config(config)


def test_an_underscore_for_a_hyphen_is_named_as_it_was_written():
    with pytest.raises(SettingsError, match=r"strategy\.num_rounds: no such setting"):
        Settings.from_run_config({**DEMO, "strategy.num_rounds": 3})


@pytest.mark.parametrize("key", ["strategy.lr-a", "strategy.lr-b", "strategy.lr-head"])
def test_an_infinite_learning_rate_is_refused(key):
    with pytest.raises(SettingsError, match=key):
        Settings.from_run_config({**DEMO, key: math.inf})


def imported_by(module: str) -> set[str]:
    code = f"import sys; import {module}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def imported_by_the_server() -> set[str]:
    return imported_by("server_app.app")


@pytest.mark.parametrize("package", ["timm", "transformers", "peft", "datasets", "sklearn", "ray"])
def test_the_server_checks_settings_before_a_model_library_is_loaded(
    imported_by_the_server, package
):
    assert "federation" in imported_by_the_server
    assert package not in imported_by_the_server


@pytest.mark.parametrize("package", ["torch", "opacus", "dp_accounting", "scipy"])
def test_the_server_checks_settings_before_torch_is_loaded(imported_by_the_server, package):
    assert package not in imported_by_the_server


def test_opacus_and_checkpointing_exclude_each_other():
    text = refusal(privacy__engine="opacus", model__gradient_checkpointing=True)
    assert "privacy.engine = 'opacus'" in text and "'fused' or 'hooks'" in text
    for kind in ("fused", "hooks"):
        config = {**DEMO, "privacy.engine": kind, "model.gradient-checkpointing": True}
        assert Settings.from_run_config(config).privacy.engine == kind
