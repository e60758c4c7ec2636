"""The benchmarks' readers on small files in the official formats, whole and broken."""

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corda_eval.metrics.intervals import bootstrap_interval
from corda_eval.suite.comparison import compare
from corda_eval.vqa import gqa, mmbench, okvqa, pmc_vqa, pope, scienceqa, textvqa, vizwiz, vqav2
from corda_eval.vqa.benchmark import TASKS, score
from corda_eval.vqa.example import VqaExample

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
TEN = ["red"] * 8 + ["Dark red", "blue"]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (255, 0, 0)).save(path)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def people(answers: list[str]) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number, answer in enumerate(answers, 1)]


def write_coco(folder: Path, version: str = "v2_") -> None:
    questions = [
        {"image_id": 42, "question": "What color?", "question_id": 42000},
        {"image_id": 7, "question": "A dog?", "question_id": 7001},
    ]
    notes = [
        {"question_id": 7001, "image_id": 7, "answers": people(["yes"] * 10), "answer_type": "yes/no", "multiple_choice_answer": "yes"},
        {"question_id": 42000, "image_id": 42, "answers": people(TEN), "answer_type": "other", "multiple_choice_answer": "red"},
    ]
    write(folder / f"{version}OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions})
    write(folder / f"{version}mscoco_val2014_annotations.json", {"info": {}, "annotations": notes})
    for number in (42, 7):
        picture(folder / f"val2014/COCO_val2014_{number:012d}.jpg")


@pytest.mark.parametrize(("module", "version", "headline"), [(vqav2, "v2_", "official_2017"), (okvqa, "", "evalai")])
def test_coco_questions(tmp_path: Path, module: Any, version: str, headline: str) -> None:
    write_coco(tmp_path, version)
    first, second = module.load(tmp_path)
    assert first == VqaExample(
        tmp_path / "val2014/COCO_val2014_000000000042.jpg", "What color?" + SHORT, "red", "42000", answers=tuple(TEN), kind="other"
    )
    assert (second.question_id, second.kind) == ("7001", "yes/no")
    assert module.load(tmp_path, limit=1) == [first]
    with pytest.raises(ValueError, match="limit is -1; expected at least 1"):
        module.load(tmp_path, limit=-1)
    result = score(module.TASK, [first, second], ["Red.", "no"])
    assert result.headline == f"vqa_accuracy_{headline}"
    assert result.metrics == pytest.approx({result.headline: 0.5, f"{result.headline}:other": 1, f"{result.headline}:yes/no": 0})


def test_vqav2_in_another_variant(tmp_path: Path) -> None:
    write_coco(tmp_path)
    examples = vqav2.load(tmp_path)
    # All agree on "yes", so the newer script compares the bare texts.
    assert score(vqav2.task("official"), examples, ["red", "Yes"]).metrics["vqa_accuracy_official:yes/no"] == 0
    assert score(vqav2.TASK, examples, ["red", "Yes"]).metrics["vqa_accuracy_official_2017:yes/no"] == 1


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        write(folder / name, change(json.loads((folder / name).read_text())))

    return apply


QUESTIONS, NOTES = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no annotation": (
        edit(NOTES, lambda whole: {"annotations": whole["annotations"][:1]}),
        ValueError,
        r"1 of 2 questions of .* have no annotation in v2_mscoco_val2014_annotations.json, first question 42000",
    ),
    "question twice": (
        edit(QUESTIONS, lambda whole: {"questions": whole["questions"] * 2}),
        ValueError,
        "has 2 value.s. of question id more than once, first '42000'",
    ),
    "annotation twice": (
        edit(NOTES, lambda whole: {"annotations": whole["annotations"] * 2}),
        ValueError,
        "annotations.json has 2 value.s. of question_id more than once",
    ),
    "one answer": (
        edit(NOTES, lambda whole: {"annotations": [row | {"answers": row["answers"][:1]} for row in whole["annotations"]]}),
        ValueError,
        "question 42000 has the answers .* at least two people",
    ),
    "column missing": (
        edit(QUESTIONS, lambda whole: {"questions": [{"question_id": 1}, *whole["questions"]]}),
        ValueError,
        "has 1 row.s. of 3 without all of .*'image_id'.* first row 0",
    ),
    "no questions": (edit(QUESTIONS, lambda whole: {"questions": []}), ValueError, "has no questions"),
    "another file": (edit(QUESTIONS, lambda whole: whole["questions"]), ValueError, "has no list 'questions'"),
    "images missing": (
        lambda folder: (folder / "val2014/COCO_val2014_000000000007.jpg").unlink(),
        FileNotFoundError,
        "1 of 2 questions of .* have no image, the first is question '7001' with .*000000000007.jpg; put the images there",
    ),
    "cut off": (lambda folder: write(folder / NOTES, '{"annotations": [{'), ValueError, "annotations.json is not whole JSON"),
    "file missing": (lambda folder: (folder / NOTES).unlink(), FileNotFoundError, "There is no file .*annotations.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_coco_questions_broken(tmp_path: Path, case: str) -> None:
    write_coco(tmp_path)
    spoil, error, text = BROKEN[case]
    spoil(tmp_path)
    with pytest.raises(error, match=text) as caught:
        vqav2.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_textvqa(tmp_path: Path) -> None:
    row = {"question_id": 34602, "image_id": "003a", "question": "what brand is the NOKIA? Or TV?", "answers": TEN, "image_width": 6}
    write(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})
    picture(tmp_path / "train_images/003a.jpg")
    (plain,) = textvqa.load(tmp_path)
    assert (plain.question, plain.answer, plain.answers) == ("What brand is the nokia? or tv?" + SHORT, "red", tuple(TEN))
    with pytest.raises(FileNotFoundError, match="Rosetta"):
        TASKS["textvqa_ocr"].load(tmp_path)
    ocr = tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json"
    write(ocr, {"data": [{"image_id": "003a", "ocr_tokens": ["NOKIA", "3310"]}]})
    (read,) = TASKS["textvqa_ocr"].load(tmp_path)
    assert read.question == "What brand is the nokia? or tv?\nReference OCR token: NOKIA, 3310" + SHORT
    write(ocr, {"data": [{"image_id": "other", "ocr_tokens": []}]})
    with pytest.raises(ValueError, match="1 of 1 questions have no OCR in .*, first question 34602"):
        textvqa.load(tmp_path, ocr=True)


