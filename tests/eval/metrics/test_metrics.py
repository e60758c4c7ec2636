"""Metrics against recorded cases of the official evaluations, cases counted by hand, and what must hold for all inputs."""

import hashlib
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_eval import metrics
from corda_eval.metrics import recall
from corda_eval.metrics.strings import edit_distance
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


def test_scienceqa_accuracy() -> None:
    assert metrics.scienceqa_accuracy(["A", "B. x", "C?", "D"], ["A", "B", "C", "A"]) == 0.5
    with pytest.raises(ValueError, match="1 predictions and 2 answers"):
        metrics.scienceqa_accuracy(["A"], ["A", "B"])


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


@pytest.mark.parametrize(
    ("prediction", "answers", "raw", "trimmed"),
    [
        ("Hello", ["hello"], 1, 1),
        ("helo", ["hello"], 0.8, 0.8),
        ("ab", ["ax"], 0.5, 0.5),
        ("abc", ["axy"], 0, 0),
        ("x", ["other", "X"], 1, 1),
        ("", [""], 1, 1),
        # One of five raw characters is wrong, or one of three that are left.
        (" abd ", ["abc"], 0.8, 2 / 3),
        ("a  b", ["a b"], 1, 0.75),
        # In upper case "ß" is two letters, and the official scripts divide by those.
        ("Strase", ["Straße"], 6 / 7, 5 / 6),
        ("Grus", ["x", "Gruß"], 0.8, 0.75),
    ],
)
def test_anls(prediction: str, answers: list[str], raw: float, trimmed: float) -> None:
    assert metrics.anls(prediction, answers) == pytest.approx(raw)
    assert metrics.anls(prediction, answers, raw_length=False) == pytest.approx(trimmed)


def test_anls_refuses_no_answers() -> None:
    with pytest.raises(ValueError, match="at least one right answer"):
        metrics.anls("a", [])


@settings(deadline=None)
@given(st.text(alphabet="abc", max_size=6), st.text(alphabet="abc", max_size=6), st.text(alphabet="abc", max_size=6))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("10%", "0.1", True),
        ("10", "10%", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("Blue", "blue", True),
        ("blue", "3", False),
    ],
)
def test_relaxed_accuracy(prediction: str, target: str, right: bool) -> None:
    assert metrics.relaxed_accuracy(prediction, target) is right


@pytest.mark.parametrize("chunk", [3, 1024])
def test_recall_counted_by_sorting(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "CHUNK", chunk)
    images, texts, owners = torch.randn(7, 4), torch.randn(20, 4), torch.arange(20) % 7
    scores = torch.nn.functional.normalize(texts, dim=-1) @ torch.nn.functional.normalize(images, dim=-1).T
    found = metrics.recall_at_k(images, texts, owners, ks=(1, 3))
    for k in (1, 3):
        images_right = [int(owners[t]) in scores[t].argsort(descending=True)[:k].tolist() for t in range(20)]
        texts_right = [any(int(owners[t]) == i for t in scores[:, i].argsort(descending=True)[:k]) for i in range(7)]
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(sum(images_right) / 20)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(sum(texts_right) / 7)


