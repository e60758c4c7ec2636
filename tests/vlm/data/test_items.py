"""Rows become samples; those whose images cannot be read are named, or left out."""

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

import corda_vlm.data.items
from corda_vlm.context import image_reader
from corda_vlm.data.items import Items, load_items
from corda_vlm.data.pairs import OpenClipPairs, read_pair
from corda_vlm.data.sources import DataConfig

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


WHOLE = [0, 2, 3, 6]
"""The rows of ``half_broken`` that can be read."""


def test_images_may_be_lists_bytes_or_absent(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "0.png")
    source = [{"path": "0.png", "bytes": None}, {"path": "never.png", "bytes": encoded(noise(1, "P"))}]
    datasets.Dataset.from_dict({"text": ["a", "b"], "images": [source, None]}).to_parquet(tmp_path / "rows.parquet")
    items = load_items(DataConfig(str(tmp_path / "rows.parquet")))
    assert [pil_to_tensor(image).tolist() for image in items[0]["image"]] == [
        pil_to_tensor(image).tolist() for image in (noise(0), noise(1, "P").convert("RGB"))
    ]
    assert items[1] == {"text": "b"}
    rows: list[dict[str, Any]] = [{"text": "c", "image": noise(2, "L")}, {"text": "d", "image": encoded(noise(3))}]
    given = Items(rows, {"text": "text", "image": "image"}, tmp_path, items.config)
    assert torch.equal(pixels_of(given[0]), pil_to_tensor(noise(2, "L").convert("RGB")))
    assert read_pair(given[1])[1] == "d"


def test_items_are_a_sequence(llava: str) -> None:
    items = load_items(DataConfig(llava))
    assert len(random.Random(0).sample(items, 3)) == 3
    assert items[-1] == items[4]
    assert [len(item) for item in items[3:]] == [2, 1]
    with pytest.raises(IndexError):
        items[5]
    assert pickle.loads(pickle.dumps(items))[4] == items[4]