def test_vizwiz(tmp_path: Path) -> None:
    row = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "what is THIS? Thank you.",
        "answers": people(TEN),
        "answer_type": "other",
        "answerable": 1,
    }
    write(tmp_path / "Annotations/val.json", [row])
    picture(tmp_path / "val/VizWiz_val_00000000.jpg")
    (example,) = vizwiz.load(tmp_path)
    assert (
        example.question == f"What is this? thank you.\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
    )
    assert (example.question_id, example.answer, example.kind) == ("VizWiz_val_00000000.jpg", "red", "other")
    write(tmp_path / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}])
    with pytest.raises(ValueError, match="without all of .*'answers'"):
        vizwiz.load(tmp_path, split="test")


def test_gqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "201307251": {"question": "Is it red?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}},
        "201640614": {"question": "Who?", "imageId": "n1", "answer": "girl", "types": {"structural": "query"}},
    }
    write(tmp_path / "questions/testdev_balanced_questions.json", rows)
    picture(tmp_path / "images/n1.jpg")
    examples = gqa.load(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    named = gqa.load(tmp_path.name)  # no id, though it could be one
    assert [example.question for example in named] == [example.question for example in examples]
    assert [(example.question_id, example.answer, example.kind) for example in examples] == [
        ("201307251", "yes", "binary"),
        ("201640614", "girl", "open"),
    ]
    assert score(gqa.TASK, examples, ["Yes.", "the girl"]).metrics == {"accuracy": 0.5, "accuracy:binary": 1, "accuracy:open": 0}


def write_scienceqa(folder: Path) -> None:
    base = {"choices": ["west", "east"], "answer": 0, "split": "test", "task": "closed choice"}
    problems = {
        "4": base | {"question": "Which way?", "hint": "", "image": None},
        "11": base | {"question": "Which side?", "hint": "A map.", "image": "image.png", "answer": 1},
        "12": base | {"question": "Not of this split?", "hint": "", "image": "image.png"},
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"test": ["4", "11"], "train": ["12"]})
    picture(folder / "images/test/11/image.png")


def test_scienceqa(tmp_path: Path) -> None:
    write_scienceqa(tmp_path)
    text, seen = scienceqa.load(tmp_path)
    assert text == VqaExample(None, f"Which way?\nA. west\nB. east{LETTER}", "A", "4", choices=("west", "east"), kind="text")
    assert seen.question == f"Context: A map.\nWhich side?\nA. west\nB. east{LETTER}"
    assert seen.image == tmp_path / "images/test/11/image.png"
    assert TASKS["scienceqa_image"].load(tmp_path, limit=1) == [seen]
    result = score(scienceqa.TASK, [text, seen], ["B", "B. east"])
    assert result.metrics == {"accuracy": 0.5, "accuracy:image": 1, "accuracy:text": 0}
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], not 'dev'"):
        scienceqa.load(tmp_path, split="dev")
    write(tmp_path / "pid_splits.json", {"test": ["4", "99"]})
    with pytest.raises(ValueError, match="1 of 2 questions of 'test' are not in"):
        scienceqa.load(tmp_path)


