"""The picture of the demo: what each method learned on the target beside what it lost on each kept task."""

import io
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from corda_eval.suite.comparison import Row
from corda_eval.suite.page import score, signed, verdict
from corda_vlm.pages import BETTER, COLORS, INK, MUTED, STYLE, WORSE

TITLES = {"digits": "Handwritten digits", "easy_vqa": "easy-VQA", "facts": "Facts", "perplexity": "Technical English"}
VERDICT_COLORS = {"better": BETTER, "worse": WORSE, "": MUTED}
ROLES = {"target": ("LEARNED", BETTER), "kept": ("FORGOTTEN", WORSE)}


def headline(rows: Mapping[str, Sequence[Row]], base: str) -> bytes:
    """Return a PNG of 1200 x 500 pixels: bars of the gain on the target and of the loss on each kept task, a line a method.

    Args:
        rows: By method, those of the same tasks, targets first.
        base: What the base is called.
    """
    # Imported here: it belongs to the extra `demo`.
    import matplotlib
    from matplotlib.figure import Figure

    tasks = list(zip(*rows.values(), strict=True))
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5), facecolor="white")
        grid = {"left": 0.185, "right": 0.985, "top": 0.64, "bottom": 0.1, "wspace": 0.14}
        widths = [1.5 if task[0].role == "target" else 1.0 for task in tasks]
        columns = figure.subplots(1, len(tasks), squeeze=False, width_ratios=widths, gridspec_kw=grid)[0]
        for axes, task in zip(columns, tasks, strict=True):
            _bars(axes, task)
            _scale(axes, [row for other in tasks for row in other if _unit(other[0]) == _unit(task[0])])
            _heading(axes, task[0])
        columns[0].set_yticks(range(len(rows)), [fill(method, 18) for method in rows], fontsize=16, color=INK)
        for role in ROLES:
            _role(figure, [axes for axes, task in zip(columns, tasks, strict=True) if task[0].role == role], role)
        taught = " and ".join(TITLES[task[0].task] for task in tasks if task[0].role == "target")
        figure.text(0.02, 0.945, f"Fine-tuned on: {taught}", fontsize=21, fontweight="bold", va="center")
        note = f"Change against {base}: points of percent, or of perplexity, where lower is better. Thin lines: 95 % interval."
        figure.text(0.02, 0.04, note, fontsize=11, color=MUTED, va="center")
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _unit(row: Row) -> tuple[str, bool]:
    """Return what the columns of one scale share."""
    return row.role, row.higher_is_better


def _lengths(row: Row) -> tuple[float, tuple[float, ...]]:
    """Return a bar's length and its interval's ends: a gain on a target and a loss on a kept task are positive."""
    unit = 100 if row.higher_is_better else 1
    sign = unit if (row.role == "target") == row.higher_is_better else -unit
    return sign * (row.after - row.before), tuple(sign * bound for bound in row.interval or ())


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    for place, (row, color) in enumerate(zip(rows, COLORS, strict=False)):
        length, ends = _lengths(row)
        axes.barh(place, length, color=color, height=0.6)
        if ends:
            axes.plot(ends, [place, place], color=INK, linewidth=1.6, solid_capstyle="butt")
        text, at = signed(row.after - row.before, row), (max(0.0, length, *ends), place)
        style: dict[str, Any] = {"fontsize": 17, "fontweight": "bold", "color": VERDICT_COLORS[verdict(row)]}
        axes.annotate(text, at, (8, 0), textcoords="offset points", va="center", **style)
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _scale(axes: Any, rows: Sequence[Row]) -> None:
    """Set the scale that all columns of one role and unit have, with room for the numbers."""
    bounds = [bound for row in rows for length, ends in [_lengths(row)] for bound in (length, *ends)]
    least = 5.0 if rows[0].higher_is_better else 0.5  # a loss of a tenth of a point must not fill the picture
    longest, shortest = max(*bounds, least), min(*bounds, 0.0)
    room = (0.35 if rows[0].role == "target" else 0.62) * (longest - shortest)
    axes.set_xlim(shortest, longest + room)
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0, pad=10)
    axes.spines[["left", "bottom"]].set_visible(False)


def _heading(axes: Any, row: Row) -> None:
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "center"}
    metric = "accuracy" if row.higher_is_better else "perplexity"
    axes.text(0, 1.205, TITLES[row.task], fontsize=14, fontweight="bold", **place)
    axes.text(0, 1.09, f"{metric}, was {score(row.before, row)}", fontsize=11, color=MUTED, **place)


def _role(figure: Any, columns: Sequence[Any], role: str) -> None:
    """Write a word and draw a rule over the columns of one role."""
    from matplotlib.lines import Line2D

    word, color = ROLES[role]
    left, right = columns[0].get_position().x0, columns[-1].get_position().x1
    figure.text(left, 0.845, word, fontsize=12, fontweight="bold", color=color, va="center")
    figure.add_artist(Line2D([left, right], [0.81, 0.81], color=color, linewidth=1.5))
