"""The study's one table over all settings."""

from test_frontier import BASE, RUNS, run

from corda_eval.study.frontier import summaries, unmatched
from corda_eval.study.headline import headline, ratio_text, spread_text


def test_ratios_of_an_arm_stand_side_by_side_and_the_worst_orders_the_rows() -> None:
    two = [BASE, run("lora", 1e-3, 0, 1.0, 0.2, 0.2), run("kpm", 1e-3, 0, 1.0, 0.3, 0.3), run("ipm", 1e-3, 0, 1.0, 0.0, 0.0)]
    settings = {"one": RUNS, "two": two}
    matched = {name: list(summaries(chosen, BASE)[1].values()) for name, chosen in settings.items()}
    head, rows = headline(matched, {name: unmatched(chosen, BASE) for name, chosen in settings.items()})
    assert head == ["arm", "one", "two"]
    assert rows == [
        ["ipm", "", "0.000; 80 %"],
        ["lora", "1; 80 %", "1; 80 %"],
        ["kpm", "0.10; 80 %", "1.50; 80 %"],  # a tenth in one setting is no comfort in the other
        ["weak", "learns 20 % of LoRA's", ""],
    ]


def test_small_ratios_keep_a_third_decimal() -> None:
    assert ratio_text((0.25, 0.2, 0.3)) == "0.25 (0.20 … 0.30)"
    assert ratio_text((0.004, 0.003, 0.007)) == "0.004 (0.003 … 0.007)"
    assert spread_text((1.0, 1.0, 1.0), 1) == "1.0"
