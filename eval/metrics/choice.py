"""Answers out of a few: yes or no (POPE), letters (ScienceQA, MMBench, PMC-VQA)."""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SCIENCEQA_LETTERS = LETTERS[:5]
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NEAR_THE_END = 4
"""Among how many words from the end a letter is taken for the answer."""
NO_CHOICE = "Z"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""What VLMEvalKit takes for no answer, whatever else is said."""


def pope_answer(text: str) -> str:
    """Return "no" if "No", "no" or "not" is a word of the first sentence, else "yes", as LLaVA reads its answers."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(predictions: Sequence[str], labels: Sequence[str], categories: Sequence[str] | None = None) -> dict[str, float]:
    """Return accuracy, precision, recall and F1 of "yes", and ``yes_ratio``, the share of answers that say yes.

    With categories the same for each ("f1:popular"), and ``mean_f1`` over the categories: the figure that papers report. What would be
    divided by zero is 0.

    Args:
        predictions: The answers as generated, or "yes" and "no".
        labels: "yes" or "no".
        categories: The category of each, for instance "adversarial".

    Raises:
        ValueError: If the lengths differ, there are none, or a label is neither "yes" nor "no".
    """
    counts = len(predictions), len(labels), len(labels if categories is None else categories)
    if len(set(counts)) > 1 or not labels:
        raise ValueError(
            f"There are {counts[0]} predictions, {counts[1]} labels and {counts[2]} categories; expected as many of each, at least one; "
            "join them by question id."
        )
    wrong = sorted({label for label in labels if label not in ("yes", "no")})
    if wrong:
        raise ValueError(f'labels has {wrong}; expected "yes" or "no"; mend the annotations.')
    pairs = [(pope_answer(prediction), label) for prediction, label in zip(predictions, labels, strict=True)]
    scores = _binary_scores(pairs)
    if categories is None:
        return scores
    names = sorted(set(categories))
    by_name = {name: _binary_scores([pair for pair, kind in zip(pairs, categories, strict=True) if kind == name]) for name in names}
    scores |= {f"{metric}:{name}": value for name in names for metric, value in by_name[name].items()}
    return scores | {"mean_f1": sum(by_name[name]["f1"] for name in names) / len(names)}


def _binary_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the scores of pairs (answer, label)."""
    hits = pairs.count(("yes", "yes"))
    answered_yes, labelled_yes = (sum(pair[side] == "yes" for pair in pairs) for side in (0, 1))
    return {
        "accuracy": (hits + pairs.count(("no", "no"))) / len(pairs),
        "precision": hits / answered_yes if answered_yes else 0.0,
        "recall": hits / labelled_yes if labelled_yes else 0.0,
        "f1": 2 * hits / (answered_yes + labelled_yes) if answered_yes + labelled_yes else 0.0,
        "yes_ratio": answered_yes / len(pairs),
    }


def scienceqa_answer(prediction: str) -> str | None:
    """Return the letter A … E that a prediction gives, by LLaVA's rule, or None if it gives none.

    A letter alone; or a letter, a period and a space in front; or exactly one "The answer is X.". "A." is none of these.
    """
    if prediction in tuple(SCIENCEQA_LETTERS):
        return prediction
    if len(prediction) >= 3 and prediction[0] in SCIENCEQA_LETTERS and prediction[1:3] == ". ":
        return prediction[0]
    # Any sign may follow the letter: LLaVA's pattern does not escape its period.
    letters = re.findall(r"The answer is ([A-Z]).", prediction)
    return letters[0] if len(letters) == 1 and letters[0] in SCIENCEQA_LETTERS else None


def multiple_choice_answer(prediction: str, choices: Sequence[str]) -> int | None:
    """Return the place of the choice that a prediction names, from 0, or None if it names none or several, by VLMEvalKit's rule.

    If one choice's letter alone is among the words, and among the last four, it is that: "B", "(B) cat", "The answer is B.", "A dog" as
    well. Else, if the text of one choice alone is in the prediction in any case, and that is not twice as long as all choices' texts, it is
    that one. "Z" without a choice's letter, and some sentences of refusal, name none.

    Note:
        Where this finds nothing VLMEvalKit may ask a language model, if it is given one; here the answer counts as wrong, as it does there
        under ``exact_matching``.
    """
    if any(refusal in prediction for refusal in REFUSALS):
        return None
    words = prediction.translate(SEPARATORS).split()
    letters = [letter for letter in LETTERS[: len(choices)] if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - NEAR_THE_END:
        return LETTERS.index(letters[0])
    if not letters and NO_CHOICE in words:
        return None
    return _choice_in(prediction.lower(), choices)


def _choice_in(text: str, choices: Sequence[str]) -> int | None:
    """Return the place of the only choice whose text is in a text that is not much longer than they are."""
    if len(text) > 2 * sum(map(len, choices)):
        return None
    places = [place for place, choice in enumerate(choices) if choice.lower() in text]
    return places[0] if len(places) == 1 else None
