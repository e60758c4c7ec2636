"""Files, folders and ids in the formats that users have give the same items; what does not is named."""

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rows import encoded, noise, pixels_of, turns, write_json, write_llava
from torchvision.transforms.functional import pil_to_tensor

from corda_vlm.data.items import load_items
from corda_vlm.data.samples import Collator, has_image
from corda_vlm.data.sources import DataConfig
from corda_vlm.yaml import from_mapping

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of datasets of one's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def llava(tmp_path: Path) -> str:
    return write_llava(tmp_path)


# What sources give


def test_llava_rows_give_conversations_and_images(llava: str, tmp_path: Path, processor: Any) -> None:
    items = load_items(DataConfig(llava))
    assert len(items) == 5
    assert set(items[0]) == {"conversations", "image"}
    assert items[0]["conversations"] == turns("<image>\nwhat color ?", "red")
    assert [torch.equal(pixels_of(items[i]), pil_to_tensor(noise(i))) for i in range(4)] == [True] * 4
    assert set(items[4]) == {"conversations"}
    assert [has_image(item) for item in items] == [True] * 4 + [False]
    batch = Collator(processor, with_labels=True)([items[0], items[4]])
    assert batch["pixel_values"].shape[0] == 1
    moved = tmp_path / "elsewhere.json"
    Path(llava).rename(moved.parent / "coco" / moved.name)
    again = load_items(DataConfig(str(tmp_path / "coco/elsewhere.json"), images=str(tmp_path)))
    assert torch.equal(pixels_of(again[1]), pixels_of(items[1]))


def test_jsonl_rows_may_differ_in_their_columns(tmp_path: Path) -> None:
    noise(0, "L").save(tmp_path / "grey.png")
    rows = [{"question": "a", "answer": True, "id": 1}, {"id": "x", "question": "b"}, {"question": 3, "image": "grey.png", "answer": 2.5}]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    items = load_items(DataConfig(str(tmp_path / "rows.jsonl")))
    assert items[0] == {"question": "a", "answer": "True"}
    assert items[1] == {"question": "b"}
    assert (items[2]["question"], items[2]["answer"], items[2]["image"].mode) == ("3", "2.5", "RGB")
    assert len(load_items(DataConfig(str(tmp_path / "rows.jsonl"), limit=2))) == 2


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "splits", "features"])
def test_arrow_sources_give_the_same_items(kind: str, tmp_path: Path) -> None:
    values = {
        "image": [{"bytes": encoded(noise(i)), "path": f"{i}.png"} for i in range(4)],
        "query": ["a", "b", "c", "d"],
        "label": [[{"answer": "x", "answer_id": 1}, {"answer": "y", "answer_id": 2}]] * 4,
    }
    table = datasets.Dataset.from_dict(values)
    if kind == "features":
        table = table.cast_column("image", datasets.Image())
    source, split = tmp_path / "source", "train"
    if kind in ("parquet", "features"):
        source = tmp_path / "rows.parquet"
        table.to_parquet(source)
    elif kind == "folder":
        split = "val"
        for name, part in {"val-00001-of-00002": [2, 3], "val-00000-of-00002": [0, 1], "train-00000-of-00001": [0]}.items():
            source.mkdir(exist_ok=True)
            table.select(part).to_parquet(source / f"{name}.parquet")
    elif kind == "saved":
        table.save_to_disk(source)
    else:
        split = "val"
        datasets.DatasetDict({"val": table, "train": table.select([0])}).save_to_disk(source)
    items = load_items(DataConfig(str(source), split=split, columns={"question": "query", "answer": "label"}))
    assert [{key: item[key] for key in ("question", "answer")} for item in items] == [{"question": text, "answer": "x"} for text in "abcd"]
    assert all(torch.equal(pixels_of(items[i]), pil_to_tensor(noise(i))) for i in range(4))
    assert len(load_items(DataConfig(str(source), split=split, columns={"text": "query"}, limit=3))) == 3


def test_classes_are_named(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features).save_to_disk(tmp_path / "saved")
    items = load_items(DataConfig(str(tmp_path / "saved"), columns={"answer": "label"}))
    assert items[:] == [{"text": "a", "answer": "dog"}, {"text": "b", "answer": "cat"}, {"text": "c"}]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("red", "red"),
        (3, "3"),
        (["b", "a", "a", "b", "c"], "b"),
        ([{"answer": "net", "answer_confidence": "yes"}, {"answer": "racket"}, {"answer": "racket"}], "racket"),
        ({"answer": ["one", "two", "two"], "answer_id": [1, 2, 3]}, "two"),
        ([1, 2, 2], "2"),
        ([], None),
        (None, None),
    ],
)
def test_the_most_frequent_answer_counts(answer: Any, expected: str | None, tmp_path: Path) -> None:
    items = load_items(
        DataConfig(write_json(tmp_path / "okvqa.json", [{"question": "what ?", "answers": answer}]), columns={"answer": "answers"})
    )
    assert items[0].get("answer") == expected


