"""``python -m cli.run``: one simulated federation, followed round by round, with its result."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from flwr.common.config import parse_config_args

from federation.round_lines import describe_privacy, human_bytes, round_line
from federation.run_files import RunFolder
from federation.settings import Settings, SettingsError, Value
from task.errors import ModelError

from .superlink import (
    SuperLinkError,
    flower_environment,
    flower_executable,
    simulation_superlink,
)

ROOT = Path(__file__).resolve().parent.parent
_RUN_ID = re.compile(r"started run (\d+)")
_LOG_LINES_SHOWN = 40


class RunFailed(RuntimeError):
    """The run did not complete; the text says what is known."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0 only if the run completed."""
    options = _parser().parse_args(arguments)
    try:
        overrides = parse_overrides(options)
        settings = Settings.from_run_config({**default_run_config(), **overrides})
        _check_clients(options.clients, settings)
        _prepare_backbone(settings)
        folder = _run(options, settings, overrides)
    except (SettingsError, SuperLinkError, RunFailed, ModelError, OSError) as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    print_result(folder, options.clients)
    return 0


def default_run_config() -> dict[str, Value]:
    """The app's own run config, flattened as Flower does it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        config = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    return flatten(config)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Turn nested tables into dotted keys.

    >>> flatten({"seed": 1, "lora": {"r": 4}})
    {'seed': 1, 'lora.r': 4}
    """
    flat: dict[str, Value] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def parse_overrides(options: argparse.Namespace) -> dict[str, Value]:
    """Collect what the command line changes in the run config.

    Raises
    ------
    SettingsError
        If ``--epsilon`` is neither a number nor ``none``, or ``--config`` is not TOML.
    """
    overrides: dict[str, Value] = {"output-dir": str(Path(options.output_dir).resolve())}
    if options.method:
        overrides["strategy.method"] = options.method
    if options.rounds is not None:
        overrides["strategy.num-rounds"] = options.rounds
    if options.seed is not None:
        overrides["seed"] = options.seed
    if options.epsilon == "none":
        overrides["privacy.mode"] = "none"
    elif options.epsilon:
        try:
            overrides["privacy.target-epsilon"] = float(options.epsilon)
        except ValueError:
            raise SettingsError(
                f"EPSILON: got {options.epsilon!r}; accepted is a number above 0, or none"
            ) from None
    for text in options.config:
        overrides.update(_parse_config(text))
    return overrides


def _parse_config(text: str) -> dict[str, Value]:
    """Read settings as ``flwr run -c`` does: pairs with blanks between, or a TOML file's path."""
    if not text.strip():
        return {}
    try:
        pairs = parse_config_args([text])
    except (click.ClickException, OSError, tomllib.TOMLDecodeError):
        pairs = {}
    if not pairs:
        raise SettingsError(
            f"CONFIG: got {text!r}; accepted are key=value pairs with blanks between, texts in "
            "double quotes, or the path of a .toml file"
        )
    return pairs


def simulation_config(clients: int, gpus: int) -> str:
    """Flower's federation config: one core and a fair share of the GPUs per client.

    Parameters
    ----------
    clients : int
        Virtual clients.
    gpus : int
        GPUs of this machine; with fewer GPUs than workers each worker gets a share of one.
    """
    config = f"num-supernodes={clients} client-resources-num-cpus=1"
    if gpus:
        workers = min(clients, os.cpu_count() or 1)
        # No worker is split over two GPUs, and rounding up would leave the last one without.
        share = math.floor(1e4 / math.ceil(workers / gpus)) / 1e4
        config += f" client-resources-num-gpus={share:.4f}"
    return config


