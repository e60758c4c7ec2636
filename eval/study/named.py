"""Options that name what they are for: a method's, a setting's."""

from collections.abc import Mapping
from typing import Any

from corda_vlm.yaml import from_mapping


def options_of(values: Mapping[str, Any], key: str, table: Mapping[str, type], what: str) -> Any:
    """Return the dataclass of a table that a mapping names under ``key``, filled with its other values.

    Raises:
        ValueError: If the name or an option is unknown, or a value not right; the text says of which ``what``.
    """
    options = dict(values)
    name = options.pop(key, None)
    if name not in table:
        raise ValueError(f"The {what} {name!r} is unknown; expected {key}: one of {', '.join(sorted(table))}.")
    return from_mapping(options, table[name], f"{what} {name}")
