"""Markdown of what may hold anything: names from configs and files stay text, whatever signs are in them."""

import re
from collections.abc import Sequence


def escaped(text: str) -> str:
    """Return Markdown that shows a text as it is, on one line: no column, tag, code, emphasis or link comes of it."""
    # An ampersand counts only where it begins an entity, a bracket only where a link's target follows.
    return re.sub(r"[\\`|<*]|&(?=#?\w+;)|(?<=\])\(", r"\\\g<0>", " ".join(text.split(sep="\n")))


def code(text: str) -> str:
    """Return Markdown that shows a text as code."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines, the last of them empty."""
    lines = [f"| {' | '.join(map(escaped, line))} |" for line in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]
