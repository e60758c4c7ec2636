"""Options that are what they are declared to be: types and bounds stand at the field, once, for the API, files and the command line.

Whatever fills a dataclass with values that somebody wrote goes through ``as_declared``; those that people make themselves have ``Options``
as their base. pydantic judges, strictly: true is no number and "8" no whole one.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError

LARGEST = 2**31 - 1
"""What counts may be: sizes and steps beyond it overflow in one library or another."""
LONGEST_NAME = 200
"""Bytes of a name that becomes a file's: file systems allow 255, and something comes behind it."""


def plain_file_name(name: str) -> str:
    """Return the name, if a file that is called so lies in the folder that it is written to.

    Raises:
        ValueError: If it leads elsewhere, is hidden, too long or not printable; the text is what is expected.
    """
    if not name or name.startswith(".") or not name.isprintable() or {"/", "\\"} & set(name) or len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"a plain file name (printable, no slash, no dot in front, at most {LONGEST_NAME} bytes)")
    return name


def one_of(*known: str) -> AfterValidator:
    """Return what refuses every text but these."""
    names = [str(name) for name in known]

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"one of {names}")
        return str(value)  # a StrEnum's own is no plain text

    return AfterValidator(check)


Count = Annotated[int, Field(ge=1, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""As numpy's are."""
FileName = Annotated[str, AfterValidator(plain_file_name)]
"""Names a file in an output."""
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which ``~`` is the home folder, or an id of a hub."""

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "sequence_str": "a list",
    "dict_type": "values by name",
    "mapping_type": "values by name",
    "dataclass_exact_type": "option: value lines",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "value_error": "{error}",
}
"""pydantic's kinds of errors in our words; for others its own are taken."""


class Options:
    """Base of frozen dataclasses that refuse values which their fields do not declare, whoever makes one."""

    def __post_init__(self) -> None:
        """Take each value as its field declares it.

        Raises:
            ValueError: If a value is of another type or out of bounds; the text names the option.
        """
        for name, value in as_declared(type(self), vars(self)).items():
            object.__setattr__(self, name, value)  # frozen from here on


def as_declared(schema: type, values: Mapping[str, Any], *, written: bool = False) -> dict[str, Any]:
    """Return values for a dataclass's fields as their types declare them.

    Args:
        schema: The dataclass.
        values: By field.
        written: Whether they come from YAML, which has 5e-4 for a text and 8.0 for no whole number: then they are taken as they are meant.

    Raises:
        ValueError: If one is of another type or out of bounds: which, what it is and what was expected.
    """
    fields = _fields(schema)
    return {name: _read(name, value, *fields[name], written) for name, value in values.items()}


def first_unknown(schema: type, names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first of the names that no field of a dataclass has, and what was meant or is known, in words; None if there is none."""
    known = [field.name for field in dataclasses.fields(schema)]
    unknown = next((name for name in names if name not in known), None)
    if unknown is None:
        return None
    near = get_close_matches(str(unknown), known, n=1)
    return unknown, f"did you mean {near[0]!r}?" if near else f"known: {sorted(known)}."


@cache
def _fields(schema: type) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    """Return each field's type and what reads it."""
    return {name: (declared, _adapter(declared)) for name, declared in get_type_hints(schema, include_extras=True).items()}


def members_of(declared: Any) -> tuple[Any, ...]:
    """Return what a type is a union of, or itself alone."""
    return get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)


def _adapter(declared: Any) -> TypeAdapter[Any]:
    if dataclasses.is_dataclass(declared):
        return TypeAdapter(Annotated[declared, InstanceOf()])  # such a type takes no config from here
    # The text of a StrEnum is as good as itself.
    has_enum = any(isinstance(member, type) and issubclass(member, Enum) for member in members_of(declared))
    return TypeAdapter(declared) if has_enum else TypeAdapter(declared, config=STRICT)


def _read(name: str, value: Any, declared: Any, adapter: TypeAdapter[Any], written: bool) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        try:
            return adapter.validate_python(_with_numbers(value, written))
        except (ValidationError, RecursionError):  # YAML can write lists that hold themselves
            raise ValueError(_sentence(name, value, declared, error)) from None


def _with_numbers(value: Any, written: bool) -> Any:
    """Return a value with Python's numbers for numpy's; what was written, also with those that texts read as, and whole ones for 8.0."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(item, written) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_numbers(item, written) for item in value]
    if isinstance(value, str):
        return _number_in(value) if written else value
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return int(number) if written and number.is_integer() else number


def _number_in(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _sentence(name: str, value: Any, declared: Any, error: ValidationError) -> str:
    """Return what is wrong with a value."""
    members = members_of(declared)
    errors: Sequence[Any] = error.errors(include_url=False)
    if sum(member is not NoneType for member in members) == 1:  # places in unions of more name their members too
        name += "".join(f"[{place!r}]" for place in errors[0]["loc"] if place != "[key]")
        value, errors = errors[0]["input"], errors[:1]
    words = [*dict.fromkeys(map(_expected, errors)), *(["null"] if NoneType in members else [])]
    return f"{name} is {_short(value)}; expected {' or '.join(words)}."


def _expected(error: Any) -> str:
    known = EXPECTED.get(error["type"])
    if known is None:
        return str(error["msg"]).removeprefix("Input should be ").replace("an instance of Sequence", "a list")
    return known.format(**error.get("ctx", {}))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
