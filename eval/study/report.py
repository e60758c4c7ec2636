"""A study's runs as tables, as figures and as a page."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from corda_core.files import write_whole
from corda_eval.records import code, escaped, table, write_json
from corda_eval.study.figure import draw
from corda_eval.study.frontier import (
    BASE,
    BASELINE,
    NEARLY,
    Run,
    Summary,
    base_run,
    gain_of,
    steps_at_equal_rates,
    summaries,
    unmatched,
    with_interpolations,
)
from corda_eval.study.headline import TITLE, headline, ratio_text, spread_text
from corda_eval.study.rates import RATES_TITLE, rate_table
from corda_vlm.pages import address_of, page, require_extra

COLUMNS = (
    "arm",
    "rate",
    "seeds",
    "gain",
    "right",
    "forgetting",
    "against LoRA",
    "at its own gain",
    "steps",
    "change on context",
    "parameters",
    "time",
    "memory",
)
PAGE_TITLE = "Which method forgets less at equal gain?"
TITLES = {
    "matched": f"forgetting at matched gain (each arm's smallest rate that learns at least {NEARLY:.0%} of what LoRA does at its best)",
    "tuned": "each arm at its tuned rate",
}
STEPS_TITLE = "part of LoRA's steps after which the validation loss is at LoRA's final one, both at the same rate"

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Head and rows."""


@dataclass(frozen=True)
class SettingReport:
    """What is reported of one setting."""

    tables: dict[str, list[Summary]]
    """By the choice of rates, "matched" or "tuned": the arms by rising forgetting."""

    unmatched: dict[str, float]
    """The arms that never learn nearly as much as LoRA, and what part of its best gain they reach."""

    shortfalls: str
    steps: dict[str, dict[float, float]]
    """As ``steps_at_equal_rates``."""

    rates: Table
    """As ``rate_table``."""

    figure: bytes

    def as_values(self) -> dict[str, Any]:
        """Return what ``study.json`` holds of it."""
        tables = {kind: [dataclasses.asdict(summary) for summary in summaries] for kind, summaries in self.tables.items()}
        steps = {arm: {f"{rate:g}": part for rate, part in rates.items()} for arm, rates in self.steps.items()}
        return tables | {"shortfalls": self.shortfalls, "steps_at_equal_rates": steps}


def report_of(setting: str, runs: Sequence[Run]) -> SettingReport:
    """Return the report of a setting's runs, the base's among them."""
    base = next(run for run in runs if run.arm == BASE)
    tuned, matched = summaries(with_interpolations(runs), base)
    never = unmatched(runs, base)
    tables = {"matched": _ordered(matched), "tuned": _ordered(tuned)}
    return SettingReport(
        tables, never, shortfalls(runs, never), steps_at_equal_rates(runs), rate_table(runs, base), draw(setting, runs, base)
    )


def write_study(runs: Mapping[str, Sequence[Run]], facts: Mapping[str, str], output: Path) -> dict[str, Any]:
    """Write ``study.html``, ``study.md``, ``study.json`` and one figure a setting; return what ``study.json`` holds.

    Args:
        runs: By setting, the base's among them.
        facts: What was run, by label.
        output: The folder.

    Raises:
        ModuleNotFoundError: If matplotlib or jinja2 are not installed.
        ValueError: If no setting has a measurement of the base and a run of LoRA that learned something; those without are left out.
    """
    require_extra()
    output.mkdir(parents=True, exist_ok=True)
    ready = {setting: of_setting for setting, of_setting in runs.items() if _can_be_reported(of_setting)}
    if not ready:
        raise ValueError(f"{', '.join(runs)}: no setting has finished runs of the base and of LoRA that learned; run the study first.")
    facts = {**facts, "Versions": _versions(ready)}
    if len(ready) < len(runs):
        facts["Left out"] = f"{', '.join(sorted(runs.keys() - ready.keys()))}: without finished runs of the base and of LoRA that learned"
    reports = {setting: report_of(setting, of_setting) for setting, of_setting in ready.items()}
    values = {setting: result.as_values() for setting, result in reports.items()}
    names = meanings(ready)
    matched = {setting: result.tables["matched"] for setting, result in reports.items()}
    heading = headline(matched, {setting: result.unmatched for setting, result in reports.items()})
    for setting, result in reports.items():
        write_whole(output / f"{setting}.png", result.figure)
    write_json(output / "study.json", _without_infinities({"facts": dict(facts), "settings": values}))
    write_whole(output / "study.md", (markdown(heading, reports) + glossary(names)).encode())
    write_whole(output / "study.html", html(heading, reports, {**names, "What was run": facts}).encode())
    return values


def _can_be_reported(runs: Sequence[Run]) -> bool:
    base = base_run(runs)
    return base is not None and any(gain_of(run, base) > 0 for run in runs if run.arm == BASELINE)


