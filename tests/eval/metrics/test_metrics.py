"""Metrics against recorded cases of the official evaluations, cases counted by hand, and what must hold for all inputs."""

import hashlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_eval import metrics
from corda_eval.metrics.vqa import MISSPELLINGS

VQA = ("official", "official_2017", "always", "evalai")
WORDS = st.sampled_from(["two", "2", "the dog", "dog", "don't", "dont", "Yes.", "yes", "1,000", "red-brown", "", "a"])


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("two", ["2"] * 10, (0, 1, 1, 1)),
        ("Yes.", ["yes"] * 10, (0, 1, 1, 1)),
        ("dog", ["the dog"] * 7 + ["dog"] * 3, (1, 0.9, 1, 1)),
        ("don't", ["dont"] * 9 + ["no"], (1, 0, 1, 1)),
        ("wood.", ["wood"] * 3 + ["metal"] * 7, (0.9, 0.9, 0.9, 0.9)),
        ("yes", ["yes"] * 10, (1, 1, 1, 1)),
        ("dog's", ["dog 's"] * 10, (0, 0, 0, 1)),
        ("red, blue", ["red blue"] * 5 + ["red"] * 5, (1, 1, 1, 1)),
    ],
)
def test_vqa_accuracy_of_each_variant(prediction: str, answers: list[str], expected: tuple[float, ...]) -> None:
    assert [metrics.vqa_accuracy(prediction, answers, variant) for variant in VQA] == pytest.approx(expected)


@pytest.mark.parametrize("variant", VQA)
def test_vqa_accuracy_by_how_many_agree(variant: str) -> None:
    accuracies = [metrics.vqa_accuracy("cat", ["cat"] * same + ["dog"] * (10 - same), variant) for same in range(11)]
    assert accuracies == pytest.approx([0, 0.3, 0.6, 0.9] + [1] * 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  two\tDogs\n", "2 dogs"),
        ("none", "0"),
        ("1,000 people?", "1000 people"),
        ("red-brown", "red brown"),
        ("red - brown", "red brown"),
        ("red- brown-grey", "red browngrey"),
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("youre", "you're"),
        ("wouldnt've", "wouldn't've"),
        ("somebody'd", "somebodyd"),
        ("10:30", "10:30"),
        ("." * 33, "."),
        ("im", "im"),
    ],
)
def test_normalised_answers(text: str, expected: str) -> None:
    assert metrics.normalise_answer(text) == expected


def test_normalised_for_evalai() -> None:
    assert metrics.normalise_answer("What's 1,000?", "evalai") == "what 's 1000"
    assert len(MISSPELLINGS) == 114  # of the official 120, less four with capitals and two that change nothing


@settings(deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=10), WORDS, st.sampled_from(VQA))
def test_vqa_accuracy_is_a_fraction_whatever_the_order(answers: list[str], prediction: str, variant: str) -> None:
    accuracy = metrics.vqa_accuracy(prediction, answers, variant)
    assert 0 <= accuracy <= 1
    assert metrics.vqa_accuracy(prediction, random.Random(0).sample(answers, len(answers)), variant) == pytest.approx(accuracy)


@settings(deadline=None)
@given(st.text(alphabet="ab 1,.'-?"))
def test_normalising_leaves_single_spaced_words(text: str) -> None:
    result = metrics.normalise_answer(text)
    assert result == " ".join(result.split())
    assert not set(result.split()) & {"a", "an", "the"}


def test_vqa_accuracy_refuses() -> None:
    with pytest.raises(ValueError, match=r"variant is 'vqa'; expected one of \['official_2017'"):
        metrics.vqa_accuracy("a", ["a", "b"], "vqa")
    with pytest.raises(ValueError, match="at least two"):
        metrics.vqa_accuracy("a", ["a"])
    with pytest.raises(ValueError, match="at least two"):
        metrics.vqa_accuracy("a", "aa")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "no"),
        ("No, there is none.", "no"),
        ("There is not. Yes", "no"),
        ("Yes. No", "yes"),
        ("NO", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_pope_answer(text: str, answer: str) -> None:
    assert metrics.pope_answer(text) == answer


def test_pope_scores_by_hand() -> None:
    predictions, labels = ["Yes", "yes", "No", "no", "yes"], ["yes", "no", "yes", "no", "yes"]
    scores = metrics.pope_scores(predictions, labels, ["popular"] * 2 + ["random"] * 3)
    assert {name: scores[name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")} == pytest.approx(
        {"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.6}
    )
    # popular: one hit, one false alarm; random: one hit, one miss.
    assert scores["f1:popular"] == pytest.approx(2 / 3)
    assert (scores["precision:random"], scores["recall:random"]) == (1, 0.5)
    assert scores["mean_f1"] == pytest.approx((scores["f1:popular"] + scores["f1:random"]) / 2)
    assert metrics.pope_scores(["no"], ["no"])["f1"] == 0
    for bad, text in ((["maybe"], 'expected "yes" or "no"'), ([], "expected as many")):
        with pytest.raises(ValueError, match=text):
            metrics.pope_scores(["no"], bad)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1, max_size=30))
def test_pope_scores_are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, labels = zip(*pairs, strict=True)
    scores = metrics.pope_scores(predictions, labels)
    expected = sklearn.precision_recall_fscore_support(labels, predictions, pos_label="yes", average="binary", zero_division=0)[:3]
    assert [scores[name] for name in ("precision", "recall", "f1")] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("B. a dog", "B"),
        ("B.", None),
        ("b", None),
        ("F", None),
        ("So. The answer is C.", "C"),
        ("The answer is A. The answer is B.", None),
        ("The answer is C", None),
        ("The answer is F.", None),
        ("a dog", None),
        ("", None),
    ],
)
def test_scienceqa_answer(prediction: str, letter: str | None) -> None:
    assert metrics.scienceqa_answer(prediction) == letter