def print_result(folder: RunFolder, clients: int) -> None:
    """Say what came out; the path of ``result.json`` is the last line."""
    result = folder.read_result()
    print(f"\n{result['method']} on {clients} clients, {result['rounds']} rounds")
    print(
        f"  test accuracy  {result['accuracy_start']:.1%} before the first round, "
        f"{result['accuracy_end']:.1%} after the last"
    )
    print(f"  privacy        {describe_privacy(result)}")
    if result["bytes_up"] is not None:
        print(
            f"  sent           {human_bytes(result['bytes_up'])} up, "
            f"{human_bytes(result['bytes_down'])} down, all clients and rounds"
        )
    print(f"  time           {result['seconds']:.0f} s")
    print(f"  adapter        {result['adapter']}")
    print(f"  metrics        {folder.metrics}")
    print(folder.result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cli.run", description=__doc__)
    parser.add_argument("--method", default="", help="the strategy: docs/methods.md")
    parser.add_argument("--epsilon", default="", help="a number, or none for no privacy")
    parser.add_argument("--rounds", type=int, help="rounds of training")
    parser.add_argument("--clients", type=int, default=5, help="virtual clients (default: 5)")
    parser.add_argument("--seed", type=int, help="public seed")
    parser.add_argument(
        "--config", action="append", default=[], help="further settings, as flwr run -c"
    )
    parser.add_argument("--output-dir", default=str(ROOT / "runs"), help="where runs are kept")
    parser.add_argument("--app", default=str(ROOT), help="the Flower app's folder (default: this)")
    return parser


def _check_clients(clients: int, settings: Settings) -> None:
    needed = max(settings.strategy.min_available_nodes, settings.strategy.min_train_nodes)
    if clients < needed:
        raise SettingsError(
            f"CLIENTS: got {clients}; accepted are {needed} or more (strategy.min-available-nodes, "
            "strategy.min-train-nodes)"
        )


def _prepare_backbone(settings: Settings) -> None:
    if settings.model.source == "embedded":
        from task.embedded import ensure_backbone

        print("[1/3] Backbone: pretrained once on public, made-up glyphs, then cached", flush=True)
        print(f"      {ensure_backbone(progress=True)}", flush=True)
    else:
        print(f"[1/3] Backbone: {settings.model.name}", flush=True)


def _run(
    options: argparse.Namespace, settings: Settings, overrides: Mapping[str, Value]
) -> RunFolder:
    home = ROOT / ".flwr"
    environment = flower_environment(home)
    runs = Path(settings.output_dir)
    runs.mkdir(parents=True, exist_ok=True)
    print(
        f"[2/3] Federation: {settings.strategy.method}, {options.clients} simulated clients, "
        f"{settings.strategy.num_rounds} rounds of {settings.strategy.local_steps} private steps",
        flush=True,
    )
    with simulation_superlink(home, environment) as connection:
        command = [
            *(str(flower_executable("flwr")), "run", options.app, connection, "--stream"),
            *("--federation-config", simulation_config(options.clients, _count_gpus())),
            *("-c", " ".join(f"{key}={_toml(value)}" for key, value in overrides.items())),
        ]
        log_file = home / "run.log"
        with log_file.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                run_id = _follow(process, log_file, runs, settings.strategy.num_rounds)
            finally:
                process.terminate()
                process.wait()
        status = _status(run_id, connection, environment) if run_id else "never started"
    folder = RunFolder.find(runs, run_id) if run_id else None
    if status != "finished:completed" or folder is None or not folder.result.exists():
        tail = "\n".join(
            log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
        )
        raise RunFailed(f"the run's status is {status!r}. The end of its log:\n{tail}")
    print("[3/3] Done", flush=True)
    return folder


def _follow(
    process: subprocess.Popen[bytes], log_file: Path, runs: Path, rounds: int
) -> int | None:
    """Print a line for each round as it ends; return Flower's run id."""
    run_id, folder, shown = None, None, 0
    while True:
        ended = process.poll() is not None
        if run_id is None and (
            found := _RUN_ID.search(log_file.read_text(encoding="utf-8", errors="replace"))
        ):
            run_id = int(found.group(1))
        if run_id is not None and folder is None:
            folder = RunFolder.find(runs, run_id)
        if folder is not None:
            for row in list(folder.read_metrics())[shown:]:
                print("      " + round_line(row, rounds), flush=True)
                shown += 1
        if ended:
            return run_id
        time.sleep(0.2)


def _status(run_id: int, connection: str, environment: Mapping[str, str]) -> str:
    """Ask for the run's status: ``flwr run --stream`` ends with 0 even when the run crashed."""
    answer = subprocess.run(
        [
            *(str(flower_executable("flwr")), "ls", connection),
            *("--run-id", str(run_id), "--format", "json"),
        ],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return str(json.loads(answer.stdout)["runs"][0]["status"])
    except (json.JSONDecodeError, KeyError, IndexError):
        return f"unknown (flwr ls ended with {answer.returncode}: {answer.stderr.strip()})"


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    sys.exit(main())
