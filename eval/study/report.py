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
from corda_eval.study.figure import arms_to_name, draw, draw_sizes
from corda_eval.study.frontier import (
    ALPHA,
    BASE,
    BASELINE,
    Run,
    Summary,
    base_run,
    forgettable,
    kept_losses,
    steps_at_equal_rates,
    summaries,
    with_interpolations,
)
from corda_eval.study.headline import LEGEND, TITLE, headline, reading_text, spread_text
from corda_eval.study.rates import RATES_TITLE, rate_table
from corda_eval.study.reading import FRACTIONS, ArmReading, Reading, baseline_gain, read_study, worth_showing
from corda_eval.study.sizes import Sized, sentence, sizes_of
from corda_eval.study.turns import TURNS_TITLE, turn_table
from corda_vlm.pages import address_of, page, require_extra

READ_COLUMNS = (
    "arm",
    "learns",
    "at LoRA's gain",
    *(f"at {100 * fraction:.0f} %" for fraction in FRACTIONS[1:]),
    "forgetting",
    "KL",
    "right",
    "change on context",
    "read at rates",
    "seeds",
)
COLUMNS = ("arm", "rate", "seeds", "gain", "right", "forgetting", "steps", "change on context", "parameters", "time", "memory")
KEPT = "kept: rise of the loss"
STILL_RIGHT = "still right, of what the base had right"
PAGE_TITLE = "Which method forgets less at equal gain?"
READ_TITLE = "what each arm forgets of what LoRA forgets at the same gain"
TUNED_TITLE = "each arm at its tuned rate"
READ_NOTE = (
    "What an arm learns is its largest gain, of LoRA's; forgetting and KL (nats, means over what is kept), the percent right, the change "
    "and the rates are at the largest of the three gains that it reaches, or at its own largest. Interpolations with the base (α) stand "
    "here where they forget less than their arm and LoRA do at that gain."
)
STEPS_TITLE = "part of LoRA's steps after which the validation loss is at LoRA's final one, both at the same rate"

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Head and rows."""


@dataclass(frozen=True)
class SettingReport:
    """What is reported of one setting."""

    gain: float
    """LoRA's, nats."""

    readings: list[ArmReading]
    """Those that tables show, in order."""

    tuned: list[Summary]
    """The same arms at their tuned rates, by rising forgetting."""

    sized: list[Sized]
    notes: list[str]
    """Sentences."""

    steps: dict[str, dict[float, float]]
    """As ``steps_at_equal_rates``."""

    rates: Table
    """As ``rate_table``."""

    turns: Table
    """As ``turn_table``."""

    figures: dict[str, bytes]
    """By what they show: "gain" and, where runs tell their size, "size"."""

    def as_values(self) -> dict[str, Any]:
        """Return what ``study.json`` holds of it."""
        steps = {arm: {f"{rate:g}": part for rate, part in rates.items()} for arm, rates in self.steps.items()}
        lists = {kind: [dataclasses.asdict(entry) for entry in entries] for kind, entries in self._lists()}
        return {"lora_gain": self.gain, **lists, "notes": self.notes, "steps_at_equal_rates": steps}

    def _lists(self) -> list[tuple[str, Sequence[Any]]]:
        return [("readings", self.readings), ("tuned", self.tuned), ("sizes", self.sized)]


def report_of(setting: str, runs: Sequence[Run]) -> SettingReport:
    """Return the report of a setting's runs, the base's among them."""
    base = next(run for run in runs if run.arm == BASE)
    every = with_interpolations(runs)
    gain, readings = read_study(every, base)
    shown, named, sized = worth_showing(readings), arms_to_name(runs, readings), sizes_of(every, base)
    tuned = {arm: summary for arm, summary in summaries(every, base).items() if arm in shown}
    figures = {"gain": draw(setting, every, base, named, gain), **({"size": draw_sizes(setting, sized, named)} if sized else {})}
    return SettingReport(
        gain,
        [readings[arm] for arm in shown],
        sorted(tuned.values(), key=lambda summary: summary.forgetting[0]),
        sized,
        [note for note in (_no_knowledge(base), _diverged(runs), sentence(sized, named)) if note],
        steps_at_equal_rates(runs),
        rate_table(runs, base),
        turn_table(runs, {arm: summary.rate for arm, summary in tuned.items()}),
        figures,
    )


