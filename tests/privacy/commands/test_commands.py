"""The command line as such: who is called, with what, and what a refusal looks like."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from privacy.commands import COMMANDS, main
from privacy.commands.arguments import InputError

HEAVY = ("torch", "numpy", "scipy", "dp_accounting", "opacus", "matplotlib", "pydantic", "flwr")


def command(name: str, run) -> SimpleNamespace:
    def add_parser(subparsers):
        parser = subparsers.add_parser(name, help="for tests")
        parser.add_argument("--number", type=int, default=0)
        return parser

    return SimpleNamespace(add_parser=add_parser, run=run)


def test_a_command_beside_the_own_ones_gets_its_options_and_gives_the_status():
    seen = []

    def run(options):
        seen.append(options.number)
        return 7

    assert main(["other", "--number", "5"], extra=[command("other", run)]) == 7
    assert seen == [5]


def test_an_input_error_is_one_line_and_status_2(capsys):
    def run(options):
        raise InputError("--number", options.number, "more than that")

    assert main(["other", "--number", "3"], extra=[command("other", run)]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "dp-lora other: --number: got 3; takes more than that\n")


def test_a_package_that_is_missing_is_named(capsys):
    def run(options):
        raise ModuleNotFoundError("No module named 'dp_accounting'", name="dp_accounting")

    assert main(["other"], extra=[command("other", run)]) == 1
    assert "needs the package dp_accounting: pip install" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(capsys):
    def run(options):
        raise KeyboardInterrupt

    assert main(["other"], extra=[command("other", run)]) == 130
    assert "Stopped" in capsys.readouterr().err


def test_a_mistake_of_ours_is_not_hidden():
    def run(options):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        main(["other"], extra=[command("other", run)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["nothing"], "nothing"),
        (["other", "--number", "x"], "--number"),
        (["other", "--num", "1"], "--num"),  # no abbreviations: a later option may take them
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line_and_status_2(capsys, arguments, said):
    assert main(arguments, extra=[command("other", lambda options: 0)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    names = [one.__name__.rsplit(".", 1)[1] for one in COMMANDS]
    assert "plan" in names
    assert all(name in text for name in names)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["plan", "--help"], 0),
        (["plan", "--records", "x"], 2),
        (
            ["plan", "--records", "10", "--rounds", "1", "--local-steps", "1", "--batch", "11",
             "--epsilon", "1"],
            2,
        ),
    ],
)  # fmt: skip
def test_help_and_refusals_load_nothing_heavy(arguments, status):
    code = (
        "import sys; from privacy.commands import main; "
        f"status = main({arguments!r}); "
        f"print(status, *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == str(status)


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "privacy.commands", "plan", "--records", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dp-lora plan: --records: got 0; takes a whole number from 1")
