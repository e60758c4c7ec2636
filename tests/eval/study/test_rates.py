"""The study's table of every arm at every rate."""

import pytest
from test_frontier import BASE, RUNS, run

from corda_eval.study.rates import HEAD, rate_table
from corda_eval.study.report import report_of


def test_nothing_is_said_of_runs_that_tell_no_kl() -> None:
    pytest.importorskip("matplotlib")
    assert rate_table(RUNS, BASE)[1] == []
    assert report_of("sums", RUNS).rates[1] == []


def test_each_rate_with_its_seeds_and_the_worst_of_what_a_method_says_of_itself() -> None:
    kl = {"docs": 0.02, "code": 0.04}
    runs = [
        BASE,
        run("lora", 1e-3, 0, 1.0, 0.2, 0.4, kl=kl),
        run("keep", 3e-3, 0, 1.0, 0.1, -0.1, kl=kl, finish={"kl": 0.009, "alpha": 1.0}),
        run("keep", 3e-3, 1, 0.8, 0.3, -0.1, kl={"docs": 0.04, "code": 0.04}, finish={"kl": 0.01, "alpha": 0.8}),
        run("keep", 1e-2, 0, 1.0, 0.1, 0.1, diverged=True),
    ]
    head, rows = rate_table(runs, BASE)
    assert head == HEAD
    assert rows == [
        ["keep", "0.003", "2", "0.900 (0.800 … 1.000)", "80.0 %", "0.1000 (0.0500 … 0.1500)", "docs +0.200, code -0.100"]
        + ["docs 0.030, code 0.040", "0.0100", "0.80"],
        ["keep", "0.01", "0", "not finite", *[""] * 6],
        ["lora", "0.001", "1", "1.000", "80.0 %", "0.3000", "docs +0.200, code +0.400", "docs 0.020, code 0.040", "", ""],
    ]
