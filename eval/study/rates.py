"""Every arm at every rate, with how far it moved from the base's predictions: for studies that ask what a rate ruins."""

from collections.abc import Sequence
from statistics import mean

from corda_eval.study.frontier import BASE, Run, forgetting_of, gain_on_test, kept_losses, spread
from corda_eval.study.headline import spread_text
from corda_eval.study.task import TARGET

RATES_TITLE = "every arm at every rate, and KL(base ‖ it) in nats on held-out samples of what is to be kept"
HEAD = ("arm", "rate", "seeds", "gain", "right", "forgetting", "kept: rise of the loss", "KL, held out", "KL, the method's own", "α")


def rate_table(runs: Sequence[Run], base: Run) -> tuple[Sequence[str], list[list[str]]]:
    """Return head and rows, arms in alphabetical order; no rows where no run tells its KL.

    "The method's own" and α are what a method reports at the end (``Adapted.finish``): the largest KL, the smallest α over the seeds.
    """
    told = [run for run in runs if "kl" in run.result]
    points = sorted({(run.arm, run.rate) for run in runs if run.arm != BASE}) if told else []
    return HEAD, [_row([run for run in runs if (run.arm, run.rate) == point], base) for point in points]


def _row(runs: Sequence[Run], base: Run) -> list[str]:
    first, whole = runs[0], [run for run in runs if not run.diverged]
    head = [first.arm, f"{first.rate:g}", str(len(whole))]
    if not whole:
        return [*head, "not finite", *[""] * (len(HEAD) - 4)]
    kept = {name: mean(run.result["scores"][name]["loss"] - loss for run in whole) for name, loss in kept_losses(base).items()}
    right = [run.result["scores"][TARGET]["accuracy"] for run in whole]
    finished = [run.result["finish"] for run in whole if "kl" in run.result.get("finish", {})]
    return [
        *head,
        spread_text(spread([gain_on_test(run, base) for run in whole]), 3),
        "" if None in right else f"{mean(right):.1f} %",
        spread_text(spread([forgetting_of(run.result["scores"], base) for run in whole]), 4),
        ", ".join(f"{name} {value:+.3f}" for name, value in kept.items()),
        ", ".join(f"{name} {value:.3f}" for name, value in _mean_kl(whole).items()),
        f"{max(values['kl'] for values in finished):.4f}" if finished else "",
        f"{min(values.get('alpha', 1.0) for values in finished):.2f}" if finished else "",
    ]


def _mean_kl(runs: Sequence[Run]) -> dict[str, float]:
    """Return the mean KL by what is kept, of the runs that tell it."""
    told = [run.result["kl"] for run in runs if "kl" in run.result]
    return {name: mean(kl[name] for kl in told) for name in (told[0] if told else ())}
