"""The record as tables in Markdown: each figure beside its floor and its aim."""

from collections.abc import Mapping
from typing import Any

from corda_eval.records import table


def as_markdown(parts: Mapping[str, Any], command: str) -> str:
    """Return the record of some parts."""
    machine = parts.get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [f"# One GPU: {machine.get('card', 'not asked')}", "", f"`{command}`", "", versions, ""]
    for name, figures in parts.items():
        lines += [f"## {name}", "", _end_of(figures), ""]
        rows = [_row(title, figure) for title, figure in figures.items() if isinstance(figure, dict) and "value" in figure]
        if rows:
            lines += table(["figure", "measured", "floor", "of its floor", "aim", "floor from"], rows)
        facts = {title: fact for title, fact in figures.items() if isinstance(fact, str | int | float | bool) and title not in ENDS}
        lines += [f"- {title}: {fact}" for title, fact in facts.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


ENDS = ("seconds", "predicted seconds", "failed", "left out")


def _end_of(figures: Mapping[str, Any]) -> str:
    """Return how a part ended."""
    spent = f"{figures.get('seconds', 0)} s, predicted {figures.get('predicted seconds', '?')} s on an H100."
    for end in ("failed", "left out"):
        if figures.get(end):
            return f"{spent} **{end.capitalize()}**: {' '.join(str(figures[end]).split())}"
    return spent


def _row(title: str, figure: Mapping[str, Any]) -> list[str]:
    value, floor = figure["value"], figure.get("floor")
    unit = figure["unit"]
    ratio = f"{value / floor:.2f}" if isinstance(value, int | float) and isinstance(floor, int | float) and floor > 0 else ""
    shown = "unknown" if value is None else f"{value:g} {unit}" if isinstance(value, int | float) else f"{value} {unit}"
    least = "" if floor is None else f"{floor:g} {unit}"
    return [title, shown, least, ratio, figure.get("aim", ""), figure.get("floor_from", "")]
