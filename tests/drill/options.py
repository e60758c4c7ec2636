"""Bad values for every option that is declared, and bad values of the command line's own."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from random import Random
from typing import Any

from corda_eval.demo.demo import DemoConfig
from corda_eval.study.grid import StudyConfig
from corda_eval.suite.tasks import Suite, SuiteTask
from corda_vlm.training.recipe import Recipe

HUGE = 10**12
VALUES: tuple[Any, ...] = (
    *([], [1, 2], ["x"], {}, {"x": 1}, {1: None}, None, True, False),
    *(0, -1, -3.5, 2.5, 1, HUGE, -HUGE, 10**400, 1e308, 1e-320, math.nan, math.inf, -math.inf),
    *("", " ", "many", "1e", "(", "[a-", "*", "../../x", "no/such/file", "a\nb", "\x00", "ü" * 300, "{", "{0}", "{x", "12,5", "null"),
    date(2026, 1, 1),
)
"""What is tried as the value of each option."""
ENDLESS = {"training.steps", "training.epochs", "training.workers", "corda.candidates", "training.batch_size", "training.micro_batch_size"}
"""Options of which a huge value is legal, and takes for ever: it is only read."""


@dataclass(frozen=True)
class Option:
    """An option of one of the files that users write."""

    schema: type
    path: str
    """Its name, after those of the sections that it is in."""

    declared: Any


def options(schema: type, prefix: str = "") -> Iterator[Option]:
    """Yield every option of a schema, sections and what is in them."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        declared = hints[field.name]
        yield Option(schema, prefix + field.name, declared)
        section = next((kind for kind in _alternatives(declared) if dataclasses.is_dataclass(kind)), None)
        if section is not None:
            yield from options(typing.cast(type, section), f"{prefix}{field.name}.")


def fits(value: Any, declared: Any) -> bool:
    """Return whether a value is of a declared type: whatever else is wrong with it, it may be a legal one.

    A number's text is one, as YAML takes 1e-3 for a text; NaN and infinity are no numbers that anybody means.
    """
    kinds = _alternatives(declared)
    if len(kinds) > 1:
        return any(fits(value, kind) for kind in kinds)
    (kind,) = kinds
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return True
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items())
    if origin in (Sequence, tuple):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if kind in (int, float):
        return _is_number(value, kind)
    return isinstance(value, kind)


def _is_number(value: Any, kind: type) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value)) and (kind is float or float(value).is_integer())
    except (TypeError, ValueError, OverflowError):
        return isinstance(value, int) and kind is int  # one too large for a float


def _alternatives(declared: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(declared) if isinstance(declared, types.UnionType) or typing.get_origin(declared) is typing.Union else (declared,)
    )


RECIPE = list(options(Recipe))
SUITE = [*(option for option in options(Suite) if option.path != "tasks"), *options(SuiteTask, "tasks.")]
STUDY, DEMO = list(options(StudyConfig)), list(options(DemoConfig))

OVERRIDES = (
    *("training.steps", "=3", "=", ".=1", "training..steps=1", "training.steps.x=1", "training.steps=[1", "training.steps=}", "model=1"),
    *("training.steps=@", "training.steps=*a", "training.steps=&a *a", "training.steps=!!python/object:os.system x", "\x00=1", "a.b.c.d=1"),
    *("training.steps=a: b: c", "training.steps=!!int x", "training.stepps=1", "Training.steps=1", "training .steps=1", "data=[]"),
    *("training.steps=1\n2", "training.steps='", "training.steps=\ud800", "corda.targets=(", "corda.targets=[a, 1]", "corda.exclude=*"),
)
"""Overrides that are none."""

NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e999", "x", "", "2.5", str(HUGE))
PATHS = ("", "no/such/file", "\x00", "x" * 5000, ".", "recipe.yaml")
FLAGS: dict[tuple[str, str], Sequence[str]] = {
    ("export", "--alpha"): NUMBERS,
    ("export", "--compress"): NUMBERS,
    ("export", "--dtype"): ("", "float8", "float64", "torch.float32", "1"),
    ("export", "--base"): PATHS,
    ("export", "--adapter"): PATHS,
    ("eval", "--base"): PATHS,
    ("eval", "--adapter"): PATHS,
    ("eval", "--suite"): PATHS,
    ("eval", "--dtype"): ("", "float8", "float64", "1"),
    ("eval", "--library"): ("", "timm", "open-clip", "open_clip"),
    ("eval", "--weights"): ("", "openai"),
    ("eval", "--check-batch-invariance"): ("nan", "-1", "x", "", "2.5"),
    ("eval", "--output"): ("recipe.yaml", "\x00", "recipe.yaml/x"),
    ("train", "--config"): PATHS[:-1],
    ("prepare", "--config"): PATHS[:-1],
    ("compare", "--config"): PATHS,
    ("compare", "--output"): ("recipe.yaml", "\x00"),
    ("demo", "--config"): PATHS,
}
"""Bad values of flags, by command."""


def drawn(rng: Random, choices: Sequence[Option]) -> tuple[Option, Any]:
    """Return an option and a value for it."""
    return rng.choice(choices), rng.choice(VALUES)
