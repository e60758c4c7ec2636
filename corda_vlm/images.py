"""Pictures from wherever they are held, in RGB."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from corda_vlm.sources import one_line

UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow's readers raise on broken files."""


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Return the image of a file, of a file's bytes, or one that is open already, in RGB.

    Raises:
        Exception: One of ``UNREADABLE``, as Pillow gives it, if it cannot be read.

    Note:
        Images are taken as they are stored: EXIF's orientation is not applied.
    """
    if isinstance(source, Image.Image):
        return source if source.mode == "RGB" else source.convert("RGB")
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image.convert("RGB")


def why_unreadable(error: BaseException) -> str:
    """Return in a few words why an image could not be read."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text has an address in memory
        return "not an image"
    return getattr(error, "strerror", None) or one_line(error)
