"""The pictures of `corda_vlm.plan_report`, which imports this file when it needs matplotlib."""

from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator

from corda_core import AdapterInit
from corda_vlm.plots import STYLE, embed, log_scale, panel
from corda_vlm.report import BASE_COLOR, METHOD_COLORS

SHADE = "#f3c969"


def heat_map(grid: dict[str, Any]) -> str:
    """``data:`` address of a map of one value, projections by blocks."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(0.9 + 0.26 * len(grid["rows"]), width=max(4.2, 1.8 + 0.2 * len(grid["columns"])))
        values = [[float("nan") if value is None else value for value in row] for row in grid["values"]]
        image = axes.imshow(values, aspect="auto", cmap="cividis")
        axes.set_yticks(range(len(grid["rows"])), grid["rows"])
        step = max(1, len(grid["columns"]) // 10)
        axes.set_xticks(range(0, len(grid["columns"]), step), [str(column) for column in grid["columns"][::step]])
        axes.set_xlabel("block")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        known = [value for row in grid["values"] for value in row if value is not None]
        whole = all(value == int(value) for value in known)
        figure.colorbar(image, ax=axes, pad=0.02, ticks=MaxNLocator(integer=whole))
        return embed(figure)


def spectra(init: AdapterInit) -> str:
    """``data:`` address of the spectra of one layer: the chosen candidate's strong, the others faint, the trained components shaded."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(2.1, width=3.5)
        axes.axvspan(init.components.start, init.components.stop, color=SHADE, linewidth=0)
        for place, one in enumerate(init.candidates):
            if place != init.chosen:
                axes.plot(one.spectrum / one.spectrum[0], color=BASE_COLOR, linewidth=0.8)
        chosen = init.candidates[init.chosen].spectrum
        axes.plot(chosen / chosen[0], color=METHOD_COLORS["kpm_strict"], linewidth=1.8)
        log_scale(axes)
        axes.set_ylim(1e-9, 2)
        axes.set_xlim(0, len(chosen))
        axes.set(xlabel="component, largest first", ylabel="singular value")
        return embed(figure)
