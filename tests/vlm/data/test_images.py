"""The same picture comes out whatever holds it, and a broken one's reason fits into a sentence."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rows import encoded, noise
from transformers.image_transforms import convert_to_rgb

from corda_vlm.data.images import UNREADABLE, open_image, why_unreadable


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "CMYK", "I;16"])
def test_file_bytes_and_picture_are_one(mode: str, tmp_path: Path) -> None:
    picture = noise(0).convert("I").convert("I;16") if mode == "I;16" else noise(0).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    (tmp_path / "a").write_bytes(encoded(picture, form))
    opened = [open_image(source) for source in (picture, tmp_path / "a", str(tmp_path / "a"), encoded(picture, form))]
    assert {(image.mode, image.tobytes()) for image in opened} == {("RGB", picture.convert("RGB").tobytes())}


def test_a_picture_in_rgb_is_not_copied() -> None:
    picture = noise(0)
    assert open_image(picture) is picture


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file or directory"), (b"<html>404</html>", "not an image"), (b"", "not an image")]
)
def test_reasons(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UNREADABLE) as raised:
        open_image(tmp_path / "a.png")
    assert why_unreadable(raised.value) == reason


def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UNREADABLE) as raised:
        open_image(encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-200])
    assert why_unreadable(raised.value).startswith("image file is truncated")
    assert "\n" not in why_unreadable(raised.value)


def ramp(white: float, dtype: str) -> Image.Image:
    """All 256 greys, as levels up to white."""
    return Image.fromarray((np.arange(256).reshape(16, 16) * (white / 255)).astype(dtype))


@pytest.mark.parametrize(
    ("white", "dtype", "form"),
    [
        (65535, "uint16", "PNG"),
        (65535, "uint16", "TIFF"),
        (65535, ">u2", "PNG"),
        (65535, "uint16", "PPM"),
        (65535, "int32", "TIFF"),
        (255, "int32", "TIFF"),
        (65535, "float32", "TIFF"),
        (255, "float32", "TIFF"),
        (1, "float32", "TIFF"),
        (255, "uint8", "PNG"),
    ],
)
def test_wide_greys_keep_all_that_8_bits_hold(white: float, dtype: str, form: str) -> None:
    for picture in (ramp(white, dtype), encoded(ramp(white, dtype), form)):
        opened = open_image(picture)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened)[..., 0].ravel(), np.arange(256))


def test_greys_are_not_stretched() -> None:
    half = Image.fromarray(np.array([[0, 32896]], dtype=np.uint16))
    assert open_image(half).getpixel((1, 0)) == (128, 128, 128)


def test_tiff_of_12_bits() -> None:
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 110, 277: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 3 if tag in (258, 259, 262) else 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    assert len(header) == 110
    opened = open_image(header + bytes([0xFF, 0xF8, 0x00]))  # 4095 and 2048
    assert [opened.getpixel((place, 0))[0] for place in (0, 1)] == [255, 128]  # type: ignore[index]


@pytest.mark.parametrize("levels", [[0.0, float("nan")], [-1024.0, 3071.0], [0.0, 65536.0], [-1, 5], [0, 2**30]])
def test_levels_of_no_known_unit_are_refused(levels: list[float]) -> None:
    picture = Image.fromarray(np.array([levels], dtype=np.float32 if isinstance(levels[0], float) else np.int32))
    with pytest.raises(UNREADABLE, match="its levels go from .* expected 0 to 65535 at most"):
        open_image(picture)


def see_through(mode: str) -> Image.Image:
    """A clear pixel that is black beneath, and a red (or grey) one that is not."""
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (200, 0, 0, 255))
    if mode == "RGBa" or not mode.startswith(("P", "L")):
        return picture.convert(mode)
    if mode in ("LA", "La"):
        return picture.convert("LA").convert(mode)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    return palette if mode == "P" else palette.convert("PA")


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La"])
def test_an_alpha_channel_is_laid_on_white_as_transformers_does(mode: str) -> None:
    picture = see_through(mode)
    assert open_image(picture).getpixel((0, 0)) == (255, 255, 255)
    if mode in ("RGBA", "LA"):
        assert np.array_equal(np.asarray(open_image(encoded(picture))), convert_to_rgb(picture, return_numpy=True))
        half = noise(0).convert(mode)
        half.putalpha(noise(1, "L"))
        assert np.array_equal(np.asarray(open_image(half)), convert_to_rgb(half, return_numpy=True))


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_palettes_transparency_is_laid_on_white(form: str) -> None:
    content = BytesIO()
    see_through("P").save(content, form, transparency=0, lossless=True)
    opened = open_image(content.getvalue())
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == ((255, 255, 255), (200, 0, 0))
    assert "transparency" not in opened.info


@pytest.mark.parametrize(("mode", "colour"), [("L", 0), ("RGB", (0, 0, 0)), ("I;16", 0)])
def test_a_colour_that_counts_as_transparent_becomes_white(mode: str, colour: Any) -> None:
    content = BytesIO()
    picture = Image.new(mode, (2, 1))
    seen: dict[str, Any] = {"L": 200, "RGB": (200, 200, 200), "I;16": 200 * 257}
    picture.putpixel((1, 0), seen[mode])
    picture.save(content, "PNG", transparency=colour)
    opened = open_image(content.getvalue())
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == ((255, 255, 255), (200, 200, 200))


def test_the_first_of_several_frames_counts() -> None:
    for form in ("GIF", "TIFF", "WEBP", "PNG"):
        content = BytesIO()
        Image.new("RGB", (4, 4), "red").save(content, form, save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")], lossless=True)
        assert open_image(content.getvalue()).getpixel((0, 0)) == (255, 0, 0), form


def bomb(width: int, height: int) -> bytes:
    """A small file of many black pixels."""
    start, rest = encoded(Image.new("1", (8, 1))).split(b"IHDR")
    header = b"IHDR" + struct.pack(">II", width, height) + rest[8:13]
    return start + header + struct.pack(">I", zlib.crc32(header)) + rest[17:]


@pytest.mark.parametrize("size", [(13_300, 13_300), (9_460, 9_460), (20_000, 20_000)])
def test_a_picture_of_too_many_pixels_is_not_decoded(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bomb(*size))
    with pytest.raises(Image.DecompressionBombError, match="pixels.*; make it smaller, or raise `max_pixels`"):
        open_image(tmp_path / "a.png")


def test_the_limit_may_be_lower_or_higher_or_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(noise(0))
    with pytest.raises(Image.DecompressionBombError, match="it has 16 x 16 = 256 pixels, more than 255"):
        open_image(content, 255)
    with pytest.raises(Image.DecompressionBombError, match="more than 255"):
        open_image(Image.open(BytesIO(content)), 255)
    assert open_image(noise(0), 255).size == (16, 16)  # in memory already
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError, match=r"256 pixels.*raise `max_pixels`"):
        open_image(content)
    assert open_image(content, 256).size == (16, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(content).size == (16, 16)


def test_grey_of_fewer_bits_in_a_file_of_16_is_told(recwarn: pytest.WarningsRecorder) -> None:
    open_image(Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)))
    assert not recwarn
    with pytest.warns(UserWarning, match="A picture of 16 bits has no level above 8192"):
        open_image(Image.fromarray(np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)))
