"""Test sets: official layouts give the right classes; what is missing or broken is named."""

import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from two_towers import coloured, real

from corda_eval.zeroshot.cifar import CIFAR10, CIFAR100, TEMPLATES, cifar10, cifar100
from corda_eval.zeroshot.folders import class_numbers, image_folder, table
from corda_eval.zeroshot.imagenet import imagenet1k, imagenet_a, imagenet_r, imagenet_sketch, imagenet_v2, names, wnids
from corda_eval.zeroshot.images import LabelledImage, image_batches, suffixes
from corda_eval.zeroshot.objectnet import objectnet
from corda_vlm.data.sources import DataConfig

pytest.importorskip("open_clip")
pytestmark = pytest.mark.filterwarnings("ignore:.*figures are not")


def filled(folder: Path, names: list[str], suffix: str = "JPEG") -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        coloured(number).save(folder / name / f"image_{number}.{suffix}")
    return folder


def test_the_ids_are_those_of_the_photographs() -> None:
    table_of = datasets.Dataset.from_parquet(str(real("imagenet1k-sample.parquet"))).select_columns(["label", "wnid"])
    assert len(wnids()) == 1000
    assert all(wnids()[row["label"]] == row["wnid"] for row in table_of)


def test_imagenets_folders_are_wordnet_ids(tmp_path: Path) -> None:
    folder = filled(tmp_path / "val", ["n02123045", "n01440764", "n15075141"])
    with pytest.warns(UserWarning, match="has 3 images, imagenet1k has 50000"):
        data = imagenet1k(folder)
    assert [item.label for item in data.items] == [0, 281, 999]
    assert [item.id for item in data.items] == ["n01440764/image_1.JPEG", "n02123045/image_0.JPEG", "n15075141/image_2.JPEG"]
    assert data.class_names[281] == "tabby cat"
    assert len(data.templates) == 80
    assert [item.label for item in imagenet_sketch(folder).items] == [0, 281, 999]
    filled(folder, ["cats"])
    with pytest.raises(ValueError, match="cats is not named by an id"):
        imagenet1k(folder)


def test_version_two_has_numbers_for_folders(tmp_path: Path) -> None:
    data = imagenet_v2(filled(tmp_path / "v2", ["10", "2", "999"]))
    assert [(item.id, item.label) for item in data.items] == [("10/image_0.JPEG", 10), ("2/image_1.JPEG", 2), ("999/image_2.JPEG", 999)]
    filled(tmp_path / "v2", ["1000"])
    with pytest.raises(ValueError, match="1000 is not named by a class's number"):
        imagenet_v2(tmp_path / "v2")


@pytest.mark.parametrize("make", [imagenet_a, imagenet_r])
def test_shifts_of_200_classes_tell_only_these_apart(make: Any, tmp_path: Path) -> None:
    chosen = list(range(3, 1000, 5))
    data = make(filled(tmp_path / "some", [wnids()[number] for number in reversed(chosen)]))
    assert [item.label for item in data.items] == list(range(200))
    assert list(data.class_names) == [names()[number] for number in chosen]
    (tmp_path / "some" / wnids()[3] / "image_199.JPEG").unlink()
    (tmp_path / "some" / wnids()[3]).rmdir()
    with pytest.raises(ValueError, match="folders of 199 classes; expected the 200 of imagenet-"):
        make(tmp_path / "some")


def objectnet_folder(folder: Path) -> Path:
    filled(folder / "images", ["chair", "t_shirt", "whisk", "tie"], "png")
    mappings = folder / "mappings"
    mappings.mkdir()
    labels = {"chair": "Chair", "t_shirt": "T-shirt", "whisk": "Whisk", "tie": "Tie"}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"T-shirt": "jersey, T-shirt, tee shirt", "Chair": "barber chair; folding chair"}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    # Line i of the labels is the class that ImageNet's own count calls i, and torch's by the other mapping.
    (mappings / "imagenet_to_label_2012_v2").write_text("folding chair\njersey, T-shirt, tee shirt\nbarber chair\n")
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({"559": 0, "610": 1, "423": 2}))
    return folder


def test_objectnet_takes_its_own_mappings(tmp_path: Path) -> None:
    folder = objectnet_folder(tmp_path / "objectnet-1.0")
    data = objectnet(folder)
    assert data.class_names == ["chair", "t-shirt"]
    assert [(item.id, item.label) for item in data.items] == [("chair/image_0.png", 0), ("t_shirt/image_1.png", 1)]
    assert data.items[0].image.size == (16, 14)
    assert objectnet(folder, border=0).items[0].image.size == (20, 18)
    best = objectnet(folder, answers="imagenet")
    assert len(best.class_names) == 1000
    assert best.groups == [[423, 559], [610]]
    with pytest.raises(ValueError, match="answers is 'max'"):
        objectnet(folder, answers="max")
    (folder / "mappings" / "imagenet_to_label_2012_v2").write_text("folding chair\n")
    with pytest.raises(ValueError, match="gives 'T-shirt' the classes"):
        objectnet(folder)
    (folder / "mappings" / "objectnet_to_imagenet_1k.json").unlink()
    with pytest.raises(FileNotFoundError, match="objectnet_to_imagenet_1k.json; expected ObjectNet's own mapping"):
        objectnet(folder)