def test_prompts_are_filled_from_columns(tmp_path: Path) -> None:
    rows = [{"q": "which ?", "A": "x", "B": 2, "choices": ["u", "v"], "hint": None, "conversations": turns("no", "no"), "answer": "A"}]
    source = write_json(tmp_path / "rows.json", [*rows, {"q": "who ?", "choices": ["s", "t"]}])
    prompt = "{hint}{question} A. {A} B. {B} C. {choices[1]} {{}}"
    items = load_items(DataConfig(source, columns={"question": "q"}, prompt=prompt))
    assert items[0] == {"question": "which ? A. x B. 2 C. v {}", "answer": "A"}
    assert items[1] == {"question": "who ? A.  B.  C. t {}"}


def test_options_come_from_yaml() -> None:
    config = from_mapping({"source": "a/b", "columns": {"question": "query"}, "limit": 3}, DataConfig, "run.yaml, data")
    assert config == DataConfig("a/b", columns={"question": "query"}, limit=3)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "source is ''; expected"),
        ({"on_broken": "ignore"}, "on_broken is 'ignore'; expected one of"),
        ({"max_pixels": 0}, "max_pixels is 0; expected at least 1 or null"),
        ({"max_pixels": "many"}, "max_pixels is .many.; expected a whole number or null"),
        ({"limit": 0}, "limit is 0; expected"),
        ({"columns": {"query": "question"}}, "columns is .*'query'.*; expected field: column, with fields out of .*'conversations'"),
        ({"columns": {"text": "a"}, "prompt": "{b}"}, "leave out prompt"),
        ({"prompt": "{question"}, "prompt is '{question': .*; expected {column}"),
        ({"prompt": "{} ?"}, "expected a column's name between braces"),
        ({"prompt": "what is this ?"}, "which names no column; expected at least one between braces"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"source": "a/b"} | options)


