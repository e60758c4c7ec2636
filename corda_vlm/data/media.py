"""Where a row or a sample has its pictures, in any form; pictures, videos and sounds that would be overlooked are refused."""

import re
from collections.abc import Container, Mapping
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from PIL import Image

PICTURES = ("image", "images")
"""The fields that are read."""
FORM = r"(_?(path|file|file_?name|url|uri|bytes|data|b64|base64)s?)?"
PICTURE_NAME = re.compile(rf"(image|img|picture|photo)s?{FORM}", re.IGNORECASE)
"""Other names of a picture, or of where the one in ``image`` came from."""
FILE_NAME = re.compile(r"file_?names?", re.IGNORECASE)
"""The name of images in the ``metadata`` of image folders: a picture's if its suffix is one. Other fields may name any file."""
OTHER_NAME = re.compile(rf"(video|audio)s?{FORM}|(image|img|picture|photo)_?\d+", re.IGNORECASE)
"""Names of media that are never read, and of pictures beside others."""
TEXTS = frozenset({"text", "question", "answer", "answers", "conversations", "messages", "caption"})
"""Fields whose text may look like the name of a file."""


def image_field(fields: Mapping[str, Any], read: Container[str] = TEXTS) -> Any:
    """Return what a row or sample has for its image or images: what is in ``image`` or ``images``, or None for none.

    Args:
        fields: All there are.
        read: Names of those that are read as something else.

    Raises:
        ValueError: If both are filled, or another field holds a picture, a video or a sound, which would go unseen.
    """
    filled = [name for name in PICTURES if _is_filled(fields.get(name))]
    if len(filled) > 1:
        raise ValueError("both `image` and `images` are filled; expected one of them; leave the other out.")
    for name, value in fields.items():
        if name not in PICTURES and name not in read and _is_overlooked(name, value, has_image=bool(filled)):
            raise ValueError(
                f"{name!r} holds what looks like a picture, video or sound and is not read; put it into `image` (its column into "
                "`columns`), or leave it out."
            )
    return fields[filled[0]] if filled else None


def image_sources(value: Any, what: str = "An image") -> list[Any]:
    """Return what each image of a field is opened from: a path, bytes or a PIL image, or an empty text where one of a list is missing.

    Args:
        value: One of these, ``{"bytes": …, "path": …}`` as ``datasets`` has it, a list of these, or None.
        what: What an error calls it.

    Raises:
        ValueError: If it is something else.
    """
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [source for member in value for source in image_sources(member, what) or [""]]
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return [value["bytes"]] if value.get("bytes") is not None else image_sources(value.get("path"), what)
    if isinstance(value, (str, Path, bytes, Image.Image)):
        return [value]
    raise ValueError(f"{what} is a {type(value).__name__}; expected a path, bytes, a PIL image, a list of these, or none.")


def _is_overlooked(name: str, value: Any, *, has_image: bool) -> bool:
    """Return whether a field that nobody reads holds a medium; the path of an image that is there too is none."""
    if not _is_filled(value) or isinstance(value, (bool, int, float)) or value == "":
        return False
    if OTHER_NAME.fullmatch(name) or _is_content(value):
        return True
    if isinstance(value, Mapping) and any(_is_overlooked(str(key), inner, has_image=has_image) for key, inner in value.items()):
        return True
    return not has_image and (PICTURE_NAME.fullmatch(name) is not None or (FILE_NAME.fullmatch(name) is not None and _names_image(value)))


def _is_filled(value: Any) -> bool:
    if isinstance(value, Mapping) and {"bytes", "path"} >= set(value):
        return any(inner is not None for inner in value.values())
    return value is not None and not (isinstance(value, (list, tuple, Mapping)) and not value)


def _is_content(value: Any) -> bool:
    """Return whether a value is a medium itself, or a list with one."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_content, value))
    return isinstance(value, (bytes, Image.Image)) or (isinstance(value, Mapping) and bool({"bytes", "array"} & set(value)))


def _names_image(value: Any) -> bool:
    """Return whether a value is the name of an image's file, or a list with one."""
    if isinstance(value, (list, tuple)):
        return any(map(_names_image, value))
    return isinstance(value, (str, Path)) and (guess_type(str(value))[0] or "").startswith("image")
