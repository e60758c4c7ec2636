"""What an adapter plan holds, as one self-contained page: ranks, compactness, chosen candidates and spectra, layer by layer."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corda_core import AdapterInit, AdapterPlan
from corda_core.files import write_whole
from corda_vlm.report import page, require_extra

SHOWN_SPECTRA = 9
"""Layers whose spectra are drawn, spread over the plan."""


def write_plan_report(plan: AdapterPlan, path: Path) -> None:
    """Write the page; a file already at `path` stays as it is unless the new page is complete.

    Raises:
        ModuleNotFoundError: If a package of the extra ``demo`` is missing; the text names it and the command that installs it.
    """
    require_extra()
    from corda_vlm import plan_plots

    ranks = [init.rank for init in plan.layers.values()]
    assessed = {name: init for name, init in plan.layers.items() if init.candidates}
    most_candidates = max((len(init.candidates) for init in assessed.values()), default=0)
    facts = {
        "layers": len(ranks),
        "parameters": plan.num_parameters,
        "budget": plan.provenance.get("budget"),
        "ranks": f"{min(ranks)} … {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}",
        "fallbacks": len(plan.provenance.get("fallbacks", [])),
    }
    maps: dict[str, Callable[[AdapterInit], float]] = {"rank": lambda init: init.rank}
    if assessed:
        maps["compactness log π (lower is more compact)"] = lambda init: init.candidates[init.chosen].log_pi
    if most_candidates > 1:
        maps["candidate chosen"] = lambda init: init.chosen + 1
    names = list(assessed)
    count = min(SHOWN_SPECTRA, len(names))
    shown = [names[place * (len(names) - 1) // max(1, count - 1)] for place in range(count)]
    heat = {
        part: {title: plan_plots.heat_map(_grid(layers, value)) for title, value in maps.items()} for part, layers in _by_part(plan).items()
    }
    spectra = {name: plan_plots.spectra(plan.layers[name]) for name in dict.fromkeys(shown)}
    write_whole(path, page("plan.html.j2", plan=plan, facts=facts, heat=heat, spectra=spectra).encode())


def _by_part(plan: AdapterPlan) -> dict[str, dict[tuple[str, int], AdapterInit]]:
    """Return the layers by what comes before their block's number, keyed by projection and number; those without one as number 0."""
    parts: dict[str, dict[tuple[str, int], AdapterInit]] = {}
    for name, init in plan.layers.items():
        numbered = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
        part, number, projection = numbered.groups() if numbered else (*name.rpartition(".")[:1], "0", name.rpartition(".")[2])
        parts.setdefault(part or "model", {})[projection, int(number)] = init
    return parts


def _grid(layers: dict[tuple[str, int], AdapterInit], value: Callable[[AdapterInit], float]) -> dict[str, Any]:
    """Return rows (projections), columns (blocks) and the value of each layer, None where there is none."""
    rows = list(dict.fromkeys(projection for projection, _ in layers))
    columns = sorted({number for _, number in layers})
    known = {key: value(init) for key, init in layers.items()}
    return {"rows": rows, "columns": columns, "values": [[known.get((row, column)) for column in columns] for row in rows]}
