"""The benchmarks from tables in the columns that their copies on the hub have, whole and broken."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corda_eval.vqa import gqa, mmbench, okvqa, pmc_vqa, pope, scienceqa, textvqa, vizwiz, vqav2
from corda_eval.vqa.benchmark import TASKS, score
from corda_eval.vqa.example import VqaExample
from corda_eval.vqa.predictions import run_header

datasets = pytest.importorskip("datasets")

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
TEN = ["red"] * 8 + ["Dark red", "blue"]
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def picture(red: int = 255) -> dict[str, Any]:
    """An image as ``datasets`` stores it."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (red, 0, 0)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table_of(rows: Rows) -> Any:
    table = datasets.Dataset.from_list(rows)
    stored = [row["image"] for row in rows if row.get("image")]
    # The type ``Image`` wants to see the files of images that are not inside.
    return table.cast_column("image", datasets.Image()) if any(item["bytes"] for item in stored) else table


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table_of(rows).to_parquet(path)
    return path


def vqav2_rows() -> Rows:
    return [
        {
            "question_type": "what color",
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": item, "answer_confidence": "yes", "answer_id": place} for place, item in enumerate(answers, 1)],
            "image_id": 42 + number,
            "answer_type": kind,
            "question_id": 42000 + number,
            "question": "What color?",
            "image": picture(number),
        }
        for number, (answers, kind) in enumerate([(TEN, "other"), (["yes"] * 10, "yes/no"), (["2"] * 10, "number")])
    ]


def people_rows(**more: Any) -> Rows:
    return [{"question_id": f"q{number}", "image": picture(number), "question": "What?", "answers": TEN, **more} for number in range(3)]


def scienceqa_rows() -> Rows:
    common = {"choices": ["west", "east"], "task": "closed choice", "subject": "social science", "lecture": "", "solution": ""}
    return [
        {"image": None, "question": "Which way?", "answer": 0, "hint": "", **common},
        {"image": picture(), "question": "Which side?", "answer": 1, "hint": "A map.", **common},
    ]


def pope_rows() -> Rows:
    return [
        {
            "id": str(place),
            "question_id": str(number),
            "question": f"Is there a {thing} in the image?",
            "answer": answer,
            "image_source": "COCO_val2014_000000000042",
            "image": picture(),
            "category": category,
        }
        for place, category in enumerate(("adversarial", "popular", "random"))
        for number, (thing, answer) in enumerate([("dog", "yes"), ("cat", "no")], 1)
    ]


def pmc_rows() -> Rows:
    choices = {"choice a": " A:CT ", "choice b": " B:MRI, T2", "choice c": "X-ray", "choice d": "PET"}
    return [{"image": picture(), "caption": "c", "question": "What is it? ", "answer": "MRI, T2", **choices, "answer label": "B"}]


def mmbench_rows() -> Rows:
    row = {"question": "Which\none?", "hint": "nan", "A": "dog", "B": "cat", "C": "nan", "D": None, "answer": "A", "category": "animals"}
    return [
        {"index": 5, **row, "image": picture(1), "L2-category": "x"},
        {"index": 1000005, **row, "A": "cat", "B": "dog", "answer": "B", "image": picture(1), "L2-category": "x"},
        {"index": 6, **row, "hint": "Look.", "C": "cow", "image": picture(2), "L2-category": "x"},
    ]


def gqa_rows() -> tuple[Rows, Rows]:
    questions = [
        {"id": "201307251", "imageId": "n1", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}},
        {"id": "201640614", "imageId": "n2", "question": "Who?", "answer": "girl", "types": {"structural": "query"}},
        {"id": "201640615", "imageId": "n1", "question": "What?", "answer": "cow", "types": {"structural": "query"}},
    ]
    return questions, [{"id": "n2", "image": picture(2)}, {"id": "n1", "image": picture(1)}]


