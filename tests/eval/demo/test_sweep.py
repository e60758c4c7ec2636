"""Which rate a sweep recommends."""

from corda_eval.demo.sweep import best_rate


def test_the_smallest_rate_within_a_standard_error() -> None:
    runs = [{"learning_rate": rate, "digits": digits} for rate, digits in ((1e-3, 62.0), (2e-3, 76.0), (5e-3, 77.0), (1e-2, 30.0))]
    assert best_rate(runs)["learning_rate"] == 2e-3
    assert best_rate(runs[:1] + runs[3:])["learning_rate"] == 1e-3
    assert best_rate([{"learning_rate": 1e-3, "digits": 100.0}, {"learning_rate": 2e-3, "digits": 99.5}])["learning_rate"] == 1e-3
