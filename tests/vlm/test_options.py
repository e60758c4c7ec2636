"""Options are what their fields declare, whoever gives them: the API, a file, the command line."""

import dataclasses
import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import yaml

from corda_core import Mode
from corda_core.linears import select_linears
from corda_eval.demo.demo import DemoConfig
from corda_eval.study.grid import StudyConfig
from corda_eval.study.methods import METHODS
from corda_eval.study.settings import SETTINGS
from corda_eval.study.worker import RunSpec
from corda_eval.suite.tasks import Suite, SuiteTask
from corda_vlm import CordaConfig
from corda_vlm.data.sources import DataConfig
from corda_vlm.options import Count, FileName, Options, Place, Positive, one_of
from corda_vlm.training.recipe import ModelConfig, Recipe, TrainingConfig
from corda_vlm.yaml import from_mapping, overridden, read_config

RECIPE: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "d"}, "context": {"source": "c"}, "output": "o"}
BAD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    10**30,
    "",
    "x",
    "nan",
    "8",
    "(",
    "../x",
    b"x",
    datetime.date(2024, 1, 1),
]
BAD += [[], [1], ["x"], [[]], {}, {"a": 1}, {1: "a"}, {"a": []}, {"image": math.nan, "text": 1.0}]


@dataclass(frozen=True)
class Tried(Options):
    count: Count = 1
    number: Positive | None = None
    flag: bool = False
    texts: Sequence[str] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    either: str | Mapping[str, float] = "all"
    mode: Mode = Mode.KPM
    known: Annotated[str, one_of(*Mode)] = "kpm"
    name: FileName = "a"
    place: Place = "."


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": "8"}, "count is '8'; expected a whole number."),
        ({"count": True}, "count is True; expected a whole number."),
        ({"count": 0}, "count is 0; expected at least 1."),
        ({"count": 2**31}, "count is 2147483648; expected at most 2147483647."),
        ({"count": 1.5}, "count is 1.5; expected a whole number."),
        ({"number": math.nan}, "number is nan; expected a finite number or null."),
        ({"number": "inf"}, "number is 'inf'; expected a number or null."),
        ({"number": {"a": 1}}, "number is {'a': 1}; expected a number or null."),
        ({"number": -0.5}, "number is -0.5; expected more than 0 or null."),
        ({"flag": "yes"}, "flag is 'yes'; expected true or false."),
        ({"flag": 1}, "flag is 1; expected true or false."),
        ({"texts": "abc"}, "texts is 'abc'; expected a list."),
        ({"texts": ["a", 1]}, "texts[1] is 1; expected a text."),
        ({"weights": {"a": "b"}}, "weights['a'] is 'b'; expected a number."),
        ({"weights": [1]}, "weights is [1]; expected values by name."),
        ({"either": ["a"]}, "either is ['a']; expected a text or values by name."),
        ({"mode": "kmp"}, "mode is 'kmp'; expected 'kpm', 'ipm' or 'lora'."),
        ({"known": "kmp"}, "known is 'kmp'; expected one of ['kpm', 'ipm', 'lora']."),
        ({"name": "../../x"}, "name is '../../x'; expected a plain file name (printable, no slash, no dot in front, at most 200 bytes)."),
        ({"place": None}, "place is None; expected a text."),
    ],
)
def test_what_is_not_declared_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Tried(**options)
    assert str(caught.value) == sentence
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        from_mapping(options, Tried, "a.yaml")
    assert str(caught.value) == f"a.yaml: {sentence}"


def test_what_was_written_is_taken_as_it_is_meant() -> None:
    written = {"count": 8.0, "number": "5e-4", "weights": {"a": "1e-3", "b": 2}, "mode": "ipm", "texts": ["a"]}
    assert from_mapping(written, Tried, "a.yaml") == Tried(8, 5e-4, weights={"a": 1e-3, "b": 2.0}, mode=Mode.IPM, texts=["a"])
    for option in ("count", "number", "weights"):  # in Python there is no need to guess
        with pytest.raises(ValueError, match=f"{option}.* is "):
            Tried(**{option: written[option]})


def test_equal_values_of_other_types_are_taken() -> None:
    tried = Tried(count=np.int64(3), number=np.float32(2), known=Mode.IPM, texts=("a",), place="~/runs")  # type: ignore[arg-type]
    assert tried == Tried(3, 2.0, known="ipm", texts=("a",), place=str(Path.home() / "runs"))
    assert (type(tried.count), type(tried.number), type(tried.known)) == (int, float, str)


def holding_itself() -> Any:
    return yaml.safe_load("&a [*a]")


@pytest.mark.parametrize("schema", [Recipe, StudyConfig, DemoConfig, RunSpec, SuiteTask, Suite, *METHODS.values(), *SETTINGS.values()])
def test_no_value_of_any_option_ends_in_a_traceback(schema: type) -> None:
    """Every option of every schema, each with every kind of wrong value: taken, or refused in one sentence that names it."""
    for path in paths_of(schema):
        for value in [*BAD, holding_itself()]:
            nested: Any = value
            for key in reversed(path):
                nested = {key: nested}
            sentence = refusal(merged(RECIPE if schema is Recipe else {}, nested), schema)
            assert sentence is None or (sentence.startswith("a.yaml") and "\n" not in sentence), (path, value)