def test_vqav2_in_a_file_and_as_the_hub_names_files(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", vqav2_rows())
    examples = vqav2.load(path)
    first = examples[0]
    assert (first.question, first.answer, first.answers, first.kind) == ("What color?" + SHORT, "red", tuple(TEN), "other")
    assert [example.question_id for example in examples] == ["42000", "42001", "42002"]
    opened = [example.open_image() for example in examples]
    assert [image and image.getpixel((0, 0)) for image in opened] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert [item.question_id for item in vqav2.load(path, limit=1)] == ["42000"]
    assert score(vqav2.TASK, examples, ["Red.", "no", "2"]).metrics["vqa_accuracy_official_2017"] == pytest.approx(2 / 3)
    write(tmp_path / "folder/validation-00000-of-00001.parquet", vqav2_rows())
    write(tmp_path / "folder/testdev-00000-of-00001.parquet", vqav2_rows()[:1])
    assert len(vqav2.load(tmp_path / "folder")) == 3
    assert len(vqav2.load(tmp_path / "folder", split="testdev")) == 1
    with pytest.raises(ValueError, match=r"files of the splits \['testdev', 'validation'\], not 'val'"):
        vqav2.load(tmp_path / "folder", split="val")
    with pytest.raises(ValueError, match="split is 'test', but .*rows.parquet has no splits"):
        vqav2.load(path, split="test")
    with pytest.raises(ValueError, match="limit is -1"):
        vqav2.load(path, limit=-1)


def test_tables_of_save_to_disk_and_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = people_rows(question_type="one", answer_type="other")
    datasets.DatasetDict({"val2014": table_of(rows)}).save_to_disk(tmp_path / "splits")
    table_of(rows).save_to_disk(tmp_path / "alone")
    for folder in ("splits", "alone"):
        assert [(item.question_id, item.answers, item.kind) for item in okvqa.load(tmp_path / folder)] == [
            (f"q{number}", tuple(TEN), "other") for number in range(3)
        ]
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: asked.append((given, options)) or table_of(rows))
    assert len(okvqa.load("lmms-lab/OK-VQA", limit=2, download=True)) == 2
    assert asked == [(("lmms-lab/OK-VQA", None), {"split": "val2014"})]
    with pytest.raises(ValueError, match=r"'lmms-lab/OK-VQA' .* is neither a local path nor whole in the cache .* `download: true`"):
        okvqa.load("lmms-lab/OK-VQA")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        okvqa.load("nowhere")


def test_of_several_configurations_the_benchmarks_own_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    questions, images = gqa_rows()
    tables = {"ScienceQA-FULL": scienceqa_rows(), "en": mmbench_rows(), "default": pope_rows(), None: scienceqa_rows()}
    tables |= {"testdev_balanced_instructions": questions, "testdev_balanced_images": images}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: asked.append((subset, split)) or table_of(tables[subset]))
    assert len(scienceqa.load("lmms-lab/ScienceQA", download=True)) == 2
    assert len(scienceqa.load("derek-thomas/ScienceQA", download=True, only_images=True)) == 1
    assert len(mmbench.load("lmms-lab/MMBench", download=True)) == 3
    assert len(pope.load("lmms-lab/POPE", download=True)) == 6
    assert len(gqa.load("lmms-lab/GQA", download=True)) == 3
    assert asked == [
        ("ScienceQA-FULL", "test"),
        (None, "test"),
        ("en", "dev"),
        ("default", "test"),
        ("testdev_balanced_instructions", "testdev"),
        ("testdev_balanced_images", "testdev"),
    ]


