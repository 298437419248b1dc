"""The attacks' results as text, and the figure of what the search for pixels found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .attack_site import LEVELS, TRAINED
from .report import Bars, Rows, markdown, page


def table(rows: Rows, bars: Bars) -> str:
    """A table per attack in Markdown, then the bars."""
    lines = ["### Membership inference", "", *_membership(rows)]
    lines += ["", "### Which of the candidates", "", *_identification(rows)]
    lines += ["", "### Layer inputs by algebra", "", *_layer_inputs(rows)]
    lines += ["", "### Pixels by search", "", *_pixels(rows)]
    return page(lines, bars)


def _of(rows: Rows, attack: str) -> Rows:
    return [row for row in rows if row["attack"] == attack]


def _membership(rows: Rows) -> list[str]:
    lines = []
    for row in _of(rows, "membership"):
        points = {point["fpr"]: point for point in row["points"]}
        cells = [
            row["trained"],
            row["level"],
            str(row["rounds"]),
            row["attacker"],
            f"{row['worlds'][0]} + {row['worlds'][1]}",
            f"{row['auc']:.3f} [{row['auc_low']:.3f}, {row['auc_high']:.3f}]",
            _bound(row, row["auc_bound"], ".3f"),
        ]
        for fpr in (0.01, 0.001):
            point = points[fpr]
            # A few worlds resolve no small rate: then the rate is said, and the bound is there.
            place = f" at {point['fpr_resolved']:.1%}" if point["fpr_resolved"] > 1.5 * fpr else ""
            limits = f"[{point['tpr_low']:.1%}, {point['tpr_high']:.1%}]"
            cells.append(f"{point['tpr']:.1%} {limits}{place}")
            high = _bound(row, point["bound_high"], ".1%")
            cells.append(
                f"{_bound(row, point['bound'], '.1%')}; {high}" if high != "none" else high
            )
        lines.append(cells)
    header = ["trained", "privacy", "rounds", "attacker", "tests, in + out", "AUC", "bound"]
    header += ["TPR at 1 % FPR", "bound; upper", "TPR at 0.1 % FPR", "bound; upper"]
    return markdown(header, lines)


def _bound(row: dict[str, Any], value: float, form: str) -> str:
    return "none" if LEVELS[row["level"]] is None else f"{value:{form}}"


def _identification(rows: Rows) -> list[str]:
    lines = [
        [
            row["trained"],
            row["level"],
            "none" if row["level"] == "none" else f"{row['max_grad_norm']:g}",
            f"{row['noise_multiplier']:.2f}",
            f"{row['trials']}",
            f"{row['rate']:.1%} [{row['low']:.1%}, {row['high']:.1%}]",
            _bound(row, row["bound"], ".1%"),
        ]
        for row in _of(rows, "identification")
    ]
    header = ["trained", "privacy", "C", "noise multiplier", "updates", "identified", "bound"]
    return markdown(header, lines)


def _layer_inputs(rows: Rows) -> list[str]:
    lines = [
        [
            row["trained"],
            row["shows"],
            f"{row['numbers']}",
            row["level"],
            f"{row['cosine'][1]:.4f} [{row['cosine'][0]:.4f}, {row['cosine'][2]:.4f}]",
            f"{row['chance']:.2f}",
            f"{row['identified']:.0%}",
        ]
        for row in _of(rows, "layer input")
    ]
    header = ["trained", "shows", "numbers", "privacy", "cosine", "by chance", "identified"]
    return markdown(header, lines)


def _pixels(rows: Rows) -> list[str]:
    lines = [
        [
            row["trained"],
            row["level"],
            f"{row['psnr'][1]:.1f} [{row['psnr'][0]:.1f}, {row['psnr'][2]:.1f}]",
            f"{row['ssim'][1]:.2f} [{row['ssim'][0]:.2f}, {row['ssim'][2]:.2f}]",
            f"{row['nearest']} of {row['records']}",
        ]
        for row in _of(rows, "pixels")
        if "psnr" in row
    ]
    header = ["trained", "privacy", "PSNR, dB", "SSIM", "nearest is the original"]
    return markdown(header, lines)


def draw_figure(rows: Rows, path: Path) -> None:
    """Draw reconstructions: a row per level of privacy, a block of columns per trained set.

    The first row has the originals, the second what the label alone tells.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {(row["trained"], row["level"]): row["images"] for row in _of(rows, "pixels")}
    blocks = [name for name in TRAINED if (name, "none") in found]
    levels = [name for name in LEVELS if (blocks[0], name) in found]
    originals, reference = (found[("nothing", name)] for name in ("original", "the label alone"))
    lines = [("original", originals), ("label alone", reference)]
    count = len(originals)
    height, width = len(lines) + len(levels), len(blocks) * count
    figure = Figure(figsize=(0.9 + 0.33 * width, 0.3 + 0.36 * height), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, width, squeeze=False)
    for across, block in enumerate(blocks):
        shown = [*lines, *((level, found.get((block, level))) for level in levels)]
        for down, (name, images) in enumerate(shown):
            for number, image in enumerate(images or [None] * count):
                axis = axes[down][across * count + number]
                if image is None:  # this arm is not attacked
                    axis.set_axis_off()
                    continue
                axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                if across == number == 0:
                    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
                if down == number == 0:
                    axis.set_title(block, fontsize=7, loc="left")
    figure.subplots_adjust(0.9 / (0.9 + 0.33 * width), 0.01, 0.99, 0.9, 0.08, 0.08)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
