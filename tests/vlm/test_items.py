"""Rows become samples; those whose images cannot be read are named, or replaced the same way every time."""

import json
import logging
import pickle
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from rows import encoded, noise, pixels_of, write_json, write_llava
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from corda_vlm.items import Items, load_items
from corda_vlm.pairs import read_pair
from corda_vlm.sources import DataConfig

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of datasets of one's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def llava(tmp_path: Path) -> str:
    return write_llava(tmp_path)


@pytest.fixture
def half_broken(tmp_path: Path) -> str:
    """Eight rows: 1 is missing, 4 truncated, 5 no image, 7 an empty file."""
    for number in range(8):
        noise(number).save(tmp_path / f"{number}.jpg")
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "4.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:-100])
    (tmp_path / "5.jpg").write_text("<html>404</html>")
    (tmp_path / "7.jpg").write_bytes(b"")
    return write_json(tmp_path / "vqa.json", [{"image": f"{i}.jpg", "question": f"{i} ?", "answer": i} for i in range(8)])


INSTEAD = [0, 2, 2, 3, 6, 6, 6, 0]
"""The rows whose items ``half_broken`` gives."""


def test_images_may_be_lists_bytes_or_absent(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "0.png")
    source = [{"path": "0.png", "bytes": None}, {"path": "never.png", "bytes": encoded(noise(1, "P"))}]
    datasets.Dataset.from_dict({"text": ["a", "b"], "images": [source, None]}).to_parquet(tmp_path / "rows.parquet")
    items = load_items(DataConfig(str(tmp_path / "rows.parquet")))
    assert [pil_to_tensor(image).tolist() for image in items[0]["image"]] == [
        pil_to_tensor(image).tolist() for image in (noise(0), noise(1, "P").convert("RGB"))
    ]
    assert items[1] == {"text": "b"}
    rows = [{"text": "c", "image": noise(2, "L")}, {"text": "d", "image": encoded(noise(3))}]
    given = Items(rows, {"text": "text", "image": "image"}, tmp_path, items.config)
    assert torch.equal(pixels_of(given[0]), pil_to_tensor(noise(2, "L").convert("RGB")))
    assert read_pair(given[1])[1] == "d"


def test_items_are_a_sequence(llava: str) -> None:
    items = load_items(DataConfig(llava))
    assert len(random.Random(0).sample(items, 3)) == 3
    assert items[-1] == items[4]
    assert [len(one) for one in items[3:]] == [2, 1]
    with pytest.raises(IndexError):
        items[5]
    assert pickle.loads(pickle.dumps(items))[4] == items[4]


def test_broken_rows_are_replaced_in_every_order(half_broken: str, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(half_broken, on_broken="skip")
    items, backwards = load_items(config), load_items(config)
    with caplog.at_level(logging.WARNING, "corda_vlm.items"):
        forth = [items[i] for i in range(8)]
        assert len(caplog.records) == items.num_broken == 4
        forth_again = [items[i] for i in range(8)]
        assert len(caplog.records) == 4
    assert "row 1: the image" in caplog.messages[0]
    back = [backwards[i] for i in reversed(range(8))][::-1]
    for one in (forth, forth_again, back):
        assert [item["question"] for item in one] == [f"{i} ?" for i in INSTEAD]
        assert all(torch.equal(pixels_of(item), pixels_of(forth[i])) for item, i in zip(one, INSTEAD, strict=True))


@pytest.mark.parametrize(("start", "kind"), [("fork", "json"), ("spawn", "parquet")])
def test_workers_count_broken_rows_together(half_broken: str, start: str, kind: str) -> None:
    source = half_broken.replace(".json", f".{kind}")
    if kind == "parquet":
        datasets.Dataset.from_list(json.loads(Path(half_broken).read_text())).to_parquet(source)
    items, alone = (load_items(DataConfig(source, on_broken="skip")) for _ in range(2))
    loader = DataLoader(items, batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context=start)
    read = [item for batch in loader for item in batch]
    assert [item["question"] for item in read] == [f"{i} ?" for i in INSTEAD]
    assert all(torch.equal(pixels_of(item), pixels_of(alone[i])) for i, item in enumerate(read))
    assert items.num_broken == alone.num_broken == 4


@pytest.mark.parametrize(("row", "reason"), [(1, "No such file or directory"), (4, "truncated"), (5, "not an image"), (7, "not an image")])
def test_a_broken_image_stops_a_run(half_broken: str, row: int, reason: str) -> None:
    items = load_items(DataConfig(half_broken))
    with pytest.raises(
        ValueError, match=rf"vqa.json, row {row}: the image \S+{row}.jpg cannot be read \(.*{reason}.*\); .*`on_broken: skip`\."
    ):
        items[row]
    assert items.num_broken == 0
    assert items[0]["answer"] == "0"


def test_all_images_broken(tmp_path: Path) -> None:
    items = load_items(DataConfig(write_json(tmp_path / "rows.json", [{"text": "a", "image": "no.png"}] * 3), on_broken="skip"))
    with pytest.raises(ValueError, match="has 3 row\\(s\\), and no row's image can be read; check `images`"):
        items[1]


def test_rows_without_an_image_are_broken_where_one_is_needed(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a circle", "image": None}, {"text": "red", "image": "red.png"}]))
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    assert "image" not in load_items(DataConfig(str(tmp_path / "rows.json")))[0]
    with pytest.raises(ValueError, match="row 0: there is no image"):
        load_items(DataConfig(str(tmp_path / "rows.json")), needs_images=True)[0]
    items = load_items(DataConfig(str(tmp_path / "rows.json"), on_broken="skip"), needs_images=True)
    assert (items[0]["text"], items.num_broken) == ("red", 1)


def test_a_failing_machine_breaks_no_rows(llava: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = load_items(DataConfig(llava, on_broken="skip"))

    def fail(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        items[0]
    assert items.num_broken == 0


def test_an_image_of_another_kind(tmp_path: Path) -> None:
    items = load_items(DataConfig(write_json(tmp_path / "a.json", [{"text": "a", "image": 7}]), on_broken="skip"))
    with pytest.raises(ValueError, match="row 0, image is a int; expected a path"):
        items[0]


def test_an_arrow_row_without_text_is_named_when_it_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", None]}).to_parquet(tmp_path / "a.parquet")
    items = load_items(DataConfig(str(tmp_path / "a.parquet")))
    assert items[0] == {"text": "a"}
    with pytest.raises(ValueError, match="a.parquet, row 1 has no text"):
        items[1]