def test_broken_rows_are_left_out_in_every_order(half_broken: str, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(half_broken, on_broken="skip")
    with caplog.at_level(logging.WARNING, "corda_vlm.data.items"):
        items = load_items(config)
    assert len(caplog.records) == items.num_broken == 4
    assert "row 1: the image" in caplog.messages[0]
    assert [items[i]["question"] for i in range(4)] == [f"{i} ?" for i in WHOLE]
    assert [items[i]["question"] for i in reversed(range(4))] == [f"{i} ?" for i in reversed(WHOLE)]
    assert all(torch.equal(pixels_of(item), pil_to_tensor(noise_of_jpeg(half_broken, i))) for item, i in zip(items, WHOLE, strict=True))


def noise_of_jpeg(source: str, number: int) -> Image.Image:
    return Image.open(Path(source).parent / f"{number}.jpg")


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("missing", ["", None, "no.png"])
def test_no_other_row_stands_for_one_without_its_picture(missing: str | None, kind: str, tmp_path: Path) -> None:
    noise(0).save(tmp_path / "0.png")
    rows = [{"image": missing if i == 1 else "0.png", "text": f"row {i}"} for i in range(3)]
    source = write_json(tmp_path / "rows.json", rows)
    if kind == "parquet":
        source = str(tmp_path / "rows.parquet")
        datasets.Dataset.from_list(rows).to_parquet(source)
    items = load_items(DataConfig(source, on_broken="skip"), needs_images=True)
    assert ([item["text"] for item in items], items.num_broken) == (["row 0", "row 2"], 1)
    with pytest.raises(ValueError, match="row 1: .*on_broken: skip"):
        load_items(DataConfig(source), needs_images=True)[1]
    if missing is None:  # text is a sample too, where images are not needed
        assert load_items(DataConfig(source, on_broken="skip"))[1] == {"text": "row 1"}


@pytest.mark.parametrize(("start", "kind"), [("fork", "json"), ("spawn", "parquet")])
def test_workers_read_the_same_rows(half_broken: str, start: str, kind: str) -> None:
    source = half_broken.replace(".json", f".{kind}")
    if kind == "parquet":
        datasets.Dataset.from_list(json.loads(Path(half_broken).read_text())).to_parquet(source)
    items = load_items(DataConfig(source, on_broken="skip"))
    loader = DataLoader(items, batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context=start)
    read = [item for batch in loader for item in batch]
    assert [item["question"] for item in read] == [f"{i} ?" for i in WHOLE]
    assert all(torch.equal(pixels_of(item), pixels_of(items[i])) for i, item in enumerate(read))
    assert items.num_broken == 4


def test_what_a_processor_refuses_is_left_out_too(half_broken: str, caplog: pytest.LogCaptureFixture) -> None:
    def accepts(image: Image.Image) -> None:
        if image.getpixel((0, 0)) == noise_of_jpeg(half_broken, 3).getpixel((0, 0)):
            raise RuntimeError("the picture\nis too small")

    items = load_items(DataConfig(half_broken, on_broken="skip"), accepts=accepts)
    assert [item["question"] for item in items] == ["0 ?", "2 ?", "6 ?"]
    assert "row 3: the model's processor refuses the image (the picture is too small); the row is left out." in caplog.text
    assert len(load_items(DataConfig(half_broken), accepts=accepts)) == 8


def test_a_picture_of_too_many_pixels(half_broken: str) -> None:
    with pytest.raises(ValueError, match=r"row 0: .*16 x 16 = 256 pixels, more than 255; make it smaller, or raise `max_pixels`"):
        load_items(DataConfig(half_broken, max_pixels=255))[0]
    with pytest.raises(ValueError, match="no row's image can be read"):
        load_items(DataConfig(half_broken, on_broken="skip", max_pixels=255))
    assert len(load_items(DataConfig(half_broken, on_broken="skip", max_pixels=256))) == 4


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
    config = DataConfig(write_json(tmp_path / "rows.json", [{"text": "a", "image": "no.png"}] * 3), on_broken="skip")
    with pytest.raises(ValueError, match="has 3 row\\(s\\), and no row's image can be read; check `images`"):
        load_items(config)


def test_rows_without_an_image_are_broken_where_one_is_needed(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a circle", "image": None}, {"text": "red", "image": "red.png"}]))
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    assert "image" not in load_items(DataConfig(str(tmp_path / "rows.json")))[0]
    with pytest.raises(ValueError, match="row 0: there is no image"):
        load_items(DataConfig(str(tmp_path / "rows.json")), needs_images=True)[0]
    items = load_items(DataConfig(str(tmp_path / "rows.json"), on_broken="skip"), needs_images=True)
    assert (items[0]["text"], items.num_broken) == ("red", 1)


def test_processes_share_the_reading_and_agree(half_broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[dict[int, str]] = []

    def gather(reasons: dict[int, str]) -> list[dict[int, str]]:
        shares.append(reasons)
        return [{7: "d", 4: "b"}, {5: "c", 1: "a"}, {}]

    for rank in range(3):
        monkeypatch.setattr(corda_vlm.data.items, "process_rank", lambda rank=rank: rank)
        monkeypatch.setattr(corda_vlm.data.items, "num_processes", lambda: 3)
        monkeypatch.setattr(corda_vlm.data.items, "gathered", gather)
        items = load_items(DataConfig(half_broken, on_broken="skip"))
        assert [item["question"] for item in items] == [f"{i} ?" for i in WHOLE]
    assert [sorted(share) for share in shares] == [[], [1, 4, 7], [5]]


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


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_media_that_nobody_reads_are_refused_by_row(kind: str, tmp_path: Path) -> None:
    noise(0).save(tmp_path / "0.png")
    rows: list[dict[str, Any]] = [{"text": "a", "image": "0.png", "video": None}, {"text": "b", "image": None, "video": "b.mp4"}]
    source = write_json(tmp_path / "rows.json", rows)
    if kind == "parquet":
        source = str(tmp_path / "rows.parquet")
        datasets.Dataset.from_list(rows).to_parquet(source)
    with pytest.raises(
        ValueError, match="row 1: 'video' holds what looks like a picture, video or sound and is not read; put it into `image`"
    ):
        load_items(DataConfig(source))[1]
    assert load_items(DataConfig(source, columns={"image": "image"}))[1] == {"text": "b"}  # options say which is meant
    assert load_items(DataConfig(source, prompt="{text} {video}"))[1] == {"question": "b b.mp4"}


def test_the_filled_one_of_image_and_images_is_read(tmp_path: Path) -> None:
    for number in range(2):
        noise(number).save(tmp_path / f"{number}.png")
    rows = [{"text": "a", "image": None, "images": ["0.png", "1.png"]}, {"text": "b", "image": "1.png", "images": []}, {"text": "c"}]
    items = load_items(DataConfig(write_json(tmp_path / "rows.json", rows)))
    assert [len(items[0]["image"]), items[1]["image"].tobytes(), "image" in items[2]] == [2, noise(1).tobytes(), False]
    with pytest.raises(ValueError, match="row 0: both `image` and `images` are filled"):
        load_items(DataConfig(write_json(tmp_path / "rows.json", [{"text": "a", "image": "0.png", "images": ["1.png"]}])))
    with pytest.raises(ValueError, match="row 0: the name of an image is empty"):
        load_items(DataConfig(write_json(tmp_path / "rows.json", [{"text": "a", "images": ["0.png", None]}])))


def edited(source: str, **values: Any) -> str:
    rows = json.loads(Path(source).read_text())
    rows[2] |= values
    return write_json(Path(source), rows)


def test_a_fingerprint_is_that_of_the_rows(llava: str, tmp_path: Path) -> None:
    before = load_items(DataConfig(llava)).fingerprint()
    Path(llava).write_text(json.dumps(json.loads(Path(llava).read_text()), indent=3))
    assert load_items(DataConfig(llava)).fingerprint() == before
    for values in ({"id": "20"}, {"image": "coco/1.png"}, {"note": None}):
        assert load_items(DataConfig(edited(llava, **values))).fingerprint() != before
        write_llava_again(tmp_path)
    assert load_items(DataConfig(llava, limit=4)).fingerprint() != before
    (tmp_path / "coco/2.png").write_bytes(b"broken")
    assert load_items(DataConfig(llava)).fingerprint() == before  # it may be mended
    assert load_items(DataConfig(llava, on_broken="skip")).fingerprint() != before


def write_llava_again(tmp_path: Path) -> None:
    (tmp_path / "coco").rename(tmp_path / f"coco-{len(list(tmp_path.iterdir()))}")
    write_llava(tmp_path)


def test_a_tables_fingerprint_is_that_of_its_rows_and_not_of_its_files(tmp_path: Path) -> None:
    def fingerprint(name: str, texts: list[str], pictures: list[Any], labels: list[int], names: list[str]) -> str:
        features = datasets.Features(
            {"text": datasets.Value("string"), "images": datasets.List(datasets.Image()), "label": datasets.ClassLabel(names=names)}
        )
        table = datasets.Dataset.from_dict({"text": texts, "images": pictures, "label": labels}, features=features)
        table.to_parquet(tmp_path / f"{name}.parquet", batch_size=1 if name == "b" else 100)
        return load_items(DataConfig(str(tmp_path / f"{name}.parquet"))).fingerprint()

    pictures = [[noise(0)], None, [noise(1), noise(2)]]
    before = fingerprint("a", ["x", "y", "z"], pictures, [0, 1, 1], ["cat", "dog"])
    assert fingerprint("b", ["x", "y", "z"], pictures, [0, 1, 1], ["cat", "dog"]) == before
    others = [
        fingerprint("c", ["x", "z", "y"], pictures, [0, 1, 1], ["cat", "dog"]),
        fingerprint("d", ["x", "y", "z"], [*pictures[:2], [noise(1)]], [0, 1, 1], ["cat", "dog"]),
        fingerprint("e", ["x", "y", "z"], [pictures[0], [noise(1)], [noise(2)]], [0, 1, 1], ["cat", "dog"]),
        fingerprint("f", ["x", "y", "z"], pictures, [0, 1, 0], ["cat", "dog"]),
        fingerprint("g", ["x", "y", "z"], pictures, [0, 1, 1], ["dog", "cat"]),
        fingerprint("h", ["x", "y"], pictures[:2], [0, 1], ["cat", "dog"]),
    ]
    assert len({before, *others}) == 7


def test_a_fingerprint_of_what_is_left_in_a_table(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "image": {"bytes": encoded(noise(i)) if i != 1 else b"broken", "path": None}} for i in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    whole, left = (load_items(DataConfig(str(tmp_path / "a.parquet"), on_broken=mode)) for mode in ("stop", "skip"))
    datasets.Dataset.from_list([rows[0], rows[2]]).to_parquet(tmp_path / "b.parquet")
    assert left.fingerprint() == load_items(DataConfig(str(tmp_path / "b.parquet"))).fingerprint() != whole.fingerprint()


def test_what_reads_one_image_for_a_model(processor: Any) -> None:
    read = image_reader(processor)
    assert read is not None
    assert read(noise(0))["pixel_values"].shape[0] == 1
    assert image_reader(processor.tokenizer) is None
    pairs = OpenClipPairs(pil_to_tensor, lambda texts: torch.zeros(len(texts), 1))
    read = image_reader(pairs)
    assert read is not None
    assert read(noise(0))["image"].shape == (1, 3, 16, 16)
    alone = image_reader(processor.image_processor)  # of a vision tower
    assert alone is not None
    assert torch.equal(alone(noise(0))["pixel_values"], image_reader(processor)(noise(0))["pixel_values"])  # type: ignore[misc]
