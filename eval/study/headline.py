"""The study in one table: what each arm forgets of what LoRA forgets, at matched gain, a column a setting."""

import math
from collections.abc import Mapping, Sequence

from corda_eval.study.frontier import BASELINE, Spread, Summary

TITLE = "Forgetting against LoRA's at matched gain, and how much of what was learned is right"


def headline(matched: Mapping[str, Sequence[Summary]], unmatched: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows, ordered by the largest ratio of an arm over the settings; arms that match LoRA's gain nowhere come last.

    Args:
        matched: By setting, the arms at their matched rates.
        unmatched: By setting, the arms that never learn nearly as much as LoRA, and what part of its best gain they reach.
    """
    cells: dict[str, dict[str, str]] = {}
    worst: dict[str, float] = {}
    for setting, arms in matched.items():
        for summary in arms:
            cells.setdefault(summary.arm, {})[setting] = _cell(summary)
            if summary.ratio is not None:
                worst[summary.arm] = max(summary.ratio[0], worst.get(summary.arm, 0.0))
        for arm, part in unmatched[setting].items():
            cells.setdefault(arm, {})[setting] = f"learns {100 * part:.0f} % of LoRA's"
    ordered = sorted(cells, key=lambda arm: worst.get(arm, math.inf))
    return ["arm", *matched], [[arm, *(cells[arm].get(setting, "") for setting in matched)] for arm in ordered]


def _cell(summary: Summary) -> str:
    ratio = "1" if summary.arm == BASELINE else "" if summary.ratio is None else ratio_text(summary.ratio)
    return "; ".join(part for part in (ratio, "" if summary.accuracy is None else f"{summary.accuracy:.0f} %") if part)


def ratio_text(ratio: Spread) -> str:
    """Return mean and (lowest … highest) with two decimals, three where the mean is below a hundredth."""
    return spread_text(ratio, 2 if ratio[0] >= 0.01 else 3)


def spread_text(values: Spread, digits: int) -> str:
    """Return mean and (lowest … highest); the mean alone if they are the same."""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return middle if low == high else f"{middle} ({low} … {high})"
