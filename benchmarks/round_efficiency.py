"""``python -m benchmarks.round_efficiency``: how much of a simulated round is private steps.

Runs real federations (``make run``'s own command) and divides the seconds that clients spent in
private steps by the core-seconds of the round: round time times cores.  Beside it the same app
with a ClientApp that builds its model and loads its data for each message, as public examples
do.  Only steady rounds count: the first one, in which processes start, is reported apart.  Both
apps must end with the same adapter, bit for bit; for that the noise is drawn from a seed here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.run import ROOT
from cli.run import main as run_command
from client_app.trace import VARIABLE, read_trace

from .report import Bars, Rows, bar, finish, page, progress

_VIT_BAR = 0.90
_ROOMS = ("strategies", "privacy", "task", "federation", "client_app", "server_app")
_NAIVE_APP = '''"""A client as public examples have it: nothing is kept between messages."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.round_handler import handle_train
from client_app.session import forget
from task.data import simulation_cache

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Build the model and load the data for this message."""
    forget()
    simulation_cache.clear()
    return handle_train(message, context)
'''


@dataclass(frozen=True)
class Federation:
    """A federation to measure."""

    clients: int
    rounds: int
    config: Sequence[str] = ()


def federations(vit_folder: Path, rounds: int, local_steps: int) -> dict[str, Federation]:
    """The demo as it is, and eight clients that train ViT-Tiny at 224 pixels."""
    vit = (
        f'model.source="timm" model.name="{vit_folder}" data.partitioner="iid"',
        'lora.r=8 lora.lora-alpha=16 lora.target-modules="attn.qkv,attn.proj,mlp.fc1,mlp.fc2"',
        f"strategy.local-steps={local_steps} strategy.evaluate-every={rounds}",
    )
    return {"demo": Federation(5, 10), "vit-tiny": Federation(8, rounds, vit)}


def write_vit_tiny(folder: Path, seed: int) -> None:
    """Write timm's ViT-Tiny with random weights in the hub's format."""
    import torch

    from task.torchvision_ops import declare_missing_torchvision_ops

    declare_missing_torchvision_ops()
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_for_hf(model, str(folder), model_config={"num_classes": 0}, safe_serialization=True)


def write_naive_app(folder: Path) -> None:
    """Copy the app and let its ClientApp forget everything between messages."""
    for room in _ROOMS:
        shutil.copytree(
            ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, folder / file)
    (folder / "client_app" / "app.py").write_text(_NAIVE_APP, encoding="utf-8")


def measure(app: str, name: str, federation: Federation, seed: int) -> tuple[Rows, str]:
    """Run one federation; return a row per round, and a digest of the adapter that came out."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arguments = ["--clients", str(federation.clients), "--rounds", str(federation.rounds)]
        for text in (*federation.config, f"privacy.insecure-test-seed={seed}"):
            arguments += ["--config", text]
        arguments += ["--seed", str(seed), "--output-dir", str(folder / "runs")]
        if app == "naive":
            write_naive_app(folder / "app")
            arguments += ["--app", str(folder / "app")]
        traces = folder / "traces"
        output = io.StringIO()
        os.environ[VARIABLE] = str(traces)
        try:
            # Ray puts the current folder before the app's: from here the app itself would run.
            with contextlib.redirect_stdout(output), contextlib.chdir(folder):
                status = run_command(arguments)
        finally:
            del os.environ[VARIABLE]
        if status:
            raise SystemExit(f"{name}, {app}: the run failed")
        result = Path(output.getvalue().strip().splitlines()[-1])
        lines = (result.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rounds = [json.loads(line) for line in lines]
        return round_rows(app, name, rounds, read_trace(traces)), _digest(result.parent / "adapter")


def _digest(adapter: Path) -> str:
    """All bits of all tensors; the file's header names them in a random order."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def round_rows(
    app: str, name: str, rounds: Sequence[dict[str, Any]], trace: Sequence[dict[str, Any]]
) -> Rows:
    """Put the server's rounds and the clients' messages together.

    Parameters
    ----------
    app, name : str
        Which app, which federation.
    rounds : sequence of dict
        Lines of ``metrics.jsonl``.
    trace : sequence of dict
        Lines of the clients' traces.

    Returns
    -------
    list of dict
        A row per round from the first on.
    """
    cores = os.cpu_count() or 1
    rows = []
    for line in rounds:
        own = [message for message in trace if message["round"] == line["round"]]
        if not own:
            continue
        core_seconds = line["round_seconds"] * cores
        sums = {
            part: sum(message.get(f"{part}_seconds", 0.0) for message in own)
            for part in ("steps", "session", "records", "calibration", "ledger", "message")
        }
        rows.append(
            {
                "app": app,
                "federation": name,
                "round": line["round"],
                "seconds": line["round_seconds"],
                "core_seconds": core_seconds,
                **{f"{part}_seconds": value for part, value in sums.items()},
                "steps_cpu_seconds": sum(message["steps_cpu_seconds"] for message in own),
                "steps": sum(message["steps"] for message in own),
                "messages": len(own),
                "workers": len({message["pid"] for message in own}),
                "threads": max(message["threads"] for message in own),
                "backbone_loads": max(message["backbone_loads"] for message in own),
            }
        )
    return rows


def steady(rows: Rows, app: str, name: str) -> Rows:
    """The rounds of one run in which no process starts: all but the first."""
    return [r for r in rows if r["app"] == app and r["federation"] == name and r["round"] > 1]


def share(rows: Rows) -> float:
    """Seconds in private steps over core-seconds, of these rounds together."""
    return float(sum(r["steps_seconds"] for r in rows) / sum(r["core_seconds"] for r in rows))


def judge(rows: Rows) -> Bars:
    """Compare with what the project promises."""
    bars: Bars = {}
    own = [row for row in rows if row["app"] == "ours"]
    vit = steady(rows, "ours", "vit-tiny")
    if vit:
        bars["vit-tiny, share of core-seconds in private steps"] = bar(
            share(vit), _VIT_BAR, at_least=True
        )
    if own:
        most = max(row["backbone_loads"] for row in own)
        bars["backbone loads per process and run, most"] = bar(most, 1, at_least=False)
        fewest = min(row["backbone_loads"] for row in own)
        bars["backbone loads per process and run, fewest"] = bar(fewest, 1, at_least=True)
    return bars


def table(rows: Rows, bars: Bars) -> str:
    """A line per app and federation in Markdown, then the bars."""
    lines = [
        "| federation | app | rounds | round, s | core-s | in steps, s | of it CPU, s "
        "| share in steps | from, to | model, s | data, s | noise calibration, s "
        "| first round, s | workers x threads | backbone loads |",
        "|" + "---|" * 15,
    ]
    runs = dict.fromkeys((row["federation"], row["app"]) for row in rows)
    for name, app in runs:
        of = steady(rows, app, name)
        first = next(r for r in rows if r["app"] == app and r["federation"] == name)

        def middle(key: str, of: Rows = of) -> float:
            return float(statistics.median(row[key] for row in of))

        shares = [share([row]) for row in of]
        lines.append(
            f"| {name} | {app} | {len(of)} | {middle('seconds'):.2f} "
            f"| {middle('core_seconds'):.2f} | {middle('steps_seconds'):.2f} "
            f"| {middle('steps_cpu_seconds'):.2f} "
            f"| {share(of):.3f} | {min(shares):.3f}, {max(shares):.3f} "
            f"| {middle('session_seconds'):.2f} | {middle('records_seconds'):.2f} "
            f"| {middle('calibration_seconds'):.2f} | {first['seconds']:.2f} "
            f"| {of[-1]['workers']} x {of[-1]['threads']} | {of[-1]['backbone_loads']} |"
        )
    return page(lines, bars)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bar fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_efficiency")
    parser.add_argument("--federations", nargs="*", choices=["demo", "vit-tiny"], metavar="NAME")
    parser.add_argument("--apps", nargs="*", default=["ours", "naive"], choices=["ours", "naive"])
    parser.add_argument("--rounds", type=int, default=5, help="of vit-tiny (default: 5)")
    parser.add_argument("--local-steps", type=int, default=6, help="of vit-tiny (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="public seed (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(arguments)
    rows: Rows = []
    with tempfile.TemporaryDirectory() as place:
        write_vit_tiny(Path(place), options.seed)
        known = federations(Path(place), options.rounds, options.local_steps)
        for name in options.federations or list(known):
            digests = {}
            for app in options.apps:
                measured, digests[app] = measure(app, name, known[name], options.seed)
                rows += measured
                progress(f"{name}, {app}: {share(steady(rows, app, name)):.3f} in private steps")
            if len(set(digests.values())) > 1:
                print(f"{name}: the apps ended with different adapters", file=sys.stderr)
                return 1
    return finish(rows, judge(rows), as_json=options.json, table=table)


if __name__ == "__main__":
    sys.exit(main())
