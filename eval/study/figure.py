"""A study's figures: what each arm of a setting gained and forgot, and what its forgetting has to do with how far it moved."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from corda_eval.study.frontier import BASELINE, Run, Spread, between, by_arm, curve_of, forgetting_of, gain_on_test, spread
from corda_eval.study.reading import FRACTIONS, RESOLUTION, ArmReading
from corda_eval.study.sizes import Sized
from corda_vlm.pages import COLORS, INK, LINE, MUTED, STYLE

MOST_NAMED = 6
DEFAULTS: tuple[Mapping[str, Any], ...] = (
    {"method": "corda", "protect": "strict"},
    {"method": "keep", "adapter": {"method": "lora"}},
)
"""What the package does if nothing is said, as methods without their ranks."""
NAMED_COLORS = tuple(COLORS[number] for number in (2, 5, 3, 4, 0))
LABEL_HEIGHT = 0.052
"""Of a panel's height: as near as two labels may be."""


def arms_to_name(runs: Sequence[Run], readings: Mapping[str, ArmReading]) -> list[str]:
    """Return the arms whose curves have names: LoRA, the package's defaults, then those that forget least at LoRA's gain.

    At most ``MOST_NAMED``; in the order of the readings. Interpolations with the base and arms that learn less than 90 % are not named.
    """
    methods = {run.arm: _without_ranks(run.result["spec"]["method"]) for run in runs if run.result["spec"]["method"]}
    able = [arm for arm, reading in readings.items() if between(arm) is None and reading.learned >= FRACTIONS[1]]
    first = [arm for arm in able if arm == BASELINE or methods.get(arm) in DEFAULTS]
    chosen = dict.fromkeys([BASELINE, *first, *able])
    return sorted(list(chosen)[:MOST_NAMED], key=list(readings).index)


def _without_ranks(method: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _without_ranks(value) if isinstance(value, Mapping) else value for key, value in method.items() if key != "rank"}


def draw(setting: str, runs: Sequence[Run], base: Run, named: Sequence[str], gain: float) -> bytes:
    """Return a figure (PNG): forgetting against gain, a line over each arm's rates up to its largest gain.

    Named curves have colours, bars from the lowest to the highest seed and a label at the right; LoRA is black; all others are grey.
    Forgetting below ``RESOLUTION`` is drawn there. An upright line stands at LoRA's gain.
    """
    # Imported here: it belongs to the extra `demo`.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.5), facecolor="white")
        axes = figure.subplots(gridspec_kw={"left": 0.09, "right": 0.78, "top": 0.92, "bottom": 0.11})
        ends = {}
        for arm, of_arm in by_arm(runs).items():
            points = [
                (spread([gain_on_test(run, base) for run in seeds]), spread([_lost(run, base) for run in seeds]))
                for seeds in curve_of(of_arm, base).runs
            ]
            if points:
                _curve(axes, points, colours(named).get(arm), faint=between(arm) is not None)
                ends[arm] = (points[-1][0][0], points[-1][1][0])
        axes.axvline(gain, color=MUTED, linewidth=0.8, linestyle=":", zorder=0)
        axes.text(gain, 1.01, "LoRA's gain", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color=MUTED)
        lowest = min(gain_on_test(run, base) for run in runs if run.arm != base.arm and not run.diverged)
        axes.set(yscale="log", xlim=(0 if lowest < gain / 2 else lowest - gain / 20, None))
        axes.set(xlabel="gain: fall of the loss of what is learned, nats (test)", ylabel="forgetting: mean rise of the kept losses, nats")
        _plain_ticks(axes.yaxis, "{:g}")
        _labels(axes, {arm: ends[arm] for arm in named if arm in ends}, named)
        figure.text(0.09, 0.965, setting, fontsize=13, fontweight="bold", va="center")
        return _as_png(figure)


