"""A bad option ends in one sentence that names it, or is a legal value and works: never a traceback, never without a word."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from corda_eval.demo.demo import DemoConfig
from corda_eval.suite.tasks import read_suite
from corda_vlm.yaml import read_config
from drill.conftest import Drill
from drill.kills import LONGEST
from drill.options import DEMO, ENDLESS, FLAGS, OVERRIDES, RECIPE, STUDY, SUITE, Option, drawn, fits
from drill.place import ROOT, Place
from drill.targets import Refused, call
from drill.watch import HangError, alarm, unclear

ALSO_CALLED = {"base": ["model.path"], "library": ["model.path"], "adapter": ["corda.safetensors"]}
"""Flags, and what sentences call them."""
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _deep_folder(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes to ../../x stays in the test's own folder."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    shutil.copy(place.recipe, folder)
    monkeypatch.chdir(folder)


def train(place: Place, option: Option, value: Any, rng: Random) -> None:
    values = yaml.safe_load(place.recipe.read_text())
    values["training"] |= {"steps": 2, "save_every": 2, "evaluate_every": None}
    values["output"] = "output"
    arguments = ["--dry-run"] if option.path in ENDLESS and isinstance(value, (int, float)) and value > 1000 else []
    if rng.random() < 0.5:
        arguments.append(f"{option.path}={_as_text(value)}")
    else:
        _put(values, option.path, value)
    _call_with_file("train", values, *arguments)


def evaluate(place: Place, option: Option, value: Any, rng: Random) -> None:
    values = yaml.safe_load((place.folder / "suite" / "suite.yaml").read_text())
    values["tasks"] = values["tasks"][1 if rng.random() < 0.5 else 2 :]
    if option.path.startswith("tasks."):
        values["tasks"][0][option.path.partition(".")[2]] = value
    else:
        values[option.path] = value
    Path("suite.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    if option.path == "tasks.task" and isinstance(value, str):  # lm_eval takes a quarter of a minute to look for a task
        read_suite(Path("suite.yaml"))
        return
    before = set(_files(Path("../../..")))
    options = ["--base", place.base, "--dtype", "float32", "--adapter", str(place.folder / "whole")]
    call("eval", *options, "--suite", "suite.yaml", "--output", "output")
    outside = [file for file in set(_files(Path("../../.."))) - before if not file.startswith("../../../a/b/c/output/")]
    assert not outside, f"it wrote {outside}, outside of its output"


def compare(place: Place, option: Option, value: Any, rng: Random) -> None:
    values = yaml.safe_load((place.folder / "study" / "study.yaml").read_text())
    arguments = []
    if rng.random() < 0.5:
        arguments.append(f"{option.path}={_as_text(value)}")
    else:
        values[option.path] = value
    _call_with_file("compare", values, "--only-report", "--output", "output", *arguments)


def demo(place: Place, option: Option, value: Any, rng: Random) -> None:
    """Only read it: the demo takes minutes."""
    values = yaml.safe_load((ROOT / "configs" / "demo_quick.yaml").read_text()) | {option.path: value}
    Path("demo.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    read_config(Path("demo.yaml"), DemoConfig)


KINDS = {"recipe": (train, RECIPE, 0.5), "suite": (evaluate, SUITE, 0.15), "study": (compare, STUDY, 0.1), "demo": (demo, DEMO, 0.05)}
"""What reads the options, which there are, and their share."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_value_is_refused_or_works(kind: str, place: Place, drill: Drill) -> None:
    read, choices, share = KINDS[kind]
    faults = []
    for trial in range(round(share * drill.amounts["options"])):
        rng = Random(f"{drill.seed} {kind} {trial}")
        option, value = drawn(rng, choices)
        is_legal = fits(value, option.declared)
        outcome, problem = _outcome(lambda: read(place, option, value, rng), [""] if is_legal else _names(option.path, value))  # noqa: B023
        if outcome == "works" and not is_legal:
            outcome, problem = "taken", f"taken without a word, though declared as {option.declared}"
        drill.count(f"bad options, {kind}", outcome)
        faults += [f"{trial}: {option.path}: {value!r:.80}: {problem}"] if problem else []
        for folder in Path().glob("*/"):
            shutil.rmtree(folder)
    assert not faults, "\n".join(faults)


def test_a_broken_override_is_refused(place: Place, drill: Drill) -> None:
    faults = []
    rng = Random(f"{drill.seed} overrides")
    for override in rng.sample(OVERRIDES, min(len(OVERRIDES), round(0.1 * drill.amounts["options"]))):
        outcome, problem = _outcome(lambda: call("train", "--config", "recipe.yaml", "output=output", override), _names(override, override))  # noqa: B023
        drill.count("bad options, overrides", outcome)
        faults += [f"{override!r}: {problem or 'taken without a word'}"] if problem or outcome == "works" else []
    assert not faults, "\n".join(faults)


def test_a_bad_flag_is_refused_or_works(place: Place, drill: Drill) -> None:
    faults = []
    rng = Random(f"{drill.seed} flags")
    every = [(command, flag, value) for (command, flag), values in FLAGS.items() for value in values]
    for command, flag, value in rng.sample(every, min(len(every), round(0.2 * drill.amounts["options"]))):
        given = _usual(place, command) | {flag: value}
        arguments = [part for pair in given.items() for part in pair]
        outcome, problem = _outcome(lambda: call(command, *arguments), _names(flag.strip("-"), value))  # noqa: B023
        drill.count("bad options, flags", outcome)
        faults += [f"{command} {flag} {value!r:.80}: {problem}"] if problem else []
        shutil.rmtree("output", ignore_errors=True)
    assert not faults, "\n".join(faults)


def _usual(place: Place, command: str) -> dict[str, str]:
    """Return flags with which a command works."""
    suite, adapter = str(place.folder / "suite" / "suite.yaml"), str(place.folder / "whole")
    return {
        "export": {"--adapter": adapter, "--output": "output", "--base": place.base, "--dtype": "float32"},
        "eval": {"--adapter": adapter, "--output": "output", "--base": place.base, "--dtype": "float32", "--suite": suite},
        "train": {"--config": str(place.recipe)},
        "prepare": {"--config": str(place.recipe)},
        "compare": {"--config": str(place.folder / "study" / "study.yaml"), "--output": "output"},
        "demo": {"--output": "output"},
    }[command]


def _outcome(work: Callable[[], Any], names: list[str]) -> tuple[str, str]:
    """Return in a word what an option came to, and in words what is wrong with that, if anything."""
    try:
        with alarm():
            work()
    except HangError:
        return "hang", f"not done within {LONGEST:.0f} s"
    except (Refused, ValueError, OSError, FloatingPointError) as error:
        problem = unclear(str(error).strip(), names)
        return ("unclear", problem) if problem else ("refused", "")
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:300]}"
    return "works", ""


def _names(option: str, value: Any) -> list[str]:
    """Return words of which a sentence has one: of the option, also where one of several is spoken of, or the value."""
    words = [word.removesuffix("s") for word in [*re.split(r"[.=]", option), *ALSO_CALLED.get(option, [])] if word]
    return [*words, str(value) or ". is a folder", repr(value), "unknown option"]


def _call_with_file(command: str, values: Any, *arguments: str) -> None:
    Path("options.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    call(command, "--config", "options.yaml", *arguments)


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def _as_text(value: Any) -> str:
    """Return a value as it is written behind an override's sign of equality."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}[str(value)]
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _files(folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file()]