def test_recall_breaks_ties_by_place() -> None:
    same = torch.ones(3, 2)
    found = metrics.recall_at_k(same, same, torch.tensor([2, 1, 0]), ks=(1, 2, 3))
    assert [found[f"image_retrieval_recall@{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [found[f"text_retrieval_recall@{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    ("images", "owners", "text"),
    [
        (torch.full((2, 2), torch.nan), [0, 1], "not finite"),
        (torch.ones(3, 2), [0, 1], "1 image.* no caption, first number 2"),
        (torch.ones(2, 2), [0, 5], "outside 0 … 1"),
        (torch.ones(2, 3), [0, 1], "The shapes are"),
    ],
)
def test_recall_refuses(images: torch.Tensor, owners: list[int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        metrics.recall_at_k(images, torch.ones(2, 2), torch.tensor(owners))


def test_calibration_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.95, 0.05], [0.3, 0.7], [1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0])
    # Ten bins: [0.7, 0.8) one right at 0.7; [0.9, 1] two of three right at 0.95 on average.
    gaps = (abs(1 - 0.7), abs(2 / 3 - 0.95))
    assert metrics.expected_calibration_error(probabilities, labels, num_bins=10) == pytest.approx(gaps[0] / 4 + gaps[1] * 3 / 4)
    assert metrics.maximum_calibration_error(probabilities, labels, num_bins=10) == pytest.approx(max(gaps))
    assert metrics.negative_log_likelihood(probabilities[:3], labels[:3]) == pytest.approx(-math.log(0.9 * 0.05 * 0.7) / 3)


def test_calibration_of_one_bin_and_of_a_sure_model() -> None:
    torch.manual_seed(0)
    probabilities, labels = torch.rand(50, 4, dtype=torch.float64).softmax(1), torch.randint(4, (50,))
    accuracy = (probabilities.argmax(1) == labels).double().mean()
    assert metrics.expected_calibration_error(probabilities, labels, 1) == pytest.approx(
        float(abs(accuracy - probabilities.max(1)[0].mean()))
    )
    assert metrics.expected_calibration_error(torch.eye(3), torch.arange(3)) == 0
    for bad, text in ((torch.randn(3, 3), "no logits"), (torch.eye(3)[:2], "has shape"), (torch.full((3, 3), torch.nan), "no logits")):
        with pytest.raises(ValueError, match=text):
            metrics.expected_calibration_error(bad, torch.arange(3))
    with pytest.raises(ValueError, match="outside 0 … 2"):
        metrics.expected_calibration_error(torch.eye(3), torch.arange(3) + 1)


def test_retention_by_hand() -> None:
    before, after = {"new": 0.1, "old": 0.8, "older": 0.5, "never": 0.0}, {"new": 0.9, "old": 0.6, "older": 0.5, "never": 0.1}
    assert metrics.drops(before, after) == pytest.approx({"new": -0.8, "old": 0.2, "older": 0, "never": -0.1})
    assert metrics.retained(before, after) == pytest.approx({"new": 9, "old": 0.75, "older": 1})
    assert metrics.retention_summary(before, after, target=["new"]) == pytest.approx(
        {
            "gain": 0.8,
            "mean_drop": 0.1 / 3,
            "worst_drop": 0.2,
            "mean_retention": 0.875,
            "worst_retention": 0.75,
            "o_average": (0.4 + 0.9) / 2,
            "h_average": 2 * 0.4 * 0.9 / 1.3,
        }
    )
    assert metrics.h_average([0.0], [0.0]) == 0
    with pytest.raises(ValueError, match="expected the same"):
        metrics.drops(before, {"new": 1})
    with pytest.raises(ValueError, match=r"target names \['newest'\]"):
        metrics.retention_summary(before, after, target=["newest"])
    with pytest.raises(ValueError, match="kept has no scores"):
        metrics.retention_summary(before, after, target=list(before))


def test_continual_learning_by_hand() -> None:
    scores = [[0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.7, 0.6, 0.9]]
    assert metrics.backward_transfer(scores) == pytest.approx(((0.7 - 0.9) + (0.6 - 0.8)) / 2)
    assert metrics.forward_transfer(scores, [0.0, 0.1, 0.1]) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert metrics.forgetting(scores) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.6)) / 2)
    for bad in ([[1.0]], [[1.0, 0.0], [1.0]]):
        with pytest.raises(ValueError, match="as many tasks as stages"):
            metrics.forgetting(bad)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 1))
def test_h_is_at_most_o(kept: list[float], target: float) -> None:
    h, o = metrics.h_average(kept, [target]), metrics.o_average(kept, [target])
    assert 0 <= h <= o + 1e-12