def refusal(values: Mapping[str, Any], schema: type) -> str | None:
    try:
        from_mapping(values, schema, "a.yaml")
    except ValueError as error:
        return str(error)
    return None


def paths_of(schema: type) -> list[tuple[str, ...]]:
    nested = {"model": ModelConfig, "data": DataConfig, "context": DataConfig, "corda": CordaConfig, "training": TrainingConfig}
    paths: list[tuple[str, ...]] = []
    for option in dataclasses.fields(schema):
        inner = nested.get(option.name) if schema is Recipe else None
        paths += [(option.name,), *((option.name, *path) for path in (paths_of(inner) if inner else []))]
    return paths


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) and value else value
    return result


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CordaConfig(rank="8"), "rank is '8'"),  # type: ignore[arg-type]
        (lambda: CordaConfig(rank=True), "rank is True"),
        (lambda: CordaConfig(rank=math.nan), "rank is nan"),  # type: ignore[arg-type]
        (lambda: CordaConfig(alpha=math.inf), "alpha is inf"),
        (lambda: CordaConfig(seed=-1), "seed is -1; expected at least 0"),
        (lambda: CordaConfig(damping=math.nan), "damping is nan"),
        (lambda: CordaConfig(targets="(q_proj"), "targets is '(q_proj', which is no regular expression"),
        (lambda: CordaConfig(exclude="a{99999999999999}"), "exclude is 'a{99999999999999}', which is no regular expression"),
        (lambda: CordaConfig(parts="language"), "parts is 'language'; expected a list"),
        (lambda: CordaConfig(budget=True), "budget is True"),
        (lambda: CordaConfig(max_memory=math.inf), "max_memory is inf"),
        (lambda: CordaConfig(tokens={"image": math.nan, "text": 1.0}), "tokens is "),
        (lambda: TrainingConfig(learning_rate=math.nan), "learning_rate is nan"),
        (lambda: TrainingConfig(epochs=math.inf), "epochs is inf"),
        (lambda: TrainingConfig(bf16="yes"), "bf16 is 'yes'"),  # type: ignore[arg-type]
        (lambda: ModelConfig(["a"]), "path is ['a']"),  # type: ignore[arg-type]
        (lambda: Recipe({"path": "m"}, DataConfig("d"), "o"), "model is {'path': 'm'}; expected an instance of ModelConfig"),  # type: ignore[arg-type]
        (lambda: DataConfig("d", columns={"question": 1}), "columns['question'] is 1"),  # type: ignore[dict-item]
        (lambda: SuiteTask("digits", name="../../x"), "name is '../../x', which files are called by"),
        (lambda: SuiteTask(".."), "name is '..', which files are called by"),
        (lambda: Suite([], batch_size=0), "batch_size is 0"),
        (lambda: RunSpec({}, None, math.nan, 0, []), "rate is nan"),
    ],
)
def test_the_api_refuses_as_files_do(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert sentence in str(caught.value)


def test_patterns_are_read_where_layers_are_selected_too() -> None:
    with pytest.raises(ValueError, match="exclude is '\\*', which is no regular expression"):
        select_linears(__import__("torch").nn.Linear(1, 1), exclude="*")


def test_sections_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"training": {"workers": -1}}))
    for overrides, sentence in (
        ([], "a.yaml: training.workers is -1; expected at least 0."),
        (["training=3"], "a.yaml: training is 3; expected option: value lines."),
        (["training.workers=[]"], "a.yaml: training.workers is []; expected a whole number."),
        (["model="], "a.yaml: model is None; expected option: value lines."),
        (["training.workers=[1"], "The override 'training.workers=[1' has a value that is no YAML"),
        (["training.steps=2024-13-01"], "The override 'training.steps=2024-13-01' has a value that is no YAML"),
        (["training.wokers=1"], "a.yaml, training: unknown option 'wokers'; did you mean 'workers'?"),
        (["training.workers=0", "corda.damping=-1"], "a.yaml: corda.damping is -1.0 and alpha None"),
        (["training.workers=0", "context.limit=0"], "a.yaml: context.limit is 0; expected at least 1 or null."),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            read_config(path, Recipe, overrides)
        assert sentence in str(caught.value)


def test_overrides_leave_what_they_are_put_over() -> None:
    values = {"training": {"steps": 1}}
    assert overridden(values, ["training.steps=2", "corda.rank=3"], "a.yaml") == {"training": {"steps": 2}, "corda": {"rank": 3}}
    assert values == {"training": {"steps": 1}}


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, sentence in ((tmp_path, "is a folder"), (tmp_path / "binary.yaml", "is no text in UTF-8")):
        with pytest.raises((ValueError, OSError), match=sentence):
            read_config(path, Recipe)