def test_textvqa(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", people_rows(image_id="003a", ocr_tokens=["NOKIA", "3310"], set_name="val"))
    assert textvqa.load(path)[0].question == "What?" + SHORT
    assert TASKS["textvqa_ocr"].load(path)[0].question == "What?\nReference OCR token: NOKIA, 3310" + SHORT
    bare = write(tmp_path / "bare.parquet", people_rows())
    with pytest.raises(ValueError, match=r"3 row.s. of 3 without all of .* which lacks \['ocr_tokens'\]"):
        textvqa.load(bare, ocr=True)


def test_vizwiz(tmp_path: Path) -> None:
    example = vizwiz.load(write(tmp_path / "t.parquet", people_rows(category="unanswerable")))[0]
    assert example.question == f"What?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
    assert example.kind == "unanswerable"
    with pytest.raises(ValueError, match=r"3 row.s. of 3 without all of .* which lacks \['answers'\]"):  # the split "test"
        vizwiz.load(write(tmp_path / "test.parquet", [{**row, "answers": None} for row in people_rows()]))


def test_gqa_from_its_two_tables(tmp_path: Path) -> None:
    questions, images = gqa_rows()
    write(tmp_path / "testdev_balanced_instructions/testdev-00000-of-00001.parquet", questions)
    write(tmp_path / "testdev_balanced_images/testdev-00000-of-00001.parquet", images)
    examples = gqa.load(tmp_path)
    assert [(example.question_id, example.answer, example.kind) for example in examples] == [
        ("201307251", "yes", "binary"),
        ("201640614", "girl", "open"),
        ("201640615", "cow", "open"),
    ]
    reds = [image.getpixel((0, 0)) for example in examples if (image := example.open_image()) is not None]
    assert reds == [(1, 0, 0), (2, 0, 0), (1, 0, 0)]
    assert len(gqa.load(tmp_path, limit=2)) == 2
    write(tmp_path / "testdev_balanced_images/testdev-00000-of-00001.parquet", images[:1])
    with pytest.raises(ValueError, match=r"2 of 3 questions of .* have no image in testdev_balanced_images, first question '201307251'"):
        gqa.load(tmp_path)


def test_scienceqa(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", scienceqa_rows())
    text, seen = scienceqa.load(path)
    assert text == VqaExample(None, f"Which way?\nA. west\nB. east{LETTER}", "A", "0", choices=("west", "east"), kind="text")
    assert seen.question == f"Context: A map.\nWhich side?\nA. west\nB. east{LETTER}"
    assert (seen.answer, seen.question_id, seen.kind) == ("B", "1", "image")
    assert [item.question_id for item in TASKS["scienceqa_image"].load(path, limit=1)] == ["1"]
    with pytest.raises(ValueError, match="question 0 has the answer 2; expected a place among its 2 choices"):
        scienceqa.load(write(tmp_path / "bad.parquet", [scienceqa_rows()[0] | {"answer": 2}, scienceqa_rows()[1]]))


def test_pope(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", pope_rows())
    examples = pope.load(path)
    assert [example.question_id for example in examples] == [f"{c}/{n}" for c in ("random", "popular", "adversarial") for n in (1, 2)]
    assert examples[0].question == "Is there a dog in the image?" + SHORT
    assert [item.question_id for item in pope.load(path, split="popular", limit=1)] == ["popular/1"]
    with pytest.raises(ValueError, match=r"2 row.s. of 6 of other categories than .*, first question 1 of 'rare'"):
        pope.load(write(tmp_path / "c.parquet", [row | {"category": row["category"].replace("random", "rare")} for row in pope_rows()]))
    with pytest.raises(ValueError, match="1 value.s. of question_id more than once, first '1'"):
        pope.load(write(tmp_path / "d.parquet", [row | {"question_id": "1"} for row in pope_rows()]))


def test_pmc_vqa(tmp_path: Path) -> None:
    (example,) = pmc_vqa.load(write(tmp_path / "t.parquet", pmc_rows()))
    assert example.question == f"What is it?\nA. CT\nB. MRI, T2\nC. X-ray\nD. PET{LETTER}"
    assert (example.answer, example.question_id) == ("B", "0")
    with pytest.raises(ValueError, match="row 0, counted from 0, has the label 'E'"):
        pmc_vqa.load(write(tmp_path / "bad.parquet", [pmc_rows()[0] | {"answer label": "E"}]))


def test_mmbench(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", mmbench_rows())
    examples = mmbench.load(path)
    assert [example.question for example in examples] == [
        f"Which\none?\nA. dog\nB. cat{LETTER}",
        f"Which\none?\nA. cat\nB. dog{LETTER}",
        f"Look.\nWhich\none?\nA. dog\nB. cat\nC. cow{LETTER}",
    ]
    assert [item.question_id for item in mmbench.load(path, limit=1)] == ["5", "1000005"]
    assert score(mmbench.TASK, examples, ["A", "B", "A"]).metrics["circular_accuracy"] == 1


def spoilt(change: Callable[[dict[str, Any]], Any]) -> Callable[[Rows], Rows]:
    """Return what changes the second row."""
    return lambda rows: [rows[0], change(rows[1]), *rows[2:]]


BROKEN: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "no column": (
        lambda rows: [{key: value for key, value in row.items() if key != "answers"} for row in rows],
        r"3 row.s. of 3 without all of .* first row 0, counted from 0, which lacks \['answers'\]",
    ),
    "no image column": (
        lambda rows: [{key: value for key, value in row.items() if key != "image"} for row in rows],
        r"3 row.s. of 3 .* lacks \['image'\]",
    ),
    "no question": (spoilt(lambda row: row | {"question": None}), r"1 row.s. of 3 .* first row 1, .* lacks \['question'\]"),
    "no image": (spoilt(lambda row: row | {"image": None}), r"1 row.s. of 3 .* first row 1, .* lacks \['image'\]"),
    "empty image": (spoilt(lambda row: row | {"image": {"bytes": None, "path": None}}), r"1 row.s. of 3 .* lacks \['image'\]"),
    "image elsewhere": (
        lambda rows: [row | {"image": {"bytes": None, "path": "gone.jpg"}} for row in rows],
        "3 of 3 questions of .* have no image, the first is question '42000' with .*gone.jpg; put the images there",
    ),
    "question twice": (spoilt(lambda row: row | {"question_id": 42000}), "1 value.s. of question id more than once, first '42000'"),
    "one answer": (spoilt(lambda row: row | {"answers": row["answers"][:1]}), "question 42001 has the answers .* at least two people"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tables_are_named_and_counted(tmp_path: Path, case: str) -> None:
    spoil, text = BROKEN[case]
    path = write(tmp_path / "broken.parquet", spoil(vqav2_rows()))
    with pytest.raises((ValueError, FileNotFoundError), match=text) as caught:
        vqav2.load(path)
    assert "\n" not in str(caught.value)
    assert "broken.parquet" in str(caught.value)


def test_images_of_another_type_are_refused(tmp_path: Path) -> None:
    rows = [row | {"image": "aGVsbG8="} for row in mmbench_rows()]  # base64, as in some copies
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="t.parquet, row 0 has a str for its image; expected an image of datasets"):
        mmbench.load(tmp_path / "t.parquet")


def test_a_damaged_image_names_its_question(tmp_path: Path) -> None:
    rows = vqav2_rows()
    rows[1]["image"] = {"bytes": b"abc", "path": None}
    example = vqav2.load(write(tmp_path / "t.parquet", rows))[1]
    with pytest.raises(ValueError, match="question '42001': the image of 3 bytes cannot be read .not an image"):
        example.open_image()
    with pytest.raises(ValueError, match="question '42001'"):
        example.as_item()


def test_predictions_tell_other_images_apart(tmp_path: Path, llava: Any, processor: Any) -> None:
    rows = vqav2_rows()
    headers = []
    for name in ("one", "other"):
        examples = vqav2.load(write(tmp_path / f"{name}.parquet", rows))
        headers += [run_header("t", examples, llava, processor, {})["questions"] for _ in range(2)]
        rows[0]["image"] = picture(77)
    assert headers[0] == headers[1] != headers[2] == headers[3]
