"""The benchmark of keeping: its table."""

from corda_eval.bench.keep import SIDES, comparison


def test_ratios_are_those_of_the_same_round() -> None:
    runs = [
        {"side": side, "round": turn, "seconds": turn * (1 + place), "cpu_seconds": turn * (2 + place), "load": 3.0}
        for turn in (1, 2, 3)
        for place, side in enumerate(SIDES)
    ]
    lines = comparison(runs).splitlines()
    assert [line.split("|")[1:6] for line in lines[2:4]] == [
        [" lora ", " 2.00 ", " 1.00 ", " 4.00 ", " 1.00 "],
        [" every 1 ", " 4.00 ", " 2.00 ", " 6.00 ", " 1.50 "],
    ]
    assert "3.0" in lines[-1]
