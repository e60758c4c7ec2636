"""The pictures of `corda_vlm.report`, which imports this file when it needs matplotlib.

Every panel is an SVG of its own, about as wide as a phone: the page puts them side by side on a wide screen and under each
other on a narrow one, and their text is neither tiny there nor huge here.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from math import isfinite
from textwrap import fill, shorten
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from corda_vlm.report import BASE, BASE_COLOR, METHOD_COLORS, Cell, compare, format_change, format_score, method_colors, ordered_tasks

INK, MUTED, GRID, LINE = "#1c2430", "#5b6675", "#e3e7ec", "#b8c0ca"
VERDICT_COLORS = {"better": "#00694f", "worse": "#b5390a"}
SHADE = "#f3c969"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # a "$" in a label is a "$"
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "corda-vlm",  # equal summaries give equal bytes
}
SPECTRUM_FLOOR = 1e-6  # relative to the largest; below it float32 singular values are noise
LEAST_SCALE = {"%": 5.0, "": 0.5}  # a loss of a tenth of a point must not fill the headline


def panels(summary: Mapping[str, Any]) -> dict[str, Any]:
    """``data:`` addresses of the plots: ``scores`` by task, ``losses`` (None without curves), ``spectra`` by layer."""
    layers = summary["decomposition"]["layers"] if summary.get("decomposition") else {}
    with matplotlib.rc_context(STYLE):
        return {
            "scores": {task: embed(_scores(summary, task)) for task in summary["tasks"]},
            "losses": embed(_losses(summary)) if any(m.get("losses") for m in summary["methods"].values()) else None,
            "spectra": {name: embed(_spectrum(layer)) for name, layer in layers.items()},
        }


def headline(summary: Mapping[str, Any]) -> bytes:
    """A PNG of 1200 x 500 pixels: bars of the gain on the target and of the loss on each kept task, one row per method."""
    with matplotlib.rc_context(STYLE):
        return _save(_headline(summary), "png")


def _save(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=100, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def embed(figure: Figure) -> str:
    """``data:`` address of a figure."""
    return "data:image/svg+xml;base64," + base64.b64encode(_save(figure, "svg")).decode()


def panel(height: float, width: float = 4.2) -> tuple[Figure, Axes]:
    """A figure of this size in inches and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _scores(summary: Mapping[str, Any], task: str) -> Figure:
    """One bar per method, a dashed line at the base, whiskers for the interval of the change."""
    unit, methods, colors = summary["tasks"][task]["unit"], summary["methods"], method_colors(summary["methods"])
    before = methods[BASE]["scores"].get(task)
    cells = {method: compare(summary, method, task) for method in methods}
    heights = [cell.score if cell.score is not None and isfinite(cell.score) else 0.0 for cell in cells.values()]
    figure, axes = panel(0.4 + 0.3 * len(cells))
    axes.barh(range(len(cells)), heights, color=[colors[method] for method in cells], height=0.66)
    if before is not None:
        axes.axvline(before, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    for row, cell in enumerate(cells.values()):
        if cell.interval and before is not None:
            axes.plot([before + bound for bound in cell.interval], [row, row], color=INK, linewidth=1.2, solid_capstyle="butt")
        score = format_score(cell.score, unit)
        axes.text(1.02, row, score, transform=axes.get_yaxis_transform(), va="center", fontweight="bold")
    axes.set_yticks(range(len(cells)), [methods[method]["label"] for method in cells], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 100 if unit == "%" else 1.1 * max(heights) or 1.0)
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def _losses(summary: Mapping[str, Any]) -> Figure:
    figure, axes = panel(2.5)
    colors = method_colors(summary["methods"])
    for method, info in summary["methods"].items():
        if info.get("losses"):
            steps, losses = zip(*info["losses"], strict=True)
            axes.plot(steps, losses, color=colors[method], linewidth=0.8, alpha=0.3)
            axes.plot(steps, _running_mean(losses, len(losses) // 12), color=colors[method], linewidth=1.8, label=info["label"])
    log_scale(axes)
    axes.set(xlabel="training step", ylabel="training loss")
    axes.legend(frameon=False)
    return figure


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean over `reach` neighbours on either side, fewer at the ends."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _spectrum(layer: Mapping[str, Any]) -> Figure:
    figure, axes = panel(2.1, width=3.5)
    first, last = layer["chosen"]
    axes.axvspan(first, last, color=SHADE, linewidth=0)
    axes.plot(layer["without_context"], color=BASE_COLOR, linewidth=1.6, linestyle=(0, (4, 2)), label="without context")
    axes.plot(layer["with_context"], color=METHOD_COLORS["kpm_strict"], linewidth=1.8, label="with context")
    log_scale(axes)
    axes.set_ylim(SPECTRUM_FLOOR, 2)
    axes.set_xlim(0, max(len(layer["with_context"]), last))
    axes.set(xlabel="component, largest first", ylabel="singular value")
    axes.legend(frameon=False, loc="lower left")
    return figure


def log_scale(axes: Axes) -> None:
    """A log axis with plain numbers: its usual labels are formulas, which `STYLE` does not parse."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.grid(axis="y")


def _headline(summary: Mapping[str, Any]) -> Figure:
    tasks = ordered_tasks(summary)
    methods = [method for method in summary["methods"] if method != BASE]
    cells = {task: [compare(summary, method, task) for method in methods] for task in tasks}
    figure = Figure(figsize=(12, 5), facecolor="white")
    grid = {"left": 0.185, "right": 0.985, "top": 0.64, "bottom": 0.1, "wspace": 0.14}
    ratios = [1.5 if info["role"] == "target" else 1.0 for info in tasks.values()]
    columns = figure.subplots(1, len(tasks), squeeze=False, width_ratios=ratios, gridspec_kw=grid)[0]
    colors = method_colors(methods)
    for axes, (task, info) in zip(columns, tasks.items(), strict=True):
        same_kind = [key for key, other in tasks.items() if (other["role"], other["unit"]) == (info["role"], info["unit"])]
        _headline_bars(axes, cells[task], [colors[method] for method in methods], info)
        _headline_scale(axes, [cell for key in same_kind for cell in cells[key]], info)
        _headline_heading(axes, info, compare(summary, BASE, task), scale=min(1.0, 4 / len(tasks)))
        axes.set_ylim(len(methods) - 0.4, -0.6)
    labels = [fill(summary["methods"][method]["label"], 18) for method in methods]
    columns[0].set_yticks(range(len(methods)), labels, fontsize=16, color=INK)
    for role in ("target", "kept"):
        _headline_role(figure, [axes for axes, info in zip(columns, tasks.values(), strict=True) if info["role"] == role], role)
    targets = " and ".join(info["label"] for info in tasks.values() if info["role"] == "target")
    figure.text(0.02, 0.945, f"Fine-tuned on: {targets}", fontsize=21, fontweight="bold", va="center")
    lower = "".join(
        dict.fromkeys(f" {info['metric'].capitalize()}: lower is better." for info in tasks.values() if not info["higher_is_better"])
    )
    intervals = " Thin lines: 95% interval." if any(cell.interval for column in cells.values() for cell in column) else ""
    note = f"Change against the base model {summary['base']['name']}.{intervals}{lower}"
    figure.text(0.02, 0.04, note, fontsize=11, color=MUTED, va="center")
    return figure


def _direction(info: Mapping[str, Any]) -> int:
    """The sign that makes positive what a column of the headline is about: a gain on the target, a loss on a kept task."""
    return 1 if (info["role"] == "target") == info["higher_is_better"] else -1


def _headline_bars(axes: Axes, cells: list[Cell], colors: list[str], info: Mapping[str, Any]) -> None:
    direction = _direction(info)
    for row, (cell, color) in enumerate(zip(cells, colors, strict=True)):
        length = direction * (cell.change or 0.0)
        ends = [direction * bound for bound in cell.interval or ()]
        axes.barh(row, length, color=color, height=0.6)
        if ends:
            axes.plot(ends, [row, row], color=INK, linewidth=1.6, solid_capstyle="butt")
        text = format_change(cell.change, info["unit"])
        style: dict[str, Any] = {"fontsize": 17, "fontweight": "bold", "color": VERDICT_COLORS.get(cell.verdict, MUTED)}
        axes.annotate(text, (max([0.0, length, *ends]), row), (8, 0), textcoords="offset points", va="center", **style)


def _headline_scale(axes: Axes, cells: list[Cell], info: Mapping[str, Any]) -> None:
    """The same scale for all columns of one role and unit, with room for the numbers."""
    bounds = [_direction(info) * bound for cell in cells for bound in (cell.change or 0.0, *(cell.interval or ()))]
    longest, shortest = max([*bounds, LEAST_SCALE.get(info["unit"], 0.0)]), min([*bounds, 0.0])
    room = (0.35 if info["role"] == "target" else 0.62) * (longest - shortest)
    axes.set_xlim(shortest, longest + room)
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0, pad=10)
    axes.spines[["left", "bottom"]].set_visible(False)


def _headline_heading(axes: Axes, info: Mapping[str, Any], before: Cell, scale: float) -> None:
    unit = f"points of {info['metric']}" if info["unit"] == "%" else info["metric"]
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "center"}
    label = shorten(info["label"], 26 if info["role"] == "target" else 18, placeholder="…")
    axes.text(0, 1.205, label, fontsize=16 * scale, fontweight="bold", **place)
    axes.text(0, 1.09, f"{unit}, was {format_score(before.score, info['unit'])}", fontsize=11 * scale, color=MUTED, **place)


def _headline_role(figure: Figure, columns: list[Axes], role: str) -> None:
    """A word and a rule over the columns of one role."""
    if not columns:
        return
    word, color = ("LEARNED", VERDICT_COLORS["better"]) if role == "target" else ("FORGOTTEN", VERDICT_COLORS["worse"])
    left, right = columns[0].get_position().x0, columns[-1].get_position().x1
    figure.text(left, 0.845, word, fontsize=12, fontweight="bold", color=color, va="center")
    figure.add_artist(Line2D([left, right], [0.81, 0.81], color=color, linewidth=1.5))
