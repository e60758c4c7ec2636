"""Pages of one file each, and what their pictures look like; both need the extra ``demo``."""

import base64
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INK, MUTED, GRID, LINE = "#1c2430", "#5b6675", "#e3e7ec", "#b8c0ca"
BETTER, WORSE = "#00694f", "#b5390a"
COLORS = ("#e69f00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#b5a800", "#4d4d4d")
"""Okabe and Ito's palette, told apart by colour-blind readers."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # a "$" in a label is a "$"
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "corda-vlm",  # equal values give equal bytes
}
"""For ``matplotlib.rc_context``."""


def require_extra() -> None:
    """Check that matplotlib and jinja2 are there. A long run asks before it starts, not when it ends.

    Raises:
        ModuleNotFoundError: If one is not; the text names it and the command that installs it.
    """
    for name in ("matplotlib", "jinja2"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} is not installed; run: pip install 'corda-vlm[demo]'", name=name) from error


def page(template: str, folder: Path, title: str, values: Mapping[str, Any], lists: Mapping[str, Mapping[str, str]]) -> str:
    """Return a page that loads nothing from anywhere.

    Args:
        template: Name of a template that extends ``frame.html.j2``.
        folder: Where it is.
        title: Title and heading.
        values: What the template shows.
        lists: What the page ends with: by heading, texts by label.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render({**values, "title": title, "lists": lists})


def address_of(picture: bytes, kind: str) -> str:
    """Return a ``data:`` address that holds a picture, of a kind such as "png" or "svg+xml"."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