def write_study(runs: Mapping[str, Sequence[Run]], facts: Mapping[str, str], output: Path) -> dict[str, Any]:
    """Write ``study.html``, ``study.md``, ``study.json`` and one figure a setting; return what ``study.json`` holds.

    Args:
        runs: By setting, the base's among them.
        facts: What was run, by label.
        output: The folder.

    Raises:
        ModuleNotFoundError: If matplotlib or jinja2 are not installed.
        ValueError: If no setting has a measurement of the base, which must know something to keep, and a run of LoRA that learned
            something; those without are left out.
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
    heading = headline({setting: result.readings for setting, result in reports.items()})
    for setting, result in reports.items():
        for kind, figure in result.figures.items():
            write_whole(output / figure_name(setting, kind), figure)
    write_json(output / "study.json", _without_infinities({"facts": dict(facts), "settings": values}))
    write_whole(output / "study.md", (markdown(heading, reports) + glossary(names)).encode())
    write_whole(output / "study.html", html(heading, reports, {**names, "What was run": facts}).encode())
    return values


def figure_name(setting: str, kind: str) -> str:
    """Return what a setting's figure is called."""
    return f"{setting}.png" if kind == "gain" else f"{setting}.{kind}.png"


def _can_be_reported(runs: Sequence[Run]) -> bool:
    base = base_run(runs)
    return base is not None and bool(forgettable(base)) and baseline_gain(runs, base) > 0


