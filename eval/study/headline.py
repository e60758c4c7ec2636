"""The study in one table: what each arm forgets of what LoRA forgets at LoRA's own gain, a column a setting."""

import math
from collections.abc import Mapping, Sequence

from corda_eval.study.frontier import BASELINE, Spread
from corda_eval.study.reading import FRACTIONS, ArmReading, Interval, Reading

TITLE = "Forgetting of LoRA's at LoRA's own gain, or at 90 % or 80 % of it where an arm learns no more"
LEGEND = (
    "Read off each arm's curve over its rates. (…): 95 % interval from the seeds; […]: from the items; *: below the first rate of the arm "
    "or of LoRA, read from a line to zero; <: less than can be told apart from none."
)


def headline(arms: Mapping[str, Sequence[ArmReading]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of arms by setting, ordered by an arm's largest ratio over the settings; those that reach no gain come last."""
    cells: dict[str, dict[str, str]] = {}
    worst: dict[str, tuple[bool, float]] = {}
    for setting, readings in arms.items():
        for reading in readings:
            cells.setdefault(reading.arm, {})[setting] = _cell(reading)
            worst[reading.arm] = max(reading.order, worst.get(reading.arm, (False, -math.inf)))
    ordered = sorted(cells, key=lambda arm: worst[arm])
    return ["arm", *arms], [[arm, *(cells[arm].get(setting, "") for setting in arms)] for arm in ordered]


def _cell(reading: ArmReading) -> str:
    if reading.arm == BASELINE:
        return "1"
    if reading.learned < min(FRACTIONS):
        return f"learns {100 * reading.learned:.0f} % of LoRA's" if reading.readings else "learns nothing"
    first = reading.readings[0]
    return reading_text(first) if first.fraction == 1 else f"at {100 * first.fraction:.0f} %: {reading_text(first)}"


def reading_text(reading: Reading) -> str:
    """Return a ratio with its intervals and marks, as ``LEGEND`` explains them."""
    if reading.ratio is None:
        return "LoRA forgets nothing"
    bound, star = "" if reading.resolved else "< ", "*" if reading.below else ""
    seeds = f" ({_range(reading.seeds)})" if reading.seeds else ""
    items = f" [{_range(reading.items)}]" if reading.items else ""
    return f"{bound}{number(reading.ratio)}{star}{seeds}{items}"


def _range(interval: Interval) -> str:
    return " … ".join(map(number, interval))


def number(ratio: float) -> str:
    """Return a ratio as people read it: two digits that count, nothing finer than a thousandth and nothing above a hundred."""
    if ratio < 0.001:
        return "<0.001"
    if ratio > 100:
        return ">100"
    return f"{ratio:.{3 if ratio < 0.01 else 2 if ratio < 10 else 0}f}"


def spread_text(values: Spread, digits: int) -> str:
    """Return mean and (lowest … highest); the mean alone if they are the same."""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return middle if low == high else f"{middle} ({low} … {high})"
