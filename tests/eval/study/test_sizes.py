"""What forgetting has to do with the size of a change, of runs made on a line."""

import math

import pytest
from test_frontier import BASE, run

from corda_eval.study.frontier import Run
from corda_eval.study.sizes import rank_correlation, sentence, sizes_of, times


def on_line(arm: str, rate: float, size: float, factor: float, kl: float) -> Run:
    lost = 10 * size**2 * factor
    return run(arm, rate, 0, rate * 1000, lost, lost, change_on_context=size, kl={"docs": kl, "code": kl})


RUNS = [
    BASE,
    *(on_line("lora", rate, size, 1.0, size) for rate, size in ((3e-4, 0.03), (1e-3, 0.1), (3e-3, 0.3))),
    *(on_line("strict", rate, size, 0.125, size) for rate, size in ((3e-4, 0.06), (1e-3, 0.2))),
]


def test_an_arm_is_held_against_the_line_through_loras_runs() -> None:
    change, kl = sizes_of(RUNS, BASE)
    assert change.line is not None
    assert change.line[0] == pytest.approx(2)
    assert change.below == pytest.approx({"lora": 1.0, "strict": 8.0})
    assert kl.below == pytest.approx({"lora": 1.0, "strict": 8.0})
    told = sentence([change, kl], ["lora", "strict"])
    assert "0.80 with the change on the context (5 runs) and 0.80 with the KL(base ‖ it) (5 runs)." in told
    assert "at their own change on the context, forget: strict 8.0 times less." in told


def test_one_size_of_lora_makes_no_line() -> None:
    change = sizes_of([RUNS[0], RUNS[2], *RUNS[4:]], BASE)[0]
    assert change.line is None
    assert change.below == {}
    assert sizes_of(RUNS[:1], BASE) == []
    assert sentence([], []) == ""


def test_ranks_and_factors() -> None:
    assert rank_correlation([(1, 1), (2, 10), (3, 100)]) == pytest.approx(1)
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    assert rank_correlation([(1, 1), (1, 2), (2, 3)]) == pytest.approx(math.sqrt(3) / 2)  # equal values share a rank
    assert rank_correlation([(1, 1), (1, 2)]) is None
    assert [times(value) for value in (8.0, 0.25, 1.02, 43.0)] == ["8.0 times less", "4.0 times more", "as much", "43 times less"]
