"""The same picture comes out whatever holds it, and a broken one's reason fits into a sentence."""

from pathlib import Path

import pytest
from PIL import Image
from rows import encoded, noise

from corda_vlm.images import UNREADABLE, open_image, why_unreadable


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "CMYK", "I;16"])
def test_file_bytes_and_picture_are_one(mode: str, tmp_path: Path) -> None:
    picture = noise(0).convert("I").convert("I;16") if mode == "I;16" else noise(0).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    (tmp_path / "a").write_bytes(encoded(picture, form))
    opened = [open_image(one) for one in (picture, tmp_path / "a", str(tmp_path / "a"), encoded(picture, form))]
    assert {(one.mode, one.tobytes()) for one in opened} == {("RGB", picture.convert("RGB").tobytes())}


def test_a_picture_in_rgb_is_not_copied() -> None:
    picture = noise(0)
    assert open_image(picture) is picture


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file or directory"), (b"<html>404</html>", "not an image"), (b"", "not an image")]
)
def test_reasons(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UNREADABLE) as found:
        open_image(tmp_path / "a.png")
    assert why_unreadable(found.value) == reason


def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UNREADABLE) as found:
        open_image(encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-200])
    assert why_unreadable(found.value).startswith("image file is truncated")
    assert "\n" not in why_unreadable(found.value)
