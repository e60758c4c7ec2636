"""YAML -> dataclasses of options, with every value as its field declares it."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import yaml

from corda_core.files import read_text
from corda_vlm.options import as_declared, first_unknown, members_of

T = TypeVar("T")


def read_config(path: Path, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """Return the dataclass ``schema`` filled from a YAML file, and from ``key.key=value`` overrides.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no mapping, has a key that the dataclass does not have, or lacks one that it needs.
    """
    if not path.exists():
        raise FileNotFoundError(f"The config {path} does not exist; the shipped ones are in configs/.")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected option: value lines.")
    return from_mapping(overridden(values, overrides, str(path)), schema, str(path))


def from_mapping(values: Mapping[str, Any], schema: type[T], source: str) -> T:
    """Return the dataclass ``schema`` filled from a mapping, nested dataclasses included.

    Raises:
        ValueError: If a key is unknown, a value is not what its field declares or one is missing; the text names ``source`` and option.
    """
    return _filled(values, schema, source, ())


def _filled(values: Mapping[str, Any], schema: type[T], source: str, inside: tuple[str, ...]) -> T:
    """``from_mapping`` of the options under some names."""
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    where = ", ".join([source, *inside])
    unknown = first_unknown(schema, values)
    if unknown is not None:
        raise ValueError(f"{where}: unknown option {unknown[0]!r}; {unknown[1]}")
    filled = {key: _inner(value, fields[key].type, source, (*inside, key)) for key, value in values.items()}
    missing = [name for name, field in fields.items() if name not in filled and _is_required(field)]
    if missing:
        raise ValueError(f"{where}: the option {missing[0]!r} is missing and has no default; add it.")
    try:
        return schema(**as_declared(schema, filled, written=True))
    except ValueError as error:
        raise ValueError(f"{source}: {'.'.join([*inside, str(error)])}") from error


def _inner(value: Any, declared: Any, source: str, inside: tuple[str, ...]) -> Any:
    """Return an option's value, which is a dataclass of its own if its field declares one."""
    members = members_of(declared)
    nested = next((member for member in members if dataclasses.is_dataclass(member)), None)
    if nested is None or (value is None and NoneType in members) or isinstance(value, nested):  # type: ignore[arg-type]
        return value
    if not isinstance(value, Mapping):
        if any(member not in (nested, NoneType) for member in members):  # what else it may be is judged with the other options
            return value
        raise ValueError(f"{source}: {'.'.join(inside)} is {value!r}; expected option: value lines.")
    return _filled(value, nested, source, inside)  # type: ignore[arg-type]


def overridden(values: Mapping[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    """Return the mapping with ``key.key=value`` overrides put in; values are read as YAML.

    Raises:
        ValueError: If an override has another form, or goes into what is no mapping.
    """
    result = copy.deepcopy(dict(values))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ValueError(f"The override {override!r} is not of the form option=value, such as training.steps=100.")
        *parents, last = path.split(".")
        place = result
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"The override {override!r} goes into {parent!r}, which holds no options in {source}.")
        place[last] = _yaml_value(text, override)
    return result


def _yaml_value(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # numbers of more digits than Python reads, and dates that there are not
        reason = " ".join(str(error).split())
        raise ValueError(f"The override {override!r} has a value that is no YAML ({reason}); put quotes around a text.") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def read_yaml(path: Path, cure: str = "mend that line") -> Any:
    """Return what a YAML file holds; no code in it is run, and no key may stand twice.

    Args:
        path: The file.
        cure: What to do if it cannot be read, for the error's text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML.
    """
    text = read_text(path, cure)
    try:
        return yaml.load(text, _KeysOnce)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a date that does not exist
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}; {cure}.") from error


class _KeysOnce(yaml.SafeLoader):
    """PyYAML's safe reader, which would take the last of equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((value for place, (tag, value) in enumerate(keys) if (tag, value) in keys[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)
