"""Digits and easy-VQA: what they hold, and answers scored on a model that is known."""

from typing import Any

import pytest
from conftest import tiny_llava

from corda_eval.metrics import exact_match
from corda_eval.vqa.answer import Asking
from corda_eval.vqa.digits import load_digit_questions
from corda_eval.vqa.easy_vqa import load_easy_vqa
from corda_eval.vqa.example import VqaExample
from corda_eval.vqa.generate import BatchCheck, check_batch_invariance


def test_digits_are_split_once_and_for_all() -> None:
    pytest.importorskip("sklearn")
    splits = {name: load_digit_questions(name) for name in ("train", "validation", "test")}
    assert [len(split) for split in splits.values()] == [1200, 200, 397]
    pictures = [example.image.tobytes() for split in splits.values() for example in split]
    assert len(set(pictures)) == len(pictures)
    assert {example.answer for example in splits["test"]} == set("0123456789")
    assert splits["test"][0].image.size == (64, 64)
    with pytest.raises(ValueError, match="not 'dev'"):
        load_digit_questions("dev")


def test_easy_vqa_is_read_from_its_wheel() -> None:
    pytest.importorskip("easy_vqa")
    examples = load_easy_vqa("test", indices=range(20))
    assert examples[0].question
    assert examples[0].image.size == (64, 64)
    assert len(load_easy_vqa("test")) == 9673
    assert [example.question_id for example in load_easy_vqa("validation", limit=2)] == ["9000", "9001"]
    with pytest.raises(ValueError, match='not "dev"'):
        load_easy_vqa("dev")


def test_answers_do_not_depend_on_the_batch(processor: Any, samples: list[dict[str, Any]]) -> None:
    examples = [VqaExample(item["image"], item["question"], item["answer"], str(place)) for place, item in enumerate(samples)]
    assert check_batch_invariance(examples, tiny_llava(), processor, Asking(5), batch_size=12) == BatchCheck(len(examples), [])


def test_exact_match() -> None:
    assert exact_match(" Yes. ", "yes")
    assert not exact_match("yes it is", "yes")
