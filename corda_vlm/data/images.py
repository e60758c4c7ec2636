"""Pictures from wherever they are held, in RGB."""

import errno
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from corda_vlm.failures import one_line

UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow's readers raise on broken files."""
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EIO)
"""Errors for which no file is to blame: too many open files, a failing disk."""
TOO_LARGE = "make it smaller, or raise `max_pixels` of the data (in evaluations PIL.Image.MAX_IMAGE_PIXELS)"
BITS_PER_SAMPLE = 258
"""TIFF's tag."""
DARK = 65536 // 8
"""Level of 16 bits below which a picture is probably one of fewer bits."""


class BrokenImageError(ValueError):
    """An image that is missing, or cannot be read."""


def read_image(source: str | Path | bytes | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Return what ``open_image`` does, and one error for all that may be wrong with an image.

    Raises:
        BrokenImageError: If it cannot be read.
        OSError: If the machine is to blame.
    """
    with _telling_what_is_broken(source):
        return open_image(source, max_pixels)


def open_image(source: str | Path | bytes | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Return the image of a file, of a file's bytes, or one that is open already, in RGB of 8 bits.

    Grey of more than 8 bits is scaled by its unit, not stretched: white is 65535; or 255 where no level is above that (8 bits in a wider
    form); for floats 1 where none is above that; in TIFF of 12 bits 4095. Levels outside of 0 to 65535 have no known unit and are refused.
    (Little is left of 12 bits in a file of 16: scale them first.) What is transparent, by an alpha channel, a palette's or a colour that
    the file names, is laid on white, as transformers' processors do. Black and white, grey, palettes, CMYK, YCbCr, LAB and HSV go through
    Pillow's own conversion, and so do colours of 16 bits, of which Pillow reads the upper 8.

    Args:
        source: The image; of several frames or pages the first counts.
        max_pixels: How many it may have if it is yet to be decoded; None takes Pillow's own limit, ``PIL.Image.MAX_IMAGE_PIXELS``, which is
            raised for this process where this is more.

    Raises:
        Exception: One of ``UNREADABLE``, as Pillow gives it, if it cannot be read; a ``ValueError`` if its values have no known unit, a
            ``DecompressionBombError`` if it has more pixels.

    Note:
        Images are taken as they are stored: EXIF's orientation and colour profiles are not applied.
    """
    if isinstance(source, Image.Image):
        if getattr(source, "tile", None):  # opened, but not decoded
            _check_size(source, max_pixels)
        return _in_rgb(source)
    if source == "":
        raise FileNotFoundError(errno.ENOENT, "its name is empty")
    with _opened(BytesIO(source) if isinstance(source, bytes) else source, max_pixels) as image:
        _check_size(image, max_pixels)
        image.load()
        rgb = _in_rgb(image)
        return rgb.copy() if rgb is image else rgb  # without the file's own class and what it holds


def size_of(source: str | Path | bytes | Image.Image, max_pixels: int | None = None) -> tuple[int, int]:
    """Return the width and height, in pixels, that ``read_image`` gives, of which only the header is read.

    Raises:
        BrokenImageError: If it cannot be read.
        OSError: If the machine is to blame.
    """
    if isinstance(source, Image.Image):
        return source.size
    with _telling_what_is_broken(source), _opened(BytesIO(source) if isinstance(source, bytes) else source, max_pixels) as image:
        _check_size(image, max_pixels)
        return image.size


@contextmanager
def _telling_what_is_broken(source: str | Path | bytes | Image.Image) -> Iterator[None]:
    """Make one error of all that may be wrong with an image."""
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        name = (
            f"{source} " if isinstance(source, (str, Path)) and source else f"of {len(source)} bytes " if isinstance(source, bytes) else ""
        )
        raise BrokenImageError(f"the image {name}cannot be read ({why_unreadable(error)})") from error


def why_unreadable(error: BaseException) -> str:
    """Return in a few words why an image could not be read."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text has an address in memory
        return "not an image"
    return getattr(error, "strerror", None) or one_line(error)


def _opened(source: str | Path | BytesIO, max_pixels: int | None) -> Image.Image:
    """Return a picture whose header is read."""
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        return Image.open(source)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Image.DecompressionBombError(f"{one_line(error)}; {TOO_LARGE}") from error


def _check_size(image: Image.Image, max_pixels: int | None) -> None:
    """Refuse, before it is decoded, what a small file may fill the memory with."""
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    size = image.width * image.height
    if limit is not None and size > limit:
        raise Image.DecompressionBombError(f"it has {image.width} x {image.height} = {size:,} pixels, more than {limit:,}; {TOO_LARGE}")


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _grey(image)
    if image.has_transparency_data:
        seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), seen).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Return grey of more than 8 bits in 8, rounded; a level that counts as transparent becomes white."""
    levels = np.asarray(image)
    scaled = np.rint(levels * np.float32(255 / _white(image, levels))).astype(np.uint8)
    if "transparency" in image.info:
        scaled[levels == image.info["transparency"]] = 255
    return Image.fromarray(scaled)


def _white(image: Image.Image, levels: np.ndarray) -> int:
    """Return the level that stands for white."""
    low, high = levels.min(), levels.max()
    if not 0 <= low <= high <= 65535:  # NaN too
        raise ValueError(f"its levels go from {low} to {high}; expected 0 to 65535 at most: scale it, or save it in 8 or 16 bits")
    if getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) == (12,):
        return 4095
    if image.mode == "F" and high <= 1:
        return 1
    if 255 < high < DARK:
        # The same text for all pictures, so that it is shown once.
        warnings.warn(
            f"A picture of 16 bits has no level above {DARK}, so it comes out nearly black and loses most of its levels; if its levels are "
            "of fewer bits (12, say), scale them to 65535 first.",
            stacklevel=5,
        )
    return 255 if high <= 255 else 65535
