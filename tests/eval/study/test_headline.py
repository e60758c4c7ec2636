"""The study's one table over all settings."""

from test_frontier import BASE, RUNS, run

from corda_eval.study.headline import headline, number, spread_text
from corda_eval.study.reading import read_study


def test_ratios_of_an_arm_stand_side_by_side_and_the_worst_orders_the_rows() -> None:
    two = [BASE, run("lora", 1e-3, 0, 1.0, 0.2, 0.2), run("kpm", 1e-3, 0, 1.0, 0.3, 0.3), run("ipm", 1e-3, 0, 0.95, 0.0, 0.0)]
    settings = {"one": RUNS, "two": two}
    head, rows = headline({name: list(read_study(chosen, BASE)[1].values()) for name, chosen in settings.items()})
    assert head == ["arm", "one", "two"]
    assert rows == [
        ["ipm", "", "at 90 %: < 0.006*"],
        ["lora", "1", "1"],
        ["kpm", "0.10 (0.06 … 0.18)", "1.50"],  # a tenth in one setting is no comfort in the other
        ["weak", "learns 21 % of LoRA's", ""],
    ]


def test_numbers_have_as_many_digits_as_count() -> None:
    assert [number(ratio) for ratio in (0.0004, 0.0042, 0.094, 1.876, 43.4, 4e4)] == ["<0.001", "0.004", "0.09", "1.88", "43", ">100"]
    assert spread_text((1.0, 1.0, 1.0), 1) == "1.0"
    assert spread_text((0.25, 0.2, 0.3), 2) == "0.25 (0.20 … 0.30)"