def _versions(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return the versions that the runs were made with, each set of them once."""
    noted = [run.result.get("versions") for of_setting in runs.values() for run in of_setting]
    distinct = dict.fromkeys(", ".join(f"{name} {number}" for name, number in versions.items()) for versions in noted if versions)
    return "; ".join([*distinct, *(["not noted"] if None in noted else [])])


def _no_knowledge(base: Run) -> str:
    """Return a sentence on the kept things of which the base knows no more than a guesser."""
    unknown = kept_losses(base).keys() - forgettable(base).keys()
    parts = [
        f"{name} ({base.result['scores'][name]['loss']:.2f}, a guesser {base.result['kept_guessing'][name]:.2f})"
        for name in sorted(unknown)
    ]
    return f"Not in the mean, for the base's loss is no lower than a guesser's (nats): {', '.join(parts)}." if parts else ""


def _diverged(runs: Sequence[Run]) -> str:
    """Return a sentence on the runs whose loss was not finite."""
    parts = [f"{run.arm} at {run.rate:g} (seed {run.seed})" for run in runs if run.diverged]
    return f"Not finite: {', '.join(parts)}." if parts else ""


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
    """Return the headline, and of each setting its readings, figures, tuned arms, steps at equal rates, and all rates."""
    lines = [f"### {TITLE}", "", *table(*heading), LEGEND, ""]
    for setting, result in reports.items():
        name = escaped(setting)
        lines += [f"### {name}: {READ_TITLE}", "", escaped(_gain_text(result)), ""]
        lines += [*table(READ_COLUMNS, [reading_cells(arm) for arm in result.readings]), READ_NOTE, ""]
        for kind in result.figures:
            lines += [f"![{_alternative(kind)} in the setting {name}]({quote(figure_name(setting, kind))})", ""]
        lines += [line for note in result.notes for line in (escaped(note), "")]
        lines += [f"### {name}: {TUNED_TITLE}", "", *table(*tuned_table(result.tuned))]
        head, rows = step_table(result.steps)
        if rows:
            lines += [f"### {name}: {STEPS_TITLE}", "", *table(head, rows)]
        for title, more in ((TURNS_TITLE, result.turns), (RATES_TITLE, result.rates)):
            lines += [f"### {name}: {title}", "", *table(*more)] if more[1] else []
    return "\n".join(lines)


def html(heading: Table, reports: Mapping[str, SettingReport], lists: Mapping[str, Mapping[str, str]]) -> str:
    """Return a page that loads nothing from anywhere, with lists of names and what they mean at the end."""
    settings = {
        setting: {
            "gain": _gain_text(result),
            "figures": {_alternative(kind): address_of(figure, "png") for kind, figure in result.figures.items()},
            "readings": [reading_cells(arm) for arm in result.readings],
            "tuned": tuned_table(result.tuned),
            "drops": [_signed(arm.accuracy_drops, 1) for arm in result.tuned],
            "notes": result.notes,
            "steps": step_table(result.steps),
            "rates": result.rates,
            "turns": result.turns,
        }
        for setting, result in reports.items()
    }
    titles = {"headline_title": TITLE, "read_title": READ_TITLE, "tuned_title": TUNED_TITLE, "steps_title": STEPS_TITLE}
    texts = {**titles, "rates_title": RATES_TITLE, "turns_title": TURNS_TITLE, "legend": LEGEND, "read_note": READ_NOTE, "alpha": ALPHA}
    values = {"headline": heading, "settings": settings, "read_columns": READ_COLUMNS, **texts}
    return page("study.html.j2", Path(__file__).parent, PAGE_TITLE, values, lists)


def _gain_text(result: SettingReport) -> str:
    rates = next(summary.rate for summary in result.tuned if summary.arm == BASELINE)
    return f"LoRA's gain: {result.gain:.3f} nats on the test samples, at its tuned rate {rates:g}."


def _alternative(kind: str) -> str:
    return {"gain": "Forgetting against gain", "size": "Forgetting against the size of the change"}[kind]


def reading_cells(arm: ArmReading) -> list[str]:
    """Return a row of what an arm's curve says."""
    first = arm.readings[0] if arm.readings else None
    return [
        arm.arm,
        f"{100 * arm.learned:.1f} %",
        *(_reading_cell(arm, arm.at(fraction)) for fraction in FRACTIONS),
        *(["" for _ in READ_COLUMNS[5:]] if first is None else _details(first)),
    ]


def _reading_cell(arm: ArmReading, reading: Reading | None) -> str:
    if reading is None:
        return "not reached"
    return "1" if arm.arm == BASELINE else reading_text(reading)


def _details(reading: Reading) -> list[str]:
    rates = " … ".join(f"{rate:g}" for rate in reading.rates)
    return [
        f"{'' if reading.resolved else '< '}{reading.forgetting:.4f}",
        "" if reading.kl is None else f"{reading.kl:.4f}",
        "" if reading.right is None else f"{reading.right:.1f} %",
        _change(reading.change_on_context),
        rates if len(reading.rates) > 1 or not reading.below else f"below {rates}",
        str(reading.num_seeds),
    ]


def step_table(steps: Mapping[str, Mapping[float, float]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the steps at equal rates, a column a rate."""
    rates = sorted({rate for of_arm in steps.values() for rate in of_arm})
    rows = [[arm, *(_part(of_arm[rate]) if rate in of_arm else "" for rate in rates)] for arm, of_arm in steps.items()]
    return ["arm", *(f"{rate:g}" for rate in rates)], rows


def _part(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0%}"


def tuned_table(arms: Sequence[Summary]) -> Table:
    """Return head and rows of the arms at their tuned rates; what each kept thing lost stands last."""
    told = any(arm.still_right for arm in arms)
    rows = []
    for arm in arms:
        right = ", ".join(f"{name} {value:.1f} %" for name, value in arm.still_right.items())
        rows.append([*cells(arm), *([right] if told else []), _signed(arm.kept)])
    return [*COLUMNS, *([STILL_RIGHT] if told else []), KEPT], rows


def cells(arm: Summary) -> list[str]:
    """Return a row's cells as people read them: means, and (lowest … highest) over the seeds."""
    return [
        arm.arm,
        f"{arm.rate:g}",
        str(arm.num_seeds),
        spread_text(arm.gain, 3),
        "" if arm.accuracy is None else f"{arm.accuracy:.1f} %",
        spread_text(arm.forgetting, 4),
        _part(arm.steps_to_baseline),
        _change(arm.change_on_context),
        f"{arm.parameters:,}",
        f"{arm.seconds:.0f} s",
        f"{arm.memory_gb:.1f} GB",
    ]


def _change(change: float | None) -> str:
    return "" if change is None else f"{change:.2%}"


def _signed(rises: Mapping[str, float], digits: int = 3) -> str:
    return ", ".join(f"{name} {value:+.{digits}f}" for name, value in rises.items())


def _without_infinities(value: Any) -> Any:
    """Return the same with None for infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_infinities(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(part) for part in value]
    return None if value == math.inf else value