def test_cifar_has_the_papers_prompts_and_names() -> None:
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 18
    assert {"a photo of a {}.", "a black and white photo of the {}.", "a photo of the small {}."} <= set(TEMPLATES)
    assert len(CIFAR100) == 100
    assert (CIFAR100[1], CIFAR100[41], CIFAR100[99]) == ("aquarium fish", "lawn mower", "worm")


def test_cifar_photographs() -> None:
    data = cifar10(real("cifar10-test.parquet"))
    places = range(0, 5000, 250)
    rows = datasets.Dataset.from_parquet(str(real("cifar10-test.parquet"))).select(places)
    assert [CIFAR10[data.items[place].label] for place in places] == [row["name"] for row in rows]
    by_name = table(real("cifar10-test.parquet"), label="name", class_names=CIFAR10)
    assert [by_name.items[place].label for place in places] == [row["label"] for row in rows]
    assert data.task == "cifar10"


def test_cifars_official_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    content = {"data": np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8), "labels": [3, 9]}
    (folder / "test_batch").write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10)}))
    with pytest.raises(FileNotFoundError, match="does not hold all of CIFAR10"):
        cifar10(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    data = cifar10(tmp_path)
    assert [item.label for item in data.items] == [3, 9]
    assert data.items[1].image.size == (32, 32)


def test_tables_whose_column_knows_its_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=[n.replace(" ", "_") for n in CIFAR100])}
    )
    rows = datasets.Dataset.from_dict({"img": [coloured(n) for n in range(3)], "fine_label": [1, 99, 41]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    data = cifar100(tmp_path / "saved", image="img")
    assert [item.label for item in data.items] == [1, 99, 41]
    assert data.class_names[1] == "aquarium fish"
    assert table(tmp_path / "saved", image="img", label="fine_label").class_names[1] == "aquarium_fish"


@pytest.mark.parametrize("saved", [True, False])
def test_a_tables_own_order_of_names_does_not_count(saved: bool, tmp_path: Path) -> None:
    order = [name.replace("_", "-").title() for name in reversed(CIFAR10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=order)})
    rows = datasets.Dataset.from_dict({"image": [coloured(n) for n in range(3)], "label": [0, 9, 6]}, features=features)
    source = tmp_path / ("saved" if saved else "a.parquet")
    rows.save_to_disk(source) if saved else rows.to_parquet(source)
    data = cifar10(source)
    assert [data.class_names[item.label] for item in data.items] == ["truck", "airplane", "cat"]
    assert [item.label for item in table(source).items] == [0, 9, 6]  # with its own names its own order


def test_names_that_a_table_does_not_share_are_refused_or_given(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["n02", "n01"])})
    rows = datasets.Dataset.from_dict({"image": [coloured(n) for n in range(2)], "label": [0, 1]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet calls 2 of its 2 classes, such as 'n02', by none of the names given"):
        table(tmp_path / "a.parquet", class_names=["cat", "dog"])
    data = table(tmp_path / "a.parquet", class_names={"n01": "cat", "n02": "dog", "n03": "cow"})
    assert [data.class_names[item.label] for item in data.items] == ["dog", "cat"]
    with pytest.raises(ValueError, match="calls 1 of its 2 classes, such as 'n02'"):
        table(tmp_path / "a.parquet", class_names={"n01": "cat"})


def test_names_are_matched_in_plain_form_and_of_equal_ones_the_first_counts() -> None:
    assert [class_numbers(["T-shirt", "red_fox"], ["red fox", "t shirt"], "a")[name] for name in ("T-shirt", "red_fox", "t shirt")] == [
        1,
        0,
        1,
    ]
    assert class_numbers(["a", "b"], ["b", "a", "b"], "a") == {"a": 1, "b": 0}
    same = class_numbers(names(), names(), "a")
    assert all(same[name] == names().index(name) for name in names())


def test_texts_of_a_column_are_matched_by_name(tmp_path: Path) -> None:
    coloured(0).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "label": label} for label in ("Aquarium_Fish", "worm")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert [item.label for item in cifar100(tmp_path / "rows.jsonl", label="label").items] == [1, 99]


def test_ids_are_rows_where_broken_ones_are_left_out(tmp_path: Path) -> None:
    coloured(0).save(tmp_path / "a.png")
    rows = [{"image": name, "label": number} for number, name in enumerate(["a.png", "no.png", "a.png"])]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = table(DataConfig(str(tmp_path / "rows.jsonl"), on_broken="skip"), class_names=["a", "b", "c"])
    assert [(item.id, item.label) for item in data.items] == [("0", 0), ("2", 2)]


def test_tables_are_refused_by_name(tmp_path: Path) -> None:
    coloured(0).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "label": "cat"}, {"image": "a.png", "label": "cow"}, {"label": "cat"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match="does not name the classes of 'label'"):
        table(tmp_path / "rows.jsonl")
    data = table(DataConfig(str(tmp_path / "rows.jsonl")), class_names=["dog", "cat"])
    assert data.items[0].label == 1
    with pytest.raises(ValueError, match="row 1 has the class 'cow'"):
        data.items[1]
    with pytest.raises(ValueError, match="row 2 has no image"):
        data.items[2]


