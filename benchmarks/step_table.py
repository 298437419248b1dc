"""The tables of ``python -m benchmarks.private_step``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .report import Bars, Rows, markdown, page
from .step_memory import ALLOCATORS

# Published ratios of LA-LoRA's steps in turn over DP-LoRA's on both factors.
CLAIMED = "0.57 / 0.5"
_RATIOS = ("peft_both", "peft_same", "opacus_same", "floor")
_OVER = ("over peft both", "over peft, same set", "over opacus, same set")


def table(rows: Rows, bars: Bars) -> str:
    """Time, memory, steps in turn and checks in Markdown, then the bars."""
    first = rows[0]
    text = [f"Batch {first['batch']}, {first['dtype']} on {first['device']}.", ""]
    text += ["Time of a whole step: median, ratios within repetitions with their quartiles.", ""]
    text += markdown(
        ("model", "arm", "ms", *_OVER, "over floor"),
        [
            [row["model"], row["arm"], f"{row['ms']:,.1f}", *(_ratio(row, key) for key in _RATIOS)]
            for row in _of(rows, "time")
        ],
    )
    text += ["", *_memory(_of(rows, "memory"))]
    text += ["", "Steps on B and A in turn (LA-LoRA) over steps on both (DP-LoRA).", ""]
    text += markdown(
        ("model", "steps", "what", "in turn over both", "papers' claims"),
        [
            [
                row["model"],
                row["side"],
                row["what"],
                _value(row, "over_both"),
                CLAIMED if row["side"] == "private" else "",
            ]
            for row in _of(rows, "alternation")
        ],
    )
    text += ["", *_checks(rows)]
    return page(text, bars)


def _memory(rows: Rows) -> list[str]:
    told = ALLOCATORS[rows[0]["allocator"]].items()
    settings = " ".join(f"{name}={value}" for name, value in told) or "the usual allocator"
    resident = any("rss_mb" in row for row in rows)
    kinds = {"rss": "peak RSS", "live": "live tensors"} if resident else {"live": "allocated"}
    header = ["model", "arm"]
    for what in kinds.values():
        header += [f"{what}, MB", *(f"{what} {over}" for over in _OVER)]
    lines = [
        [
            row["model"],
            row["arm"],
            *(cell for kind in kinds for cell in _memory_cells(row, kind)),
        ]
        for row in rows
    ]
    said = "Peak memory of a step beyond model and batch, each arm in a process of its own"
    return [f"{said} ({settings})." if resident else f"{said}.", "", *markdown(header, lines)]


def _memory_cells(row: dict[str, Any], kind: str) -> Sequence[str]:
    ratios = (row.get(f"{kind}_over_{key}") for key in _RATIOS[:3])
    return [
        f"{row[f'{kind}_mb']:,.1f}",
        *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
    ]


def _checks(rows: Rows) -> list[str]:
    text = []
    for kind in ("unclipped", "clipped"):
        of = [row for row in _of(rows, "check") if f", {kind}" in row["check"]]
        worst = max(of, key=lambda row: row["error"])
        text.append(
            f"Sums that were compared, {kind}: {len(of)}, largest relative difference "
            f"{worst['error']:.2g} ({worst['model']}: {worst['check']}), limit {worst['limit']:g}."
        )
    return text


def _of(rows: Rows, kind: str) -> Rows:
    return [row for row in rows if row["kind"] == kind]


def _ratio(row: dict[str, Any], key: str) -> str:
    return _value(row, f"over_{key}") if f"over_{key}" in row else ""


def _value(row: dict[str, Any], key: str) -> str:
    """A ratio, with its quartiles where it was measured more than once."""
    if f"{key}_low" not in row:
        return f"{row[key]:.3f}"
    return f"{row[key]:.3f} ({row[f'{key}_low']:.3f} to {row[f'{key}_high']:.3f})"
