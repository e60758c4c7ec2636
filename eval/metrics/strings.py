"""Answers compared as text or as numbers, with nothing between right and wrong, or by their edit distance."""

from collections.abc import Sequence


def exact_match(prediction: str, answer: str) -> bool:
    """Return whether the answers are equal once lower-cased and stripped of white space and final periods."""
    return _plain(prediction) == _plain(answer)


def gqa_match(prediction: str, answer: str) -> bool:
    """Return whether a prediction is GQA's answer: lower-cased and without final periods, as LLaVA hands it to the official script."""
    return prediction.rstrip(".").lower() == answer


def anls(prediction: str, answers: Sequence[str], *, threshold: float = 0.5, raw_length: bool = True) -> float:
    """Return the normalised Levenshtein similarity to the nearest answer; 0 below the threshold, which itself is kept.

    similarity = 1 − distance / length of the longer one, compared in lower case.

    Args:
        prediction: The model's answer.
        answers: The right ones.
        threshold: Smallest similarity that counts.
        raw_length: White space is collapsed, but lengths are those of the texts as they were given, upper-cased ("ß" has two): DocVQA's
            script and most others. False takes the lengths of the lower-cased, stripped texts that are compared (LLaVA, M4C).

    Raises:
        ValueError: If there are no answers.
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers is {answers!r}; expected a list of at least one right answer.")
    best = max(_similarity(prediction, answer, raw_length) for answer in answers)
    return best if best >= threshold else 0.0


def relaxed_accuracy(prediction: str, target: str, tolerance: float = 0.05) -> bool:
    """Return whether a prediction is ChartQA's answer: a number within 5 % of it, else the same text in any case.

    Percentages are hundredths. With a target of 0 texts are compared.
    """
    predicted, wanted = _number(prediction), _number(target)
    if predicted is not None and wanted:
        return abs(predicted - wanted) / abs(wanted) <= tolerance
    return prediction.lower() == target.lower()


def edit_distance(first: str, second: str) -> int:
    """Return how many insertions, deletions and replacements of characters turn one text into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]


def _similarity(prediction: str, answer: str, raw_length: bool) -> float:
    if raw_length:
        compared = [" ".join(text.lower().split()) for text in (prediction, answer)]
        longest = max(len(prediction.upper()), len(answer.upper()))
    else:
        compared = [text.lower().strip() for text in (prediction, answer)]
        longest = max(map(len, compared))
    return 1 - edit_distance(*compared) / longest if longest else 1.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
