"""A sample's pictures are found whatever holds them, and nothing that looks like one is overlooked."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rows import encoded, noise

from corda_vlm.data.media import image_field, image_sources
from corda_vlm.data.samples import has_image, read_images

PICTURE = noise(0)


@pytest.mark.parametrize("empty", [None, [], {"bytes": None, "path": None}])
def test_the_field_that_is_filled_counts(empty: Any) -> None:
    assert image_field({"image": empty, "images": [PICTURE], "text": "a"}) == [PICTURE]
    assert image_field({"image": PICTURE, "images": empty, "text": "a"}) is PICTURE
    assert image_field({"image": empty, "images": empty, "text": "a.png"}) is None
    assert has_image({"image": empty, "images": ["a.png"], "text": "a"})
    assert not has_image({"image": empty, "text": "a"})


def test_two_filled_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="both `image` and `images` are filled"):
        image_field({"image": "a.png", "images": ["b.png"]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("video", "a.mp4"),
        ("videos", [b"content"]),
        ("audio", {"path": "a.wav", "array": [0.1], "sampling_rate": 16000}),
        ("Audio_path", "sound"),
        ("video_url", "https://host/watch?v=1"),
        ("media", {"video": "a.mp4"}),
        ("image_2", "anything"),
        ("mask", PICTURE),
        ("frames", [{"bytes": b"content", "path": None}]),
    ],
)
def test_media_that_are_never_read_are_refused(name: str, value: Any) -> None:
    for image in (None, "a.png"):
        with pytest.raises(ValueError, match=f"'{name}' holds what looks like a picture, video or sound"):
            image_field({"image": image, "text": "a", name: value})
    assert image_field({"image": "a.png", "text": "a", name: None}) == "a.png"
    assert image_field({"image": "a.png", "text": "a", name: value}, read=("text", name)) == "a.png"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_path", "a"),
        ("img", "a.png"),
        ("picture", Path("a.png")),
        ("file_name", "coco/a.JPG"),
        ("image_base64", "iVBOR"),
        ("media", {"image": "a.png"}),
    ],
)
def test_where_a_picture_is_matters_only_without_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"'{name}' holds what looks like a picture"):
        image_field({"image": None, "text": "a", name: value})
    assert image_field({"image": PICTURE, "text": "a", name: value}) is PICTURE


def test_other_fields_are_left_alone() -> None:
    others: dict[str, Any] = {
        "id": 7,
        "image_id": 262148,
        "video_id": None,
        "source": "a longer text.\nIt ends in a.png",
        "meta": {"split": "train"},
        "tags": [],
        "url": "http://host/wiki/File:A.jpg",
        "path": "logo.svg",
        "title": "song.mp3",
        "photo": False,
        "file_name": "main.py",
    }
    assert image_field({"text": "a", **others}) is None


def test_a_field_is_read_in_every_form(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    content = encoded(PICTURE)
    forms = [
        PICTURE,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        content,
        {"bytes": content, "path": "no"},
        {"path": str(tmp_path / "a.png")},
    ]
    assert all(image.tobytes() == PICTURE.tobytes() for image in read_images(forms))
    assert len(read_images(forms)) == len(forms)
    assert read_images(None) == read_images([]) == ()


@pytest.mark.parametrize("missing", [[None], ["a.png", None], [""], [{"bytes": None, "path": None}]])
def test_a_missing_one_of_a_list_is_no_picture_less(missing: Any) -> None:
    assert len(image_sources(missing)) == len(missing)
    assert "" in image_sources(missing)


@pytest.mark.parametrize("missing", ["", [None], [""]])
def test_an_empty_name_is_refused(missing: Any) -> None:
    with pytest.raises(ValueError, match=r"the image cannot be read \(its name is empty\)"):
        read_images(missing)


def test_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="^An image is a float; expected a path, bytes, a PIL image"):
        image_sources([0.5])
    assert isinstance(read_images(PICTURE)[0], Image.Image)


def test_what_cannot_be_read_is_one_kind_of_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"<html>")
    for source, message in (
        (tmp_path / "a.png", r"the image \S+a.png cannot be read \(not an image\)"),
        (str(tmp_path / "no.png"), r"the image \S+no.png cannot be read \(No such file or directory\)"),
        (b"abc", r"the image of 3 bytes cannot be read \(not an image\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read_images([PICTURE, source])
