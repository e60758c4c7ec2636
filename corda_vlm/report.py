"""What a demo run found: one self-contained page (`write_report`) and one picture (`draw_headline`).

Both read the plain `summary` that the demo saves as JSON. matplotlib and jinja2 come with the extra ``demo``; they are imported
when first used (matplotlib by `corda_vlm.plots`).
"""

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_core.files import write_whole

BASE = "base"
"""Key of the untouched model among the methods."""

OPTIONAL = ("verdict", "decomposition", "export", "examples")
"""Sections that the page leaves out when the summary has nothing for them."""

BASE_COLOR = "#8a929e"
METHOD_COLORS = {"lora": "#e69f00", "kpm_start": "#56b4e9", "kpm_strict": "#0072b2"}
OTHER_COLORS = ("#009e73", "#cc79a7", "#d55e00", "#b5a800", "#4d4d4d")
"""Okabe and Ito's palette, told apart by colour-blind readers: fixed colours for the methods of the demo, others in turn."""
INVISIBLE = 0.005  # a change below it is written ±0.00


@dataclass(frozen=True)
class Cell:
    """A score of one method on one task, with its change against the base."""

    score: float | None
    change: float | None
    """After minus before, in the unit of the metric."""
    interval: tuple[float, float] | None
    """95% interval of the change."""
    higher_is_better: bool

    @property
    def improvement(self) -> float | None:
        """The change, positive if better."""
        return self.change if self.change is None or self.higher_is_better else -self.change

    @property
    def verdict(self) -> str:
        """One of "better", "worse", "no clear change" (invisible, or zero lies in the interval), "" if nothing was compared."""
        if self.improvement is None:
            return ""
        if abs(self.improvement) < INVISIBLE or (self.interval and self.interval[0] <= 0 <= self.interval[1]):
            return "no clear change"
        return "better" if self.improvement > 0 else "worse"


def write_report(summary: Mapping[str, Any], path: Path) -> None:
    """Write the page; a file already at `path` stays as it is unless the new page is complete."""
    require_extra()
    write_whole(path, _render(summary).encode())


def draw_headline(summary: Mapping[str, Any], path: Path) -> None:
    """Save a PNG of 1200 x 500 pixels: what each method learned on the target beside what it lost on each kept task."""
    require_extra()
    from corda_vlm import plots

    write_whole(path, plots.headline(summary))


def require_extra() -> None:
    """Check that matplotlib and jinja2 are there. A long run asks before it starts, not when it ends.

    Raises:
        ModuleNotFoundError: naming what is missing and the command that installs it.
    """
    for name in ("matplotlib", "jinja2"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} is not installed; run: pip install 'corda-vlm[demo]'", name=name) from error


def compare(summary: Mapping[str, Any], method: str, task: str) -> Cell:
    """The score of `method` on `task` against the base; what was not measured, or is not finite, has no change."""
    before = summary["methods"][BASE]["scores"].get(task)
    score = summary["methods"][method]["scores"].get(task)
    known = method != BASE and all(value is not None and math.isfinite(value) for value in (before, score))
    change = score - before if known else None
    interval = summary["methods"][method].get("intervals", {}).get(task) if change is not None else None
    return Cell(score, change, tuple(interval) if interval else None, summary["tasks"][task]["higher_is_better"])


def ordered_tasks(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks: what was taught, then what should be kept."""
    return dict(sorted(summary["tasks"].items(), key=lambda item: item[1]["role"] != "target"))


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """One colour per method, the same in every plot and table."""
    fixed = {BASE: BASE_COLOR} | METHOD_COLORS
    others = [method for method in methods if method not in fixed]
    return fixed | {method: OTHER_COLORS[i % len(OTHER_COLORS)] for i, method in enumerate(others)}


def format_score(value: float | None, unit: str) -> str:
    """``95.2%``, or with two decimals where there is no unit."""
    if value is None or not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    return f"{value:.1f}%" if unit == "%" else f"{value:.2f}{unit and ' ' + unit}"


def format_change(value: float | None, unit: str) -> str:
    """The signed number alone: the difference of two percentages is in points, not in percent."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+.1f}" if unit == "%" else f"{value:+.2f}"
    return ("±" + text[1:] if float(text) == 0 else text).replace("-", "−")


def format_count(value: int | None) -> str:
    """``4,884,480``; from ten millions on ``48.8 M``."""
    if value is None:
        return "–"
    return f"{value:,}" if value < 10_000_000 else f"{value / 1e6:,.1f} M"


def format_seconds(value: float | None) -> str:
    """``48 s``, ``12 min 5 s`` or ``1 h 3 min``."""
    if value is None:
        return "–"
    minutes, seconds = divmod(round(value), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def format_percent(fraction: float | None) -> str:
    """A fraction as percentage with two significant digits, down to ``<0.0001%``."""
    if fraction is None or not math.isfinite(fraction):
        return "–"
    return "<0.0001%" if 0 < fraction < 1e-6 else f"{float(f'{100 * fraction:.2g}'):g}%"


def _is_right(example: Mapping[str, Any], method: str) -> bool:
    """What the evaluation said (``correct``), else whether the texts are equal but for case and outer punctuation."""
    if "correct" in example:
        return bool(example["correct"].get(method))
    prediction, answer = (text.strip(" \n.!").casefold() for text in (example["predictions"][method], example["answer"]))
    return prediction == answer


def page(template: str, folder: Path | None = None, **values: Any) -> str:
    """Return a page filled from a template in this folder, or in another one that may include those of this."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path for path in (folder, Path(__file__).parent) if path is not None]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": format_score, "change": format_change, "count": format_count}
    environment.filters |= {"seconds": format_seconds, "percent": format_percent}
    return environment.get_template(template).render(values)


def _render(summary: Mapping[str, Any]) -> str:
    from corda_vlm import plots

    summary = {**dict.fromkeys(OPTIONAL, {}), **summary}
    tasks = ordered_tasks(summary)
    return page(
        "report.html.j2",
        summary=summary,
        tasks=tasks,
        methods=summary["methods"],
        cells={method: {task: compare(summary, method, task) for task in tasks} for method in summary["methods"]},
        colors=method_colors(summary["methods"]),
        plots=plots.panels(summary),
        is_right=_is_right,
    )