def test_scienceqa_answer_out_of_place(tmp_path: Path) -> None:
    write_scienceqa(tmp_path)
    edit("problems.json", lambda whole: whole | {"4": whole["4"] | {"answer": 2}})(tmp_path)
    with pytest.raises(ValueError, match="question 4 has the answer 2; expected a place among its 2 choices"):
        scienceqa.load(tmp_path)


def write_pope(folder: Path) -> None:
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": number, "image": "COCO_val2014_000000000042.jpg", "text": f"Is there a {thing} in the image?", "label": label}
            for number, (thing, label) in enumerate([("dog", "yes"), ("cat", "no")], 1)
        ]
        write(folder / f"coco_pope_{category}.json", "".join(json.dumps(row) + "\n" for row in rows))
    picture(folder / "val2014/COCO_val2014_000000000042.jpg")


def test_pope(tmp_path: Path) -> None:
    write_pope(tmp_path)
    examples = pope.load(tmp_path)
    assert [example.question_id for example in examples] == [f"{c}/{n}" for c in ("random", "popular", "adversarial") for n in (1, 2)]
    assert examples[0].question == "Is there a dog in the image?" + SHORT
    assert [item.kind for item in pope.load(tmp_path, split="popular")] == ["popular"] * 2
    result = score(pope.TASK, examples, ["Yes", "No, there is no cat.", "Yes.", "Yes", "No", "no"])
    assert result.metrics["accuracy"] == pytest.approx(4 / 6)
    assert [result.metrics[f"f1:{c}"] for c in ("random", "popular", "adversarial")] == pytest.approx([1, 2 / 3, 0])
    assert result.metrics["mean_f1"] == pytest.approx(5 / 9)
    assert result.metrics["yes_ratio"] == pytest.approx(0.5)


