"""How much of a change fits into a budget of forgetting."""

import math
from collections.abc import Callable

TOLERANCE = 0.05
"""What may be left of the budget, as a fraction of it: a KL in bfloat16 is no smoother than that."""
MOST_MEASUREMENTS = 24
"""Each is a pass over the held-out samples; two to five are usual."""


def check_budget(budget: float, name: str = "budget") -> None:
    """Refuse what is no budget.

    Raises:
        ValueError: If it is negative, infinite or no number.
    """
    if not 0 <= budget < math.inf:
        raise ValueError(f"{name} is {budget}; expected nats a token, 0 or more: what the model may forget.")


def largest_alpha(kl_at: Callable[[float], float], budget: float) -> tuple[float, float]:
    """Return the largest alpha up to 1 whose KL is within the budget, to a twentieth of it, and that KL.

    Near the base ``KL(alpha) ≈ alpha² KL(1)``, so √KL is nearly a line in alpha: the next alpha is where the line through the last two
    measurements meets the budget. Where that is not between the alphas known to be within and above it, and every fourth time, it is the
    middle of these two. What is returned was measured, so the budget is never exceeded; a KL that is not finite is above any.

    Args:
        kl_at: alpha -> KL in nats; 0 at alpha 0, where it is not measured, and growing with alpha.
        budget: The largest KL allowed, in nats; 0 gives alpha 0.

    Raises:
        ValueError: If the budget is negative, infinite or no number.
    """
    check_budget(budget)
    low, low_kl = 0.0, 0.0
    if budget == 0:
        return low, low_kl
    high, high_kl = 1.0, kl_at(1.0)
    if high_kl <= budget:
        return high, high_kl
    before, last = (0.0, 0.0), (1.0, high_kl)
    for number in range(1, MOST_MEASUREMENTS):
        alpha = _meets(before, last, (1 - TOLERANCE / 2) * budget) if number % 4 else math.nan
        alpha = alpha if low < alpha < high else (low + high) / 2
        kl = kl_at(alpha)
        before, last = last, (alpha, kl)
        if kl <= budget:
            low, low_kl = last
        else:
            high = alpha
        if low_kl >= (1 - TOLERANCE) * budget or high - low <= TOLERANCE / 10 * high:  # the curve may jump over the budget
            break
    return low, low_kl


def _meets(first: tuple[float, float], second: tuple[float, float], kl: float) -> float:
    """Return the alpha at which the line through two points (alpha, √KL) reaches a KL; NaN if there is none."""
    (start, start_root), (end, end_root) = ((alpha, math.sqrt(max(value, 0.0))) for alpha, value in (first, second))
    rise = end_root - start_root
    return start + (math.sqrt(kl) - start_root) / rise * (end - start) if math.isfinite(rise) and rise else math.nan
