"""What curves say at LoRA's gain, of runs whose figures are known."""

import math
from typing import Any

import pytest
from test_frontier import BASE, RUNS, run

from corda_eval.study.frontier import Run, with_interpolations
from corda_eval.study.reading import RESOLUTION, place_of, read_study, worth_showing
from corda_eval.study.sizes import sizes_of


def test_between_two_points_the_logarithm_is_straight() -> None:
    gains, losses = (0.6, 0.96, 1.0), (0.05, 0.25, 0.5)
    expected = {0.96: 0.25, 0.98: (0.25 * 0.5) ** 0.5, 0.3: 0.025, 1.0: 0.5}
    for gain, lost in expected.items():
        place = place_of(gain, gains)
        assert place is not None
        assert place.read(losses) == pytest.approx(lost)
    assert place_of(1.01, gains) is None
    assert place_of(0.5, ()) is None
    middle = place_of(0.78, gains)
    assert middle is not None
    assert middle.read((0.0, 0.1, 0.1)) == pytest.approx((RESOLUTION * 0.1) ** 0.5)  # none is as little as can be told


def test_an_arm_is_read_at_parts_of_loras_gain() -> None:
    gain, arms = read_study(RUNS, BASE)
    assert gain == pytest.approx(0.96)
    assert list(arms) == ["kpm", "lora", "weak"]
    first, second, third = arms["kpm"].readings
    assert (first.fraction, first.rates, first.below, first.num_seeds) == (1.0, (3e-4,), False, 2)
    assert (first.forgetting, first.ratio, first.right) == (pytest.approx(0.025), pytest.approx(0.1), pytest.approx(80.0))
    assert first.change_on_context == pytest.approx(0.2)
    assert second.below
    assert second.right is None
    assert second.forgetting == pytest.approx(0.9 * 0.025)
    of_lora = 0.05 * 5 ** ((0.864 - 0.6) / 0.36)
    assert second.ratio == pytest.approx(0.9 * 0.025 / of_lora)
    assert third.fraction == 0.8
    assert [reading.ratio for reading in arms["lora"].readings] == [1, 1, 1]
    weak = arms["weak"]
    assert weak.learned == pytest.approx(0.2 / 0.96)
    assert weak.at(0.8) is None
    assert [reading.fraction for reading in weak.readings] == [pytest.approx(0.2 / 0.96)]  # at its own gain, for want of another


def test_what_cannot_be_told_from_none_is_a_bound() -> None:
    runs = [BASE, run("lora", 1e-3, 0, 1.0, 0.2, 0.2), run("replay", 1e-3, 0, 1.0, -0.3, 0.0005)]
    reading = read_study(runs, BASE)[1]["replay"].readings[0]
    assert (reading.resolved, reading.forgetting, reading.ratio) == (False, pytest.approx(RESOLUTION), pytest.approx(RESOLUTION / 0.2))
    assert reading.seeds is None
    harmless = [BASE, run("lora", 1e-3, 0, 1.0, 0.0, 0.0), run("kpm", 1e-3, 0, 1.0, 0.1, 0.1)]
    assert read_study(harmless, BASE)[1]["kpm"].readings[0].ratio is None


def test_the_interval_from_seeds_is_as_wide_as_they_differ() -> None:
    def seeds(factors: tuple[float, ...]) -> list[Run]:
        lora = [run("lora", 1e-3, seed, 1.0, 0.2, 0.2) for seed in range(3)]
        return [BASE, *lora, *(run("kpm", 1e-3, seed, 1.0, 0.02 * factor, 0.02 * factor) for seed, factor in enumerate(factors))]

    alike, apart = (read_study(seeds(factors), BASE)[1]["kpm"].readings[0] for factors in ((1.0, 1.0, 1.0), (0.5, 1.0, 2.0)))
    assert alike.seeds == pytest.approx((0.1, 0.1))
    assert apart.ratio is not None
    assert apart.seeds is not None
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert apart.seeds == pytest.approx((apart.ratio * math.exp(-half), apart.ratio * math.exp(half)), rel=1e-3)
    # One seed has no interval, nor have seeds that LoRA lacks.
    assert read_study([*seeds((1.0,))], BASE)[1]["kpm"].readings[0].seeds is None


def test_a_seed_that_learns_more_for_more_forgetting_is_no_other_curve() -> None:
    """Runs of one curve, log forgetting 3 a nat: seeds that stand elsewhere on it differ in nothing."""

    def lost(gain: float, scale: float) -> float:
        return scale * math.exp(3 * gain)

    points = [(3e-4, 0, 0.5), (1e-3, 0, 0.9), (1e-3, 1, 1.0), (1e-3, 2, 1.1), (3e-3, 0, 1.4)]
    runs = [
        run(arm, rate, seed, gain, lost(gain, scale), lost(gain, scale))
        for arm, scale in (("lora", 0.01), ("kpm", 0.001))
        for rate, seed, gain in points
    ]
    reading = read_study([BASE, *runs], BASE)[1]["kpm"].readings[0]
    assert reading.ratio == pytest.approx(0.1)
    assert reading.seeds == pytest.approx((0.1, 0.1))


def test_interpolations_are_shown_where_they_do_better_than_their_arm() -> None:
    def between(docs: float) -> dict[str, Any]:
        kept = {"docs": {"loss": 3.0 + docs, "accuracy": None}, "code": {"loss": 1.0 + docs, "accuracy": 50.0}}
        return {"0.5": {"target": {"loss": 1.2, "accuracy": 70.0}, "validation": 1.1, **kept}}

    better = run("kpm", 1e-3, 0, 1.0, 0.1, 0.1, interpolated=between(0.01))
    worse = run("ipm", 1e-3, 0, 1.0, 0.1, 0.1, interpolated=between(0.4))
    runs = with_interpolations([BASE, run("lora", 1e-3, 0, 1.0, 0.2, 0.2), better, worse])
    assert worth_showing(read_study(runs, BASE)[1]) == ["kpm, α = 0.5", "kpm", "ipm", "lora"]


def test_what_a_run_does_not_tell_is_left_out() -> None:
    told = {"kl": {"docs": 0.1, "code": 0.3}, "change_on_context": None}
    runs = [BASE, run("lora", 1e-3, 0, 1.0, 0.2, 0.2), run("kpm", 1e-3, 0, 1.0, 0.1, 0.1, **told)]
    arms = read_study(runs, BASE)[1]
    assert (arms["kpm"].readings[0].kl, arms["kpm"].readings[0].change_on_context) == (pytest.approx(0.2), None)
    assert (arms["lora"].readings[0].kl, arms["lora"].readings[0].change_on_context) == (None, pytest.approx(0.2))
    assert [one.points.keys() for one in sizes_of([*runs, run("new", 1e-3, 0, 1.0, 0.1, 0.1)], BASE)] == []


def test_lora_must_have_learned() -> None:
    with pytest.raises(ValueError, match="LoRA learned nothing"):
        read_study([BASE, run("lora", 1e-3, 0, -0.1, 0.2, 0.2)], BASE)
