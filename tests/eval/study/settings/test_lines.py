"""Lines are right, of one split, and whole where they are asked for."""

import math
import random
import re

import pytest
import torch
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from corda_eval.lab.base import lab_folder
from corda_eval.study.settings.lines import additions, guessing, lines, pair, shifting, sorting, windows


def test_sorting_lines() -> None:
    seen: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        generator = random.Random(0)
        for _ in range(50):
            question, answer = sorting(generator, split)
            letters = question.removesuffix(" >").split(" ")
            assert answer == " " + " ".join(sorted(letters)) + "\n"
            assert 4 <= len(set(letters)) == len(letters) <= 6
            seen.setdefault(split, set()).add(answer)
        assert sorting(random.Random(1), split) == sorting(random.Random(1), split)
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_shifted_lines() -> None:
    seen: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        generator = random.Random(0)
        for _ in range(50):
            question, answer = shifting(generator, split)
            letters, shifted = question.removesuffix(" :").split(" "), answer.removeprefix(" ").removesuffix("\n").split(" ")
            assert [chr(ord(letter) + 1) if letter != "z" else "a" for letter in letters] == shifted
            assert 4 <= len(set(letters)) == len(letters) <= 6
            seen.setdefault(split, set()).add("".join(sorted(letters)))
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert guessing("shifting") == pytest.approx(math.log(26) * 15 / 18)


def test_labels_are_whole_sums_reversed_and_of_one_split() -> None:
    tokenizer = LlavaProcessor.from_pretrained(lab_folder(), local_files_only=True).tokenizer
    pairs: dict[str, set[tuple[int, ...]]] = {}
    for split in ("train", "validation", "test"):
        rows = [row for batch in additions(tokenizer, 40, split) for row in zip(*batch.values(), strict=True)]
        assert len(rows) == 40
        pairs[split] = set()
        for ids, labels in rows:
            assert len(ids) == 64
            lines = tokenizer.decode(ids).split("\n")[:-1]
            answers = tokenizer.decode(labels[labels >= 0]).split("\n")
            assert answers == [*(line.split("=")[1] for line in lines), ""]
            for line in lines:
                a, b, reversed_sum = map(str, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", line).groups())  # type: ignore[union-attr]
                assert int(reversed_sum[::-1]) == int(a) + int(b)
                pairs[split].add(tuple(sorted((int(a), int(b)))))
    assert not pairs["train"] & (pairs["validation"] | pairs["test"])
    assert not pairs["validation"] & pairs["test"]
    assert pair(3, 85) == pair(85, 3)


def test_windows_of_other_questions(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = windows(tokenizer, 3, lambda generator: (generator.choice(["one two", "red"]), "blue"), "seed", batch_size=2)
    assert [batch["labels"].shape for batch in batches] == [batch["input_ids"].shape for batch in batches] == [(2, 64), (1, 64)]
    blue = tokenizer.convert_tokens_to_ids("blue")
    ids, labels = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "labels"))
    assert set(labels.unique().tolist()) == {-100, blue}
    assert torch.equal(labels == blue, ids == blue)


def test_a_guesser_knows_the_form_alone() -> None:
    # Four letters in any order: 24 ways in five tokens; five and six letters alike, all three lengths as often.
    assert guessing("sorting") == pytest.approx((math.log(24) + math.log(120) + math.log(720)) / (5 + 6 + 7))
    digits = [len(str(a + b)) for a in range(0, 1000, 7) for b in range(0, 1000, 7)]
    mean = sum(digits) / len(digits)
    assert guessing("addition") == pytest.approx(math.log(10) * mean / (mean + 1), rel=1e-2)


def test_lines_are_those_of_their_kind(tokenizer: PreTrainedTokenizerFast) -> None:
    for ours, whole in zip(lines(tokenizer, "addition", 3, "test", 1), additions(tokenizer, 3, "test", 1), strict=True):
        assert torch.equal(ours["input_ids"], whole["input_ids"])
    with pytest.raises(ValueError, match="No sum of two numbers of 3 to 2 is in the split 'train'"):
        additions(tokenizer, 1, "train", low=3, high=3)
