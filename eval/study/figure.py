"""A study's figure: what each arm of a setting gained and forgot."""

import io
from collections.abc import Sequence
from typing import Any

from corda_eval.study.frontier import BASELINE, Run, Spread, num_rising, pareto, points_by_rate

Point = tuple[Spread, Spread]
"""Gain and forgetting of an arm at one rate."""


def draw(setting: str, runs: Sequence[Run], base: Run) -> bytes:
    """Return a figure (PNG): what each arm gained and forgot, a line over its rates, and the frontier of all.

    Points are means over the seeds, bars from the lowest to the highest; LoRA is black, arms of one seed are pale. A line ends where the
    gain is largest; points without one are of higher rates, at which the arm learns less again.
    """
    # Imported here: it belongs to the extra `demo`.
    from matplotlib.figure import Figure

    arms = [arm for arm in dict.fromkeys(run.arm for run in runs) if arm != base.arm]
    figure = Figure(figsize=(9, max(5.5, 0.2 * len(arms) + 1)), layout="constrained")  # as high as its legend
    axes = figure.subplots()
    means = []
    for number, arm in enumerate(arms):
        of_arm = [run for run in runs if run.arm == arm]
        points = points_by_rate(of_arm, base)
        if not points:
            continue
        means += [(gain[0], lost[0]) for gain, lost in points]
        # What all are held against stands out, and what one run alone shows steps back.
        color, strength = ("black", 1.0) if arm == BASELINE else (f"C{number % 10}", 0.8 if any(run.seed for run in of_arm) else 0.4)
        style = {"color": color, "linewidth": 2.0 if arm == BASELINE else 0.8}
        marker, end = "osD^v<>pX*"[number // 10 % 10 * 3 % 10], num_rising(points)
        _points(axes, points[:end], fmt=f"-{marker}", alpha=strength, label=as_plain(arm), **style)
        _points(axes, points[end:], fmt=marker, alpha=strength / 4, label=None, **style)
    axes.plot(*zip(*pareto(means), strict=True), color="black", linewidth=2, alpha=0.25, label="frontier", zorder=0)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set(xlabel="gain: fall of the loss of what is learned, nats", ylabel="forgetting: mean rise of the kept losses, nats")
    axes.set(title=as_plain(setting), xlim=(max(0.0, axes.get_xlim()[0]), None), ylim=(-0.001, None))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _points(axes: Any, points: Sequence[Point], **style: Any) -> None:
    gains, losses = [gain for gain, _ in points], [lost for _, lost in points]
    bars = {"xerr": _bars(gains), "yerr": _bars(losses), "elinewidth": 1.2}
    axes.errorbar([mean for mean, _, _ in gains], [mean for mean, _, _ in losses], markersize=5, **bars, **style)


def _bars(values: Sequence[Spread]) -> tuple[list[float], list[float]]:
    """Return how far below and above the means the lowest and the highest are."""
    return [mean - low for mean, low, _ in values], [high - mean for mean, _, high in values]


def as_plain(name: str) -> str:
    """Return a name as matplotlib shows it, for which a dollar begins a formula."""
    return name.replace("$", r"\$")