def _versions(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return the versions that the runs were made with, each set of them once."""
    noted = [run.result.get("versions") for of_setting in runs.values() for run in of_setting]
    distinct = dict.fromkeys(", ".join(f"{name} {number}" for name, number in versions.items()) for versions in noted if versions)
    return "; ".join([*distinct, *(["not noted"] if None in noted else [])])


def shortfalls(runs: Sequence[Run], reached: Mapping[str, float]) -> str:
    """Return a sentence on the arms that ``unmatched`` found, with what they reach, and one on the runs whose loss was not finite."""
    parts = [f"{arm} ({part:.0%})" for arm, part in reached.items()]
    diverged = [f"{run.arm} at {run.rate:g} (seed {run.seed})" for run in runs if run.diverged]
    never = f"These never learn {NEARLY:.0%} of LoRA's best gain (in brackets what they reach): {', '.join(parts)}." if parts else ""
    return f"{never} {'Not finite: ' + ', '.join(diverged) + '.' if diverged else ''}".strip()


def meanings(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, str]]:
    """Return what the names of settings and of arms stand for: the kind or the method, and its options."""
    settings = {setting: of_setting[0].result["spec"]["setting"] for setting, of_setting in runs.items()}
    arms = {run.arm: run.result["spec"]["method"] for of_setting in runs.values() for run in of_setting if run.arm != BASE}
    entries = {"Settings": settings, "Arms": dict(sorted(arms.items()))}
    return {title: {name: _options(options) for name, options in of_kind.items()} for title, of_kind in entries.items()}


def glossary(names: Mapping[str, Mapping[str, str]]) -> str:
    """Return ``meanings`` as Markdown."""
    lines = []
    for title, entries in names.items():
        lines += [f"### {title}", "", *(f"- {code(name)}: {escaped(meaning)}" for name, meaning in entries.items()), ""]
    return "\n".join(lines)


def _options(options: Mapping[str, Any]) -> str:
    """Return options as people read them, that which says what they belong to first and without its name."""
    kind = options.get("kind", options.get("method"))
    return ", ".join([str(kind), *(f"{key} {json.dumps(value)}" for key, value in options.items() if key not in ("kind", "method"))])


def markdown(heading: Table, reports: Mapping[str, SettingReport]) -> str:
    """Return the headline, and of each setting its figure and tables: one a choice of rates, of the steps at equal rates, of all rates."""
    lines = [f"### {TITLE}", "", *table(*heading)]
    for setting, result in reports.items():
        lines += [f"![Gain against forgetting in the setting {escaped(setting)}]({quote(setting)}.png)", ""]
        for kind, arms in result.tables.items():
            rows = [[*cells(arm), _signed(arm.kept)] for arm in arms]
            lines += [f"### {escaped(setting)}: {TITLES[kind]}", "", *table([*COLUMNS, "kept: rise of the loss"], rows)]
        lines += [escaped(result.shortfalls), ""] if result.shortfalls else []
        head, rows = step_table(result.steps)
        if rows:
            lines += [f"### {escaped(setting)}: {STEPS_TITLE}", "", *table(head, rows)]
        if result.rates[1]:
            lines += [f"### {escaped(setting)}: {RATES_TITLE}", "", *table(*result.rates)]
    return "\n".join(lines)


def html(heading: Table, reports: Mapping[str, SettingReport], lists: Mapping[str, Mapping[str, str]]) -> str:
    """Return a page that loads nothing from anywhere, with lists of names and what they mean at the end."""
    settings = {
        setting: {
            "figure": address_of(result.figure, "png"),
            "tables": {TITLES[kind]: [_row(arm) for arm in arms] for kind, arms in result.tables.items()},
            "shortfalls": result.shortfalls,
            "steps": step_table(result.steps),
            "rates": result.rates,
        }
        for setting, result in reports.items()
    }
    texts = {"headline_title": TITLE, "columns": COLUMNS, "steps_title": STEPS_TITLE, "rates_title": RATES_TITLE}
    return page("study.html.j2", Path(__file__).parent, PAGE_TITLE, {"headline": heading, "settings": settings, **texts}, lists)


def _row(arm: Summary) -> tuple[list[str], str, str, bool]:
    """Return a row of the page: cells, the kept things' rises and lost points, and whether the arm is none between base and another."""
    return cells(arm), _signed(arm.kept), _signed(arm.accuracy_drops, 1), "," not in arm.arm


def step_table(steps: Mapping[str, Mapping[float, float]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the steps at equal rates, a column a rate."""
    rates = sorted({rate for of_arm in steps.values() for rate in of_arm})
    rows = [[arm, *(_part(of_arm[rate]) if rate in of_arm else "" for rate in rates)] for arm, of_arm in steps.items()]
    return ["arm", *(f"{rate:g}" for rate in rates)], rows


def _part(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0%}"


def cells(arm: Summary) -> list[str]:
    """Return a row's cells as people read them: means, and (lowest … highest) over the seeds."""
    ratio = "" if arm.ratio is None else " " if arm.arm == BASELINE else ratio_text(arm.ratio)
    return [
        arm.arm,
        f"{arm.rate:g}",
        str(arm.num_seeds),
        spread_text(arm.gain, 3),
        "" if arm.accuracy is None else f"{arm.accuracy:.1f} %",
        spread_text(arm.forgetting, 4),
        ratio,
        "" if arm.ratio_at_gain is None or arm.arm == BASELINE else f"{arm.ratio_at_gain:.2f}",
        _part(arm.steps_to_baseline),
        f"{arm.change_on_context:.2%}",
        f"{arm.parameters:,}",
        f"{arm.seconds:.0f} s",
        f"{arm.memory_gb:.1f} GB",
    ]


def _signed(rises: Mapping[str, float], digits: int = 3) -> str:
    return ", ".join(f"{name} {value:+.{digits}f}" for name, value in rises.items())


def _without_infinities(value: Any) -> Any:
    """Return the same with None for infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_infinities(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(part) for part in value]
    return None if value == math.inf else value


def _ordered(arms: Mapping[str, Summary]) -> list[Summary]:
    """Return the summaries by rising forgetting."""
    return sorted(arms.values(), key=lambda arm: arm.forgetting[0])
