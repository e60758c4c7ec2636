"""A damaged file is read as if it were whole, or refused with a sentence that names it: never another result, a traceback or a hang."""

import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from drill.conftest import Drill
from drill.damage import spoil
from drill.kills import LONGEST
from drill.place import Place
from drill.targets import TARGETS, Refused, Target
from drill.watch import HangError, alarm, unclear

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SENTENCES = (Refused, ValueError, OSError, FloatingPointError)
"""What the command line turns into a sentence."""
WORD = re.compile(r"[\w./-]{5,}")
PARTS = sum(target.share for target in TARGETS)


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_damage_is_told_or_does_none(target: Target, place: Place, drill: Drill, tmp_path: Path) -> None:
    whole, other = place.folder / target.folder, place.folder / f"other-{target.folder}"
    files = sorted(file.relative_to(whole) for file in whole.glob(target.files) if file.is_file())
    expected = target.read(place, _copy(whole, tmp_path / "expected", whole.name))
    others = _value(target, place, _copy(other, tmp_path / "other", whole.name))
    faults = []
    for trial in range(max(1, round(drill.amounts["damage"] * target.share / PARTS))):
        rng = Random(f"{drill.seed} {target.name} {trial}")
        file = rng.choice(files)
        folder = _copy(whole, tmp_path / str(trial), whole.name)
        way = spoil(folder / file, (other / file).read_bytes(), rng)
        result = _value(target, place, folder)
        outcome, problem = _outcome(target, folder / file, result, expected)
        if outcome == "wrong" and way == "exchanged" and result == others:  # all that is read is of the other
            outcome, problem = "legal", ""
        drill.count(f"damaged files, {target.name}", outcome)
        faults += [f"{trial}: {file}: {way}: {problem}"] if problem else []
        shutil.rmtree(tmp_path / str(trial))
    assert not faults, "\n".join(faults)


def _copy(whole: Path, parent: Path, name: str) -> Path:
    return Path(shutil.copytree(whole, parent / name))


def _value(target: Target, place: Place, folder: Path) -> Any:
    """Return what is read, or the error."""
    try:
        with alarm():
            return target.read(place, folder)
    except (Exception, HangError) as error:
        return error


def _outcome(target: Target, file: Path, result: Any, expected: Any) -> tuple[str, str]:
    """Return in a word what reading came to, and in words what is wrong with that, if anything."""
    if isinstance(result, HangError):
        return "hang", f"not read within {LONGEST:.0f} s"
    if isinstance(result, SENTENCES):
        problem = unclear(str(result).strip(), _names(file, target))
        return ("unclear", problem) if problem else ("refused", "")
    if isinstance(result, BaseException):
        return "traceback", f"{type(result).__name__}: {str(result)[:300]}"
    if result == expected:
        return "same", ""
    return ("wrong", "another result, without a word") if target.ours else ("legal", "")


def _names(file: Path, target: Target) -> set[str]:
    """Return words that a sentence about a file must have one of: its name, its folder's; or, where users write it, what stands there."""
    names = {file.name, f"/{file.parent.name}"}
    if target.ours:
        return names
    written = set() if not file.is_file() else set(WORD.findall(file.read_text(errors="ignore")))
    # «The chat template», and a study's setting, whose runs are in a folder of its name.
    return names | written | {file.stem.replace("_", " "), f"{file.parent.name}:"}
