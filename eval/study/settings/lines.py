"""Lines of a question and its answer, without end: sums with their digits reversed, letters to be sorted or to be shifted.

A content (a pair of numbers, a set of letters), in whatever order the question has it, is in only one of training, validation and test.
"""

import math
import random
from collections.abc import Callable
from functools import partial
from string import ascii_lowercase
from typing import Any
from zlib import crc32

import torch

from corda_eval.study.task import Batch

LENGTH = 64
"""Tokens of a window."""
Draw = Callable[[random.Random], tuple[str, str]]
"""Gives a question and its answer."""


def addition(generator: random.Random, split: str, low: int = 0, high: int = 1000) -> tuple[str, str]:
    """Return one sum of a split, operands of low … high − 1, such as ``347+85=`` and ``234`` (432 reversed)."""
    while True:
        a, b = generator.randrange(low, high), generator.randrange(low, high)
        if split_of(pair(a, b)) == split:
            return f"{a}+{b}=", f"{str(a + b)[::-1]}\n"


def pair(a: int, b: int) -> str:
    """Return the same for ``a + b`` and for ``b + a``."""
    return f"{min(a, b)}+{max(a, b)}"


def sorting(generator: random.Random, split: str) -> tuple[str, str]:
    """Return four to six different letters of a split, such as ``d b a c >`` and `` a b c d``."""
    while True:
        letters = generator.sample(ascii_lowercase, generator.randint(4, 6))
        if split_of("".join(sorted(letters))) == split:
            return f"{' '.join(letters)} >", f" {' '.join(sorted(letters))}\n"


def shifting(generator: random.Random, split: str) -> tuple[str, str]:
    """Return four to six different letters of a split and each one's next, such as ``d b a z :`` and `` e c b a``."""
    while True:
        letters = generator.sample(ascii_lowercase, generator.randint(4, 6))
        if split_of("shift " + "".join(sorted(letters))) == split:
            shifted = (ascii_lowercase[(ascii_lowercase.index(letter) + 1) % 26] for letter in letters)
            return f"{' '.join(letters)} :", f" {' '.join(shifted)}\n"


LINES = {"addition": addition, "shifting": shifting, "sorting": sorting}


def split_of(content: str) -> str:
    """Return the split of all questions with this content: the test and validation have a tenth each, by a checksum."""
    return {0: "test", 1: "validation"}.get(crc32(content.encode()) % 10, "train")


def guessing(kind: str) -> float:
    """Return the loss (nats a token) of a guesser who knows the form of the answers, a token a digit or letter and one for the line's end.

    Sums: any digit is as likely, their number is known. Sorted letters: those of the question that are left are as likely; shifted ones:
    any letter is.
    """
    if kind == "addition":
        weights = {total: min(total, 1998 - total) + 1 for total in range(1999)}  # pairs of numbers below 1000 with this sum
        digits = sum(len(str(total)) * weight for total, weight in weights.items()) / sum(weights.values())
        return math.log(10) * digits / (digits + 1)
    counts = range(4, 7)
    if kind == "shifting":
        return math.log(26) * sum(counts) / sum(count + 1 for count in counts)
    return sum(math.lgamma(count + 1) for count in counts) / sum(count + 1 for count in counts)


def lines(tokenizer: Any, kind: str, count: int, split: str, seed: int = 0, *, batch_size: int = 8) -> list[Batch]:
    """Return windows of one kind of lines of a split, as ``windows`` does.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in LINES:
        raise ValueError(f"Lines of {kind!r} are unknown; expected some of {', '.join(LINES)}.")
    return windows(tokenizer, count, partial(LINES[kind], split=split), f"{split} {seed}", batch_size=batch_size)


def additions(tokenizer: Any, count: int, split: str, seed: int = 0, *, low: int = 0, high: int = 1000, batch_size: int = 8) -> list[Batch]:
    """Return windows of sums of a split, operands of low … high − 1, as ``windows`` does.

    Raises:
        ValueError: If the split has no such pair.
    """
    if not any(split_of(pair(a, b)) == split for a in range(low, high) for b in range(low, a + 1)):
        raise ValueError(f"No sum of two numbers of {low} to {high - 1} is in the split {split!r}; take a wider range.")
    draw = partial(addition, split=split, low=low, high=high)
    return windows(tokenizer, count, draw, f"{split} {seed}", batch_size=batch_size)


def windows(tokenizer: Any, count: int, draw: Draw, seed: str, *, batch_size: int = 8) -> list[Batch]:
    """Return ``count`` windows of questions and answers in batches, ``input_ids`` and ``labels`` (batch, 64).

    Labels are the answers that are whole, and -100 elsewhere.
    """
    generator = random.Random(seed)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for _ in range(count):
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < LENGTH:
            question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in draw(generator))
            ids += question + answer
            labels += [-100] * len(question) + (answer if len(ids) <= LENGTH else [-100] * len(answer))
        rows["input_ids"].append(ids[:LENGTH])
        rows["labels"].append(labels[:LENGTH])
    batches = zip(*(torch.tensor(values).split(batch_size) for values in rows.values()), strict=True)
    return [dict(zip(rows, batch, strict=True)) for batch in batches]
