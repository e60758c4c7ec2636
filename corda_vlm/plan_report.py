"""What an adapter plan holds, as one self-contained page: ranks, compactness, chosen candidates and spectra, layer by layer."""

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corda_core import AdapterInit, AdapterPlan, Choice
from corda_core.files import write_whole
from corda_vlm.pages import COLORS, STYLE, address_of, page, require_extra

SHOWN_SPECTRA = 9
"""Layers whose spectra are drawn, spread over the plan."""
FAINT, STRONG, SHADE = "#8a929e", COLORS[2], "#f3c969"

Layers = Mapping[tuple[str, int], AdapterInit]
"""By projection and number of the block."""


def write_plan_report(plan: AdapterPlan, path: Path) -> None:
    """Write the page; a file already at ``path`` stays as it is unless the new page is complete.

    Raises:
        ModuleNotFoundError: If a package of the extra ``demo`` is missing; the text names it and the command that installs it.
    """
    require_extra()
    import matplotlib

    ranks = [init.rank for init in plan.layers.values()]
    budget = plan.provenance.get("budget")
    facts = [
        *([f"budget {budget:,}"] if budget else []),
        f"ranks {min(ranks)} … {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}",
        f"{len(plan.provenance.get('fallbacks', []))} layer(s) in which the exact solver had to help",
    ]
    names = [name for name, init in plan.layers.items() if init.choice is not None]
    count = min(SHOWN_SPECTRA, len(names))
    shown = [names[place * (len(names) - 1) // max(1, count - 1)] for place in range(count)]
    maps = _maps(plan)
    with matplotlib.rc_context(STYLE):
        values = {
            "layers": plan.layers,
            "facts": " · ".join(facts),
            "heat": {part: {title: _heat_map(layers, value) for title, value in maps.items()} for part, layers in _by_part(plan).items()},
            "spectra": {name: _spectra(plan.layers[name]) for name in dict.fromkeys(shown)},
        }
    title = f"Adapter plan: {plan.mode.upper()}, {plan.num_parameters:,} parameters in {len(ranks)} layers"
    write_whole(path, page("plan.html.j2", Path(__file__).parent, title, values, {}).encode())


def _maps(plan: AdapterPlan) -> dict[str, Callable[[AdapterInit], float]]:
    """Return what is shown of each layer, by title."""
    most_candidates = max(len(init.choice.candidates) if init.choice else 0 for init in plan.layers.values())
    maps: dict[str, Callable[[AdapterInit], float]] = {"rank": lambda init: init.rank}
    if most_candidates:
        maps["compactness log π (lower is more compact)"] = lambda init: _choice(init).best.log_pi
    if most_candidates > 1:
        maps["candidate chosen"] = lambda init: _choice(init).index + 1
    return maps


def _choice(init: AdapterInit) -> Choice:
    assert init.choice is not None, "only such layers are asked for"
    return init.choice


def _by_part(plan: AdapterPlan) -> dict[str, Layers]:
    """Return the layers by what comes before their block's number; those without a block have number 0."""
    parts: dict[str, dict[tuple[str, int], AdapterInit]] = {}
    for name, init in plan.layers.items():
        numbered = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
        part, number, projection = numbered.groups() if numbered else (*name.rpartition(".")[:1], "0", name.rpartition(".")[2])
        parts.setdefault(part or "model", {})[projection, int(number)] = init
    return dict(parts)


def _heat_map(layers: Layers, value: Callable[[AdapterInit], float]) -> str:
    """Return the address of a map of one value: projections down, blocks across."""
    from matplotlib.ticker import MaxNLocator

    rows = list(dict.fromkeys(projection for projection, _ in layers))
    columns = sorted({number for _, number in layers})
    known = {key: value(init) for key, init in layers.items()}
    figure, axes = _panel(max(4.2, 1.8 + 0.2 * len(columns)), 0.9 + 0.26 * len(rows))
    grid = [[known.get((row, column), float("nan")) for column in columns] for row in rows]
    image = axes.imshow(grid, aspect="auto", cmap="cividis")
    axes.set_yticks(range(len(rows)), rows)
    step = max(1, len(columns) // 10)
    axes.set_xticks(range(0, len(columns), step), [str(column) for column in columns[::step]])
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    whole = all(number == int(number) for number in known.values())
    figure.colorbar(image, ax=axes, pad=0.02, ticks=MaxNLocator(integer=whole))
    return _address(figure)


def _spectra(init: AdapterInit) -> str:
    """Return the address of one layer's spectra: the chosen candidate's strong, the others faint, the trained components shaded."""
    figure, axes = _panel(3.5, 2.1)
    axes.axvspan(init.components.start, init.components.stop, color=SHADE, linewidth=0)
    chosen = _choice(init).best
    for candidate in (*_choice(init).candidates, chosen):
        is_chosen = candidate is chosen
        axes.plot(candidate.spectrum / candidate.spectrum[0], color=STRONG if is_chosen else FAINT, linewidth=1.8 if is_chosen else 0.8)
    axes.set_yscale("log")
    # The usual labels of a log axis are formulas, which STYLE does not parse.
    axes.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axes.yaxis.set_minor_formatter(lambda number, _: "")
    axes.grid(axis="y")
    axes.set_ylim(1e-9, 2)
    axes.set_xlim(0, len(chosen.spectrum))
    axes.set(xlabel="component, largest first", ylabel="singular value")
    return _address(figure)


def _panel(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of this size in inches and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _address(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return address_of(buffer.getvalue(), "svg+xml")