@pytest.mark.parametrize(
    ("prediction", "place"),
    [  # as VLMEvalKit's own matcher reads them
        ("B", 1),
        ("(B)", 1),
        ("B. cat", 1),
        ("B: cat", 1),
        ("B\n", 1),
        ("**C**", 2),
        ("Answer: D.", 3),
        ("The answer is B", 1),
        ("Option B", 1),
        ("B cat", 1),
        ("A dog", 0),
        ("A cat", 0),
        ("b", None),
        ("E", None),
        ("'B'", None),
        ("B/C", None),
        ("B or C", None),
        ("B B B B", 1),
        ("B Z", 1),
        # Of letters the first must be among the last four words.
        ("B is what is", 1),
        ("B is what is shown", None),
        ("B B B B B", None),
        (" cat.", 1),
        ("The cat", 1),
        ("CAT", 1),
        ("catalogue", 1),
        ("dog, not cat", None),
        ("C (both)", 2),
        ("both", None),
        ("", None),
        # The choices' texts have 14 letters, and what is longer than 28 is not searched for them.
        ("This is, I believe, a cat  ..", None),
        ("This is, I believe, a cat  .", 1),
        # What names no choice, whatever else it says.
        ("Z cat", None),
        ("Cannot determine the answer: B", None),
        ("I can't process this file. cat", None),
    ],
)
def test_multiple_choice_answer(prediction: str, place: int | None) -> None:
    assert metrics.multiple_choice_answer(prediction, ["Dog", "Cat", "Both", "both"]) == place


def test_multiple_choice_answers_are_read_as_by_vlmevalkit() -> None:
    texts = ("cat", "a cat", "Dog", "red ball", "B", "3.5", "Both", "both")
    pieces = (
        *"ABCDEZb",
        "(A)",
        "B.",
        "C:",
        "**D**",
        "Option",
        "The answer is",
        "it shows",
        "I think that",
        "because",
        "cat",
        "A/B",
        *texts,
    )
    draw, read = random.Random(20), ""
    for _ in range(2000):
        choices = draw.sample(texts, draw.choice([2, 3, 4]))
        place = metrics.multiple_choice_answer(" ".join(draw.choice(pieces) for _ in range(draw.randrange(8))), choices)
        read += "-" if place is None else "ABCD"[place]
    # What `can_infer` of ms-vlmeval 0.0.20 read in the same answers.
    assert read[:60] == "D--BBBB-A---C---A----C--B--B---D-D-BBB---CA---C-B---------B-"
    assert {letter: read.count(letter) for letter in "-ABCD"} == {"-": 1206, "A": 249, "B": 339, "C": 135, "D": 71}
    assert hashlib.sha256(read.encode()).hexdigest() == "ed84c159c6d03878cf9c0919f1fbdf47bd02bc61d44f026ab91cf9bd10794665"


def test_exact_and_gqa_match() -> None:
    assert metrics.exact_match(" Yes. ", "yes")
    assert not metrics.exact_match("yes it is", "yes")
    assert metrics.gqa_match("Left.", "left")
    assert not metrics.gqa_match("left side", "left")


def test_calibration_by_hand() -> None:
    confidences, hits = torch.tensor([0.9, 0.95, 0.7, 1.0], dtype=torch.float64), torch.tensor([1, 0, 1, 1])
    # Ten bins: [0.7, 0.8) one right at 0.7; [0.9, 1] two of three right at 0.95 on average.
    gaps = (abs(1 - 0.7), abs(2 / 3 - 0.95))
    assert metrics.calibration_error(confidences, hits, num_bins=10) == pytest.approx(gaps[0] / 4 + gaps[1] * 3 / 4)
    with pytest.raises(ValueError, match="num_bins is 0"):
        metrics.calibration_error(confidences, hits, num_bins=0)


def test_calibration_of_one_bin_and_of_a_sure_model() -> None:
    torch.manual_seed(0)
    probabilities, labels = torch.rand(50, 4, dtype=torch.float64).softmax(1), torch.randint(4, (50,))
    confidences, predicted = probabilities.max(1)
    accuracy = (predicted == labels).double().mean()
    assert metrics.calibration_error(confidences, predicted == labels, 1) == pytest.approx(float(abs(accuracy - confidences.mean())))
    assert metrics.calibration_error(torch.ones(3), torch.ones(3)) == 0


def test_averages_by_hand() -> None:
    assert metrics.o_average([0.6, 0.5, 0.1], [0.9]) == pytest.approx((0.4 + 0.9) / 2)
    assert metrics.h_average([0.6, 0.5, 0.1], [0.9]) == pytest.approx(2 * 0.4 * 0.9 / 1.3)
    assert metrics.h_average([0.0], [0.0]) == 0
    with pytest.raises(ValueError, match="kept has no scores"):
        metrics.o_average([], [0.9])
    with pytest.raises(ValueError, match="no negative scores"):
        metrics.h_average([-0.1], [0.9])


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 1))
def test_h_is_at_most_o(kept: list[float], target: float) -> None:
    h, o = metrics.h_average(kept, [target]), metrics.o_average(kept, [target])
    assert 0 <= h <= o + 1e-12
