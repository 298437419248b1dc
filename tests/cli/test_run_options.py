"""The options of ``python -m cli.run``: which settings they become, and how Flower reads them."""

from __future__ import annotations

import pytest
from flwr.common.config import parse_config_args
from hypothesis import example, given
from hypothesis import strategies as st

from cli import run as command
from cli.run import _parser, _toml, parse_overrides
from federation.settings import Settings, SettingsError


def overrides(*arguments: str) -> dict:
    return parse_overrides(_parser().parse_args(list(arguments)))


def test_without_options_only_the_output_folder_is_set():
    assert overrides() == {"output-dir": str(command.ROOT / "runs")}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "ro-lora"], {"strategy.method": "ro-lora"}),
        (["--rounds", "3"], {"strategy.num-rounds": 3}),
        (["--seed", "0"], {"seed": 0}),
        (["--epsilon", "1"], {"privacy.target-epsilon": 1.0}),
        (["--epsilon", "0.5"], {"privacy.target-epsilon": 0.5}),
        (["--epsilon", "none"], {"privacy.mode": "none"}),
        (["--config", "strategy.lr-a=0.25"], {"strategy.lr-a": 0.25}),
        (["--config", 'device="cpu"'], {"device": "cpu"}),
        (["--config", "privacy.target-delta=1e-6"], {"privacy.target-delta": 1e-6}),
        (
            ["--config", "strategy.lr-a=0.25 seed=3   device='cpu'"],
            {"strategy.lr-a": 0.25, "seed": 3, "device": "cpu"},
        ),
        (["--config", "seed=3", "--config", "lora.r=2"], {"seed": 3, "lora.r": 2}),
        (["--config", "seed=3\nlora.r=2"], {"seed": 3, "lora.r": 2}),
        (["--config", ""], {}),
        (["--config", 'data.path="two words.csv"'], {"data.path": "two words.csv"}),
        # What is said last and most exactly wins.
        (["--rounds", "3", "--config", "strategy.num-rounds=5"], {"strategy.num-rounds": 5}),
    ],
)
def test_each_option_becomes_its_setting(arguments, expected):
    got = overrides(*arguments)
    del got["output-dir"]
    assert got == expected
    assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in expected.items()}


def test_the_output_folder_is_absolute_because_flower_runs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert overrides("--output-dir", "here") == {"output-dir": str(tmp_path / "here")}


@pytest.mark.parametrize("epsilon", ["much", "1,5", "None", "-"])
def test_an_epsilon_that_is_no_number_is_refused(epsilon):
    with pytest.raises(SettingsError, match=rf"EPSILON: got '{epsilon}'.*number above 0, or none"):
        overrides(f"--epsilon={epsilon}")


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan", "inf", "1e9"])
def test_an_epsilon_out_of_range_is_refused_by_the_settings(epsilon):
    changes = overrides(f"--epsilon={epsilon}")
    with pytest.raises(SettingsError, match=r"privacy\.target-epsilon: got"):
        Settings.from_run_config({**command.default_run_config(), **changes})


@pytest.mark.parametrize("text", ["seed", "seed=", "device=cpu", "seed=1 seed=2", "=3", "a=1, b=2"])
def test_config_that_is_not_toml_is_refused_by_its_text(text):
    with pytest.raises(SettingsError) as refused:
        overrides("--config", text)
    assert "CONFIG" in str(refused.value) and repr(text) in str(refused.value)


def test_a_quoted_value_may_hold_an_equals_sign():
    assert overrides("--config", 'data.path="a b=c.csv"')["data.path"] == "a b=c.csv"


@pytest.mark.parametrize("rounds", ["two", "1.5", ""])
def test_rounds_that_are_no_number_end_the_command(rounds, capsys):
    with pytest.raises(SystemExit) as ended:
        overrides("--rounds", rounds)
    assert ended.value.code == 2 and "--rounds" in capsys.readouterr().err


values = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    # Flower splits at blanks outside of quotes and knows no escaped quote.
    st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"],
            blacklist_characters="\"'\\", max_codepoint=0xFFFF), max_size=8),
)  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(sorted(command.default_run_config())), values))
@example(changes={"output-dir": "/tmp/with blank/é", "seed": 3, "strategy.lr-a": 1e-05})
@example(changes={"data.path": "a=b c = d"})
def test_flower_understands_the_overrides_as_they_were_meant(changes):
    text = " ".join(f"{key}={_toml(value)}" for key, value in changes.items())
    got = parse_config_args([text])
    assert got == changes
    assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in changes.items()}


def test_flower_understands_characters_beyond_16_bits():
    assert parse_config_args([f"output-dir={_toml('/tmp/😀')}"]) == {"output-dir": "/tmp/😀"}
