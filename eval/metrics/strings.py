"""Answers compared as text, with nothing between right and wrong."""


def exact_match(prediction: str, answer: str) -> bool:
    """Return whether the answers are equal once lower-cased and stripped of white space and final periods."""
    return _plain(prediction) == _plain(answer)


def gqa_match(prediction: str, answer: str) -> bool:
    """Return whether a prediction is GQA's answer: lower-cased and without final periods, as LLaVA hands it to the official script."""
    return prediction.rstrip(".").lower() == answer


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
