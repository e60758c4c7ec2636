"""VQA accuracy: an answer counts by how many of (usually ten) people gave it.

With p the prediction and a_1 … a_n the people's answers, accuracy = mean_i min(#{j ≠ i : a_j = p} / 3, 1). For ten answers of which k
equal p that is 0, 0.3, 0.6, 0.9 for k = 0 … 3 and 1 from 4 on (not min(k / 3, 1)). The people are left out by place: the official scripts
leave them out by comparing records, and give an agreed answer 0 where records have no id.

What is compared are normalised texts, and evaluations differ in when they normalise:

- ``official_2017``: the official script of 2017 and most of its copies. The prediction always; people's answers only if they differ, and
  then only their punctuation.
- ``official``: later copies of it. Neither if all people agree, both otherwise; people's answers are stripped too.
- ``always``: both, always (lmms-eval's VQAv2).
- ``evalai``: both, always, after cutting the text as mmf does (LLaVA's TextVQA; EvalAI submissions; OK-VQA, VizWiz in lmms-eval).
"""

import re
from collections.abc import Sequence
from types import MappingProxyType

VARIANTS = ("official_2017", "official", "always", "evalai")

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""In the official order; neither the apostrophe nor the colon is among them."""
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32
"""The official script hands a flag (``re.UNICODE``, 32) to where ``sub`` takes the number of replacements."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = MappingProxyType({"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)})
ARTICLES = frozenset({"a", "an", "the"})

CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""What the official script writes with apostrophes; it also lists "Im", "Ive" and the like, which its lower-cased words never meet."""


def _misspellings() -> dict[str, str]:
    """Return each contraction by its spellings with one apostrophe missing; "somebody'd" alone loses its own."""
    table = {word[:place] + word[place + 1 :]: word for word in CONTRACTIONS.split() for place, sign in enumerate(word) if sign == "'"}
    return table | {"somebody'd": "somebodyd"}


MISSPELLINGS = MappingProxyType(_misspellings())


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: str = "official_2017") -> float:
    """Return the accuracy of one prediction, from 0 to 1.

    Args:
        prediction: The model's answer.
        answers: What each person answered, repetitions included.
        variant: One of ``VARIANTS``.

    Raises:
        ValueError: If the variant is unknown, or there are fewer than two answers.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {list(VARIANTS)}.")
    if isinstance(answers, str) or len(answers) < 2:
        raise ValueError(f"answers is {answers!r}; expected a list of at least two people's answers; use `exact_match` for a single one.")
    predicted, people = _compared(prediction, answers, variant)
    matches = [answer == predicted for answer in people]
    return sum(min((sum(matches) - own) / 3, 1.0) for own in matches) / len(matches)


def normalise_answer(text: str, variant: str = "official_2017") -> str:
    """Return the text as a prediction is compared where people disagree.

    Raises:
        ValueError: If the variant is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {list(VARIANTS)}.")
    if variant == "evalai":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _plain_words(_without_punctuation(_one_line(text)))


def _compared(prediction: str, answers: Sequence[str], variant: str) -> tuple[str, list[str]]:
    """Return prediction and people's answers as the variant compares them."""
    if variant in ("always", "evalai"):
        return normalise_answer(prediction, variant), [normalise_answer(answer, variant) for answer in answers]
    if variant == "official_2017":
        people = [_without_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)
        return normalise_answer(prediction), people
    stripped = [_one_line(answer) for answer in answers]
    if len(set(stripped)) == 1:
        return _one_line(prediction), stripped
    return normalise_answer(prediction), [normalise_answer(answer) for answer in stripped]


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Return the text with each sign deleted if it stands beside a space, or any number has a comma; else with a space in its place."""
    result = text
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if beside_space or COMMA_IN_NUMBER.search(text) else " ")
    return PERIOD.sub("", result, count=MOST_PERIODS)


def _plain_words(text: str) -> str:
    """Return the lower-cased words: numbers as digits, articles left out, contractions with their apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(MISSPELLINGS.get(word, word) for word in words if word not in ARTICLES)