def draw_sizes(setting: str, sized: Sequence[Sized], named: Sequence[str]) -> bytes:
    """Return a figure (PNG): forgetting against each measure of size, a point a run, and the line through LoRA's."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6), facecolor="white")
        grid = {"left": 0.09, "right": 0.78, "top": 0.9, "bottom": 0.13, "wspace": 0.12}
        panels = figure.subplots(1, len(sized), squeeze=False, sharey=True, gridspec_kw=grid)[0]
        for axes, one in zip(panels, sized, strict=True):
            for arm, points in one.points.items():
                style = colours(named).get(arm, {"color": LINE, "zorder": 1})
                axes.scatter(*zip(*((size, max(RESOLUTION, lost)) for size, lost in points), strict=True), s=16, linewidth=0, **style)
            _through_lora(axes, one)
            axes.set(xscale="log", yscale="log", xlabel=f"{one.measure}, {one.unit}")
            _plain_ticks(axes.xaxis, "{:g}")
        panels[0].set_ylabel("forgetting, nats")
        _plain_ticks(panels[0].yaxis, "{:g}")
        last = sized[-1].points
        _labels(panels[-1], {arm: _middle(last[arm]) for arm in named if arm in last}, named)
        figure.text(0.09, 0.955, f"{setting}: forgetting and the size of the change", fontsize=13, fontweight="bold", va="center")
        return _as_png(figure)


def colours(named: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return how named arms are drawn: LoRA in ink, the others each in a colour, in front of the grey."""
    others = [arm for arm in named if arm != BASELINE]
    return {
        BASELINE: {"color": INK, "zorder": 3},
        **{arm: {"color": color, "zorder": 4} for arm, color in zip(others, NAMED_COLORS, strict=False)},
    }


def _lost(run: Run, base: Run) -> float:
    return max(RESOLUTION, forgetting_of(run.result["scores"], base))


def _curve(axes: Any, points: Sequence[tuple[Spread, Spread]], style: Mapping[str, Any] | None, faint: bool) -> None:
    """Draw an arm's means by rate: with bars from the lowest to the highest seed if it has a style, thin and grey if not."""
    gains, losses = ([values[place][0] for values in points] for place in (0, 1))
    if style is None:
        axes.plot(gains, losses, "-o", markersize=2, linewidth=0.7, color=LINE, alpha=0.4 if faint else 1.0, zorder=1)
        return
    bars = [[(middle - low, high - middle) for middle, low, high in (values[place] for values in points)] for place in (0, 1)]
    across, upright = (tuple(zip(*pairs, strict=True)) for pairs in bars)
    axes.errorbar(gains, losses, xerr=across, yerr=upright, fmt="-o", markersize=4.5, linewidth=1.8, elinewidth=1.0, **style)


def _plain_ticks(axis: Any, form: str) -> None:
    """Write a logarithmic axis's numbers as text, for which the page's style wants no formulas; 1, 2 and 5 where a decade fills it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))
    axis.set_minor_formatter(NullFormatter())


def _through_lora(axes: Any, sized: Sized) -> None:
    """Draw the line through LoRA's runs, as far as all runs go."""
    if sized.line is None:
        return
    sizes = [size for points in sized.points.values() for size, _ in points]
    ends = [min(sizes), max(sizes)]
    slope, intercept = sized.line
    axes.plot(ends, [math.exp(intercept + slope * math.log(size)) for size in ends], color=INK, linewidth=0.9, linestyle="--", zorder=2)
    lost = [max(RESOLUTION, lost) for points in sized.points.values() for _, lost in points]
    axes.set_ylim(min(lost) / 1.6, max(lost) * 1.6)


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the point that half of an arm's runs forget more than."""
    ordered = sorted(points, key=lambda point: point[1])
    size, lost = ordered[len(ordered) // 2]
    return size, max(RESOLUTION, lost)


def _labels(axes: Any, ends: Mapping[str, tuple[float, float]], named: Sequence[str]) -> None:
    """Write names at the right of a panel, each as near to its curve's end as the others let it, and lead lines to them."""
    place = {arm: axes.transAxes.inverted().transform(axes.transData.transform(end)) for arm, end in ends.items()}
    heights = apart([place[arm][1] for arm in place], LABEL_HEIGHT)
    for (arm, (x, y)), height in zip(place.items(), heights, strict=True):
        style = colours(named)[arm]
        lead = {"transform": axes.transAxes, "clip_on": False, "linewidth": 0.6, "alpha": 0.6}
        axes.plot([x, 1.0, 1.02], [y, height, height], **lead, **style)
        axes.text(1.03, height, arm, transform=axes.transAxes, va="center", fontsize=10, color=style["color"])


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Return heights that are at least ``least`` apart, in the same order and near to those given; within 0 to 1 where there is room."""
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    placed = [min(max(heights[number], 0.0), 1.0) for number in order]
    for number in range(1, len(placed)):
        placed[number] = max(placed[number], placed[number - 1] + least)
    ceiling = 1.0
    for number in reversed(range(len(placed))):
        placed[number] = min(placed[number], ceiling)
        ceiling = placed[number] - least
    return [placed[order.index(number)] for number in range(len(heights))]


def _as_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