def test_pope_broken(tmp_path: Path) -> None:
    write_pope(tmp_path)
    path = tmp_path / "coco_pope_popular.json"
    whole = path.read_text()
    for content, text in (
        (whole[:-20], "coco_pope_popular.json, line 2 is not whole JSON"),
        (whole * 2, "2 value.s. of question_id more than once, first '1'"),
        (whole.replace('"no"', '"none"'), "1 label.s. that are neither .* first of question 2"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=text):
            pope.load(tmp_path)
    with pytest.raises(ValueError, match="split is 'test'; expected one of"):
        pope.load(tmp_path, split="test")


def table(rows: list[dict[str, str]], delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def test_pmc_vqa_in_both_versions(tmp_path: Path) -> None:
    choices = {f"Choice {letter}": f" {letter}:{text} " for letter, text in zip("ABCD", ("CT", "MRI, T2", "X-ray", "PET"), strict=True)}
    second = {
        "index": "17",
        "Figure_path": "PMC1_F1.jpg",
        "Caption": "c",
        "Question": "What is it?",
        **choices,
        "Answer": "B",
        "split": "test",
    }
    first = {"Figure_path": "PMC1_F1.jpg", "Question": "What is it?", "Answer": "MRI, T2", **choices, "Answer_label": "B"}
    write(tmp_path / "test_2.csv", table([second], ","))
    write(tmp_path / "test_clean.csv", table([first], ","))
    for folder in ("figures", "images"):
        picture(tmp_path / folder / "PMC1_F1.jpg")
    (new,), (old,) = pmc_vqa.load(tmp_path), pmc_vqa.load(tmp_path, split="test_clean")
    assert new.question == old.question == f"What is it?\nA. CT\nB. MRI, T2\nC. X-ray\nD. PET{LETTER}"
    assert (new.answer, new.question_id, old.answer, old.question_id) == ("B", "17", "B", "0")
    assert [score(pmc_vqa.TASK, [new], [answer]).metrics["accuracy"] for answer in ("B", "B: MRI", "mri, t2", "A", "none")] == [
        1,
        1,
        1,
        0,
        0,
    ]
    write(tmp_path / "test_2.csv", table([second], ",").replace(",B,test", ",E,test"))
    with pytest.raises(ValueError, match="row 0, counted from 0, has the label 'E'"):
        pmc_vqa.load(tmp_path)


def mmbench_rows() -> list[dict[str, str]]:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (0, 0, 255)).save(buffer, format="PNG")
    row = {
        "index": "5",
        "question": "Which\none?",
        "hint": "nan",
        "A": "dog",
        "B": "cat",
        "C": "",
        "D": "",
        "answer": "A",
        "category": "animals",
    }
    image = base64.b64encode(buffer.getvalue()).decode()
    return [
        row | {"image": image},
        row | {"index": "1000005", "A": "cat", "B": "dog", "answer": "B", "image": "5"},
        row | {"index": "6", "hint": "Look.", "C": "cow", "image": image},
    ]


def test_mmbench(tmp_path: Path) -> None:
    write(tmp_path / "mmbench_dev_20230712.tsv", table(mmbench_rows(), "\t"))
    examples = mmbench.load(tmp_path)
    assert [example.question for example in examples] == [
        f"Which\none?\nA. dog\nB. cat{LETTER}",
        f"Which\none?\nA. cat\nB. dog{LETTER}",
        f"Look.\nWhich\none?\nA. dog\nB. cat\nC. cow{LETTER}",
    ]
    assert mmbench.load(tmp_path, limit=1) == examples[:2]
    assert examples[0].image == examples[1].image
    picture_of_row = examples[1].open_image()
    assert picture_of_row is not None
    assert picture_of_row.size == (6, 4)
    result = score(mmbench.TASK, examples, ["A", "A", "A"])
    assert result.metrics == pytest.approx({"accuracy": 2 / 3, "accuracy:animals": 2 / 3, "circular_accuracy": 0.5})
    assert (result.headline, result.scores, result.num_examples) == ("circular_accuracy", [0, 1], 2)
    assert [(record["id"], record["score"]) for record in result.records] == [("5", 1), ("1000005", 0), ("6", 1)]
    better = score(mmbench.TASK, examples, ["The answer is A", "Option B", "A dog"])
    (row,) = compare([result], [better], {"mmbench": "kept"})
    assert (row.metric, row.before, row.after, row.num_examples) == ("circular_accuracy", 0.5, 1, 2)
    assert row.interval == bootstrap_interval([0, 1], [1, 1])  # questions are drawn, with all their rotations


def test_mmbench_counts_by_question_whatever_the_order(tmp_path: Path) -> None:
    item, other, *rest = mmbench_rows()
    write(tmp_path / "mmbench_dev_20230712.tsv", table([*rest, other, item], "\t"))
    examples = mmbench.load(tmp_path)
    assert [example.group for example in examples] == ["6", "5", "5"]
    assert score(mmbench.TASK, examples, ["A", "B", "B"]).scores == [1, 0]


def test_answers_are_cut_where_llava_cuts_them() -> None:
    limits = {name: task.max_new_tokens for name, task in TASKS.items()}
    assert {name for name, limit in limits.items() if limit == 1024} == {"mmbench", "scienceqa", "scienceqa_image"}
    others = {"mmbench", "scienceqa", "scienceqa_image", "easy_vqa", "digits"}
    assert {name for name, limit in limits.items() if limit == 128} == limits.keys() - others


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"answer": "AB"}, "index 5 has the answer 'AB'"),
        ({"answer": "C"}, "index 5 has the answer 'C' and 2 choices"),
        ({"answer": ""}, "index 5 has the answer ''"),
        ({"image": "?"}, "index 5 has an image that is no base64"),
        ({"image": ""}, "index 5 has no image"),
        ({"index": "6"}, "1 value.s. of index more than once, first '6'"),
    ],
)
def test_mmbench_broken(tmp_path: Path, change: dict[str, str], text: str) -> None:
    first, *others = mmbench_rows()
    write(tmp_path / "mmbench_dev_20230712.tsv", table([first | change, *others], "\t"))
    with pytest.raises(ValueError, match=text):
        mmbench.load(tmp_path)


def test_easy_vqa_is_a_task_too() -> None:
    pytest.importorskip("easy_vqa")
    examples = TASKS["easy_vqa"].load(limit=3)
    assert [example.question_id for example in examples] == ["0", "1", "2"]
    assert score(TASKS["easy_vqa"], examples, [example.answer.upper() + "." for example in examples]).metrics["accuracy"] == 1


def test_score_refuses_missing_answers() -> None:
    with pytest.raises(ValueError, match="1 answers to 0 questions"):
        score(gqa.TASK, [], ["yes"])
