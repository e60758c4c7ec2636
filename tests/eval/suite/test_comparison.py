"""Base against tuned: rows, averages, and how they are written."""

import dataclasses
import math

import pytest

from corda_eval.records import TaskResult
from corda_eval.suite.comparison import averages, compare
from corda_eval.suite.page import html, markdown, summary


def result(task: str, scores: list[float], headline: str = "acc", value: float | None = None) -> TaskResult:
    records = [{"id": number, "prediction": "x", "answer": "y"} for number in range(len(scores))]
    metrics = {headline: sum(scores) / len(scores) if value is None else value}
    return TaskResult(task, metrics, headline, scores, records, 10.0)


BEFORE = [
    result("digits", [0.0] * 20),
    result("easy_vqa", [1.0] * 18 + [0.0] * 2),
    result("text", [2.0, 2.2] * 5, "perplexity", math.exp(2.1)),
    result("pope", [1.0, 0.0], "f1", 0.8),
]
AFTER = [
    result("easy_vqa", [1.0] * 9 + [0.0] * 11),
    result("digits", [1.0] * 12 + [0.0] * 8),
    result("text", [2.3, 2.5] * 5, "perplexity", math.exp(2.4)),
    result("pope", [1.0, 0.0], "f1", 0.7),
]
ROLES = {"digits": "target", "easy_vqa": "kept", "text": "kept", "pope": "kept"}


def test_rows_are_gain_drop_retention_and_an_interval() -> None:
    digits, easy, text, pope = compare(BEFORE, AFTER, ROLES)
    assert [row.task for row in (digits, easy, text, pope)] == ["digits", "easy_vqa", "text", "pope"]
    assert (digits.drop, digits.retention) == (-0.6, None)
    assert easy.drop == pytest.approx(0.45)
    assert easy.retention == pytest.approx(0.5)
    assert easy.interval is not None
    assert easy.interval[0] < -0.45 < easy.interval[1] < 0
    assert text.drop == pytest.approx(math.exp(2.4) - math.exp(2.1))
    assert text.retention == pytest.approx(math.exp(-0.3))
    assert text.interval is not None
    assert text.interval[0] <= text.drop <= text.interval[1]
    assert pope.interval is None  # F1 is no mean over examples


def test_perplexities_of_the_harness_come_from_log_likelihoods() -> None:
    before = result("own", [-2.0, -3.0, -2.5, -2.2] * 5, "perplexity,none", math.exp(2.425))
    after = result("own", [-1.0, -2.1, -1.5, -1.2] * 5, "perplexity,none", math.exp(1.45))
    (row,) = compare([before], [after], {"own": "target"})
    assert row.interval is not None
    assert row.interval[0] < math.exp(1.45) - math.exp(2.425) < row.interval[1] < 0


def test_averages() -> None:
    means = averages(compare(BEFORE, AFTER, ROLES))
    kept, target = 100 * (0.45 + 0.7) / 2, 60.0
    assert means.gain == pytest.approx(60)
    assert means.kept_drop == pytest.approx((45 + 10) / 2)
    assert means.worst_drop == pytest.approx(45)
    assert means.o_average == pytest.approx((kept + target) / 2)
    assert means.h_average == pytest.approx(2 * kept * target / (kept + target))
    alone = averages(compare(BEFORE[1:2], AFTER[:1], ROLES))
    assert (alone.gain, alone.o_average, alone.h_average) == (None, None, None)


def test_other_tasks_or_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="text was done with one of"):
        compare(BEFORE, [result for result in AFTER if result.task != "text"], ROLES)
    other = dataclasses.replace(AFTER[1], records=[{"id": number + 1} for number in range(20)])
    with pytest.raises(ValueError, match=r"digits asked the base and the tuned model other examples"):
        compare(BEFORE, [other, *AFTER[2:], AFTER[0]], ROLES)


def test_written_out() -> None:
    pytest.importorskip("jinja2")
    rows = compare(BEFORE, AFTER, ROLES)
    table = markdown({"CorDA": rows}, {"CorDA": averages(rows)})
    assert "| digits (target) | acc | 20 | 0.0 % | 60.0 % | +60.0 (" in table
    assert "| pope (kept) | f1 | 2 | 80.0 % | 70.0 % | −10.0 | 87.5% |" in table
    assert "worst drop 45.0 points" in table
    written = html("What <it> forgot", {"base": "a & b"}, {"CorDA": rows}, {"CorDA": averages(rows)})
    for text in ("What &lt;it&gt; forgot", "a &amp; b", 'class="worse"', 'class="better"', "perplexity", "11.02"):
        assert text in written, text
    assert "http" not in written.replace("http-equiv", "")
    kept = summary({"base": BEFORE, "CorDA": AFTER})
    assert kept["base"]["results"]["easy_vqa"] == {"acc,none": 0.9}
    assert kept["CorDA"]["clip_benchmark"][0] == {"dataset": "easy_vqa", "model": "CorDA", "metrics": {"acc": 0.45}}