ROW = '{"question": "a"}'


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.json", '[{"question": "a"}, {"quest', {}, r"a.json is not whole JSON \(Unterminated string .*: line 1 column 22.*\); expected"),
        ("a.json", ROW + "\n" + ROW, {}, "a.json is not whole JSON .*Extra data: line 2"),
        ("a.json", ROW, {}, "a.json holds a dict; expected a list of rows; .* name the file .jsonl"),
        ("a.json", "", {}, "a.json holds no rows; expected at least one"),
        ("a.json", "[]", {}, "a.json holds no rows; expected at least one"),
        ("a.json", "[1]", {}, "a.json, row 0 is a int; expected an object"),
        ("a.jsonl", f"{ROW}\n\n{ROW[:-4]}", {}, "a.jsonl, line 3 is not whole JSON .*; expected one row a line; get the file again"),
        ("a.jsonl", "\n", {}, "a.jsonl holds no rows"),
        ("a.csv", "question,answer", {}, r"a.csv ends in '.csv'; expected one of \['.json', '.jsonl', '.parquet'\]"),
        ("a.parquet", "PAR1 half of a file", {}, "a.parquet is no whole parquet file .*; get the file again"),
        ("a.parquet", "", {}, "a.parquet is no whole parquet file .*; get the file again"),
        ("a.parquet", "PAR1 broken within PAR1", {}, r"a.parquet cannot be read \(.+\); expected filled parquet files"),
        (
            "a.jsonl",
            ROW,
            {"columns": {"answer": "label"}},
            r"has no column 'label', which `columns.answer` names; columns there: \['question'\]",
        ),
        ("a.jsonl", ROW, {"prompt": "{question} {A}"}, r"has no column 'A', which `prompt` names; columns there: \['question'\]"),
        ("a.jsonl", '{"query": "a"}', {}, r"has the columns \['query'\], but none for text; say in `columns`"),
        ("a.jsonl", ROW + '\n{"id": 7}', {}, r"a.jsonl, row 1 has no text \(its columns: \['id'\]\); mend"),
        ("a.jsonl", '{"question": ""}', {"prompt": "{question} Briefly."}, "a.jsonl, row 0 has no text"),
        ("a.jsonl", '{"c": ["a"]}', {"prompt": "{c[1]}"}, "a.jsonl, row 0 does not fill the prompt .*IndexError"),
        ("a.jsonl", '{"question": ["a"]}', {}, "a.jsonl, row 0, question is a list; expected text or a number"),
        ("a.jsonl", '{"text": "a", "answer": {"text": "b"}}', {}, r"row 0, answer has the keys \['text'\]; expected text"),
        ("a.jsonl", '{"conversations": [{"role": "user"}]}', {}, "row 0 has the turn \"{'role': 'user'}\"; expected a list of"),
        ("a.jsonl", '{"conversations": "hello"}', {}, "row 0 has the turn 'hello'; expected a list of"),
        ("a.jsonl", ROW, {"split": "test"}, "split is 'test', but .*a.jsonl has no splits; leave `split` out"),
        ("a.jsonl", ROW, {"subset": "en"}, "subset is 'en', but .*a.jsonl is no id of the hub; leave `subset` out"),
        ("a.jsonl", ROW, {"images": "/no/such"}, "images is '/no/such', but there is no such folder"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(name: str, content: str, options: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        load_items(DataConfig(str(tmp_path / name), **options))
    assert "\n" not in str(raised.value)


def test_an_empty_table(tmp_path: Path) -> None:
    empty = datasets.Dataset.from_dict({"text": []})
    empty.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet cannot be read \(.+\); expected filled parquet files"):
        load_items(DataConfig(str(tmp_path / "a.parquet")))
    empty.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved cannot be read \(.+\); expected a whole, filled folder"):
        load_items(DataConfig(str(tmp_path / "saved")))


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no .parquet files, and was not saved by save_to_disk"):
        load_items(DataConfig(str(tmp_path)))
    table = datasets.Dataset.from_dict({"text": ["a"] * 100})
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"has files of the splits \['train'\], not 'test'; set `split`"):
        load_items(DataConfig(str(tmp_path), split="test"))
    table.to_parquet(tmp_path / "val-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=r"has 1 of the 2 files of the split 'val'; get the others too"):
        load_items(DataConfig(str(tmp_path), split="val"))
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has the splits \['train'\], not 'test'; set `split`"):
        load_items(DataConfig(str(tmp_path / "saved"), split="test"))
    (arrow,) = (tmp_path / "saved/train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-600])
    with pytest.raises(ValueError, match=r"saved cannot be read \(.+\); expected a whole, filled folder of save_to_disk; save it again"):
        load_items(DataConfig(str(tmp_path / "saved")))


@pytest.mark.parametrize("source", ["no/such/file", "no.json", "/no/folder", "data/no.parquet"])
def test_a_path_that_does_not_exist(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"source is '{re.escape(source)}', but there is no such file or folder; correct the path"):
        load_items(DataConfig(source), download=True)


def test_without_datasets_an_error_says_what_to_install(tmp_path: Path, llava: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_items(DataConfig(llava))) == 5
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'corda-vlm\[train\]'"):
        load_items(DataConfig("org/small"))


# The hub


@pytest.fixture
def cached(cache: Path, tmp_path: Path) -> Path:
    """The id org/small in the cache, as a download leaves it."""
    datasets.Dataset.from_dict({"question": ["a", "b", "c"], "answer": ["x", "y", "z"]}).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    (info,) = cache.glob("parquet/*/*/*/dataset_info.json")
    folder = cache / "org___small/default/0.0.0/abc"
    shutil.copytree(info.parent, folder)
    (folder / "parquet-train.arrow").rename(folder / "small-train.arrow")
    values = json.loads(info.read_text()) | {"dataset_name": "small", "config_name": "default"}
    (folder / "dataset_info.json").write_text(json.dumps(values).replace("parquet-train", "small-train"))
    return folder


def test_an_id_is_read_from_the_cache_without_the_network(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", partial(pytest.fail, "asked the hub"))
    assert load_items(DataConfig("org/small"))[2] == {"question": "c", "answer": "z"}
    assert len(load_items(DataConfig("org/small", split="train[:2]", subset="default"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"source": "org/other"},
            r"'org/other' .* is neither a local path nor whole in the cache .*Couldn't find cache.*; set `download: true`",
        ),
        ({"split": "test"}, r"split 'test'\) .*Should be one of \['train'\]"),
        ({"subset": "en"}, r"subset 'en', .*Available configs in the cache: \['default'\]"),
    ],
)
def test_an_id_that_is_not_cached_asks_for_a_download(options: Any, message: str, cached: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_items(DataConfig(**{"source": "org/small"} | options))
    assert "\n" not in str(raised.value)


def test_half_a_download_is_no_cache(cached: Path) -> None:
    arrow = cached / "small-train.arrow"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match="neither a local path nor whole in the cache of datasets .*; set `download: true`"):
        load_items(DataConfig("org/small"))
    arrow.write_bytes(whole)
    cached.rename(cached.with_name("abc.incomplete"))
    (cached.with_name("abc.incomplete") / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="neither a local path nor whole in the cache of datasets .*; set `download: true`"):
        load_items(DataConfig("org/small"))


def test_a_download_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub.")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError, match=r"'org/small' .* cannot be downloaded \(Couldn't reach the hub\); correct the options, or try again"
    ):
        load_items(DataConfig("org/small"), download=True)


def test_a_download_is_asked_for_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_items(DataConfig("org/small", subset="en"), download=True)[0] == {"text": "a"}
    assert asked == [(("org/small", "en"), {"split": "train"})]