def test_image_folders(tmp_path: Path) -> None:
    folder = filled(tmp_path / "pets", ["red_fox", "cat"])
    (folder / "cat" / "notes.txt").write_text("not an image")
    data = image_folder(folder)
    assert (data.task, data.class_names, [item.label for item in data.items]) == ("pets", ["cat", "red fox"], [0, 1])
    assert image_folder(folder, class_names={"cat": "kitten", "red_fox": "fox"}).class_names == ["kitten", "fox"]
    with pytest.raises(ValueError, match="no name for the folder 'red_fox'"):
        image_folder(folder, class_names={"cat": "kitten"})
    with pytest.raises(FileNotFoundError, match="has no subfolders"):
        image_folder(folder / "cat")
    broken = folder / "cat" / "image_9.JPEG"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image_9.JPEG cannot be read as an image"):
        image_folder(folder).items[1]
    broken.unlink()
    (folder / "cat" / "image_1.JPEG").unlink()
    (folder / "red_fox" / "image_0.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="hold no images"):
        image_folder(folder)


def test_folders_hold_every_kind_of_picture_and_nothing_hidden(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX", "cat/.ipynb_checkpoints", "cat/more", "cat/more/.cache"):
        (folder / name).mkdir(parents=True)
    kinds = ["tif", "TIFF", "gif", "ppm", "pgm", "jfif", "jpe", "png", "bmp", "webp", "avif", "jp2", "tga", "ico"]
    kinds = [kind for kind in kinds if f".{kind.lower()}" in suffixes()]  # a Pillow may be built without some
    assert {"tif", "TIFF", "gif", "ppm", "pgm", "jfif"} <= set(kinds)
    for number, kind in enumerate(kinds):
        coloured(number).convert("L" if kind == "pgm" else "RGB").save(folder / "cat" / f"{number:02}.{kind}")
    for hidden in ("cat/.ipynb_checkpoints/a.png", "cat/._00.tif", "cat/more/.cache/a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png"):
        coloured(0).save(folder / hidden, "PNG")
    coloured(0).save(folder / "cat/more/z.png")
    (folder / "cat" / "folder.png").mkdir()
    (folder / "cat" / "notes.txt").write_text("not an image")
    data = image_folder(folder)
    assert list(data.class_names) == ["cat", "dog"]
    assert [item.id for item in data.items] == [*(f"cat/{number:02}.{kind}" for number, kind in enumerate(kinds)), "cat/more/z.png"]


def test_pictures_that_cannot_be_opened_are_told_of(tmp_path: Path) -> None:
    folder = filled(tmp_path / "pets", ["cat"])
    (folder / "cat" / "drawing.svg").write_text("<svg/>")
    with pytest.warns(UserWarning, match=r"1 picture\(s\) such as .*drawing.svg are of a kind that Pillow does not read, and do not count"):
        assert len(image_folder(folder).items) == 1


def test_pictures_of_every_mode_come_as_rgb() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    deep = Image.fromarray(np.full((2, 2), 32896, dtype=np.uint16))
    items = [LabelledImage(str(number), image, number) for number, image in enumerate([clear, deep, Image.new("L", (2, 2), 7)])]
    [(_, _, inputs)] = image_batches(items, lambda images: {"grey": torch.tensor([np.asarray(image).mean() for image in images])})
    assert inputs["grey"].tolist() == [255, 128, 7]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_keep_the_order(workers: int, tmp_path: Path) -> None:
    def read(images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return {"pixels": torch.tensor([image.getpixel((0, 0)) for image in images]) / 255, "size": torch.tensor([3] * len(images))}

    folder = filled(tmp_path / "many", [f"c{number:02}" for number in range(11)], "png")
    batches = list(image_batches(image_folder(folder).items, read, batch_size=4, workers=workers, dtype=torch.bfloat16))
    assert [len(ids) for ids, _, _ in batches] == [4, 4, 3]
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == list(range(11))
    assert batches[0][2]["pixels"].dtype == torch.bfloat16
    assert batches[0][2]["size"].dtype == torch.int64
    expected = torch.tensor([coloured(number).getpixel((0, 0)) for number in range(8, 11)]) / 255
    torch.testing.assert_close(batches[2][2]["pixels"], expected.bfloat16())
