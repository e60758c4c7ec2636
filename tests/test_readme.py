"""The README's commands and code are real, the READMEs' links lead somewhere, and the tables of options are what the options are.

    python tests/test_readme.py

writes these tables anew.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from corda_vlm import CordaConfig, KeepOptions
from corda_vlm.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "README.md"
README = PAGE.read_text()
READMES = sorted(path for folder in ("corda_core", "corda_vlm", "configs", "eval", "tests") for path in (ROOT / folder).rglob("README.md"))
SET_UP = "python3 -m venv"
"""How the two lines begin that set up and run all, to be copied whole."""
OPTIONS = {CordaConfig: "options", KeepOptions: "options of keep"}
"""Dataclasses whose fields are documented for users in a table, and what marks it in its page."""


def test_two_set_up_commands_of_one_line_each() -> None:
    commands = [line for line in README.splitlines() if line.startswith(SET_UP)]
    assert len(commands) == 2
    assert commands[0].endswith(" && corda-vlm demo")
    assert commands[1].endswith(" && pytest -n 2")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert "grep -m 1 -E '^python3 -m venv .*pytest' README.md" in ci
    assert ".venv/bin/pytest -n 2 -m slow\n" in ci  # what that command leaves out


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 8192
    assert not [line for line in README.splitlines() if len(line) > 140]


@pytest.mark.parametrize("path", READMES, ids=str)
def test_prose_fits_a_screen(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert not [line for line in lines if len(line) > 140 and not line.startswith("|")]


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_the_example_runs(processor: Any, samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python example of the README, word for word, on a tiny LLaVA saved where it looks for its model."""
    from conftest import tiny_llava

    code = next(block for block in python_blocks(PAGE) if "prepare(" in block)
    monkeypatch.chdir(tmp_path)
    tiny_llava().save_pretrained(tmp_path / "my-llava")
    processor.save_pretrained(tmp_path / "my-llava")
    names: dict[str, Any] = {"kept_samples": samples, "training_samples": samples}
    exec(compile(code.replace("steps=200", "steps=2").replace("rank=32", "rank=4"), "README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_the_example_for_text_models_runs(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import tiny_llama

    alone, several, kept = python_blocks(ROOT / "corda_core/README.md")
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    names: dict[str, Any] = {"kept_texts": ["what color is this shape ?" * 10, "a red circle in blue" * 10]}
    exec(compile(alone.replace("rank=32", "rank=4"), "corda_core/README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    names |= {"model": tiny_llama(), "several_contexts": [names["batches"], names["batches"][:1]]}
    few = several.replace("rank=32", "rank=4").replace("names], 32)", "names], 4)")
    exec(compile(few, "corda_core/README.md", "exec"), names)
    assert 0.9 * names["budget"] < names["adapter"].num_parameters <= names["budget"]
    names["covariances_of_today"] = names["covariances"]
    exec(compile(kept, "corda_core/README.md", "exec"), names)
    assert names["covariances"].keys() == names["covariances_of_today"].keys()


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_the_example_for_open_clip_runs(samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip")
    folder = f"local-dir:{ROOT / 'eval/lab/weights/clip'}"
    code = next(block for block in python_blocks(ROOT / "corda_vlm/README.md") if "open_clip" in block)
    code = code.replace('"ViT-B-32", pretrained="my-clip.safetensors"', f'"{folder}"').replace('"ViT-B-32"', f'"{folder}"')
    pairs = [(sample["image"], f"a {sample['answer']} square {number}") for number, sample in enumerate(samples)]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"kept_pairs": pairs, "new_pairs": pairs}
    exec(compile(code.replace("steps=200", "steps=2").replace("batch_size=64", "batch_size=4"), "corda_vlm/README.md", "exec"), names)
    assert load_file(tmp_path / "tuned.safetensors").keys() == load_file(ROOT / "eval/lab/weights/clip/open_clip_model.safetensors").keys()


@pytest.mark.parametrize("path", [PAGE, ROOT / "corda_vlm/README.md"], ids=str)
def test_the_recipe_is_one(path: Path, tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```yaml\n(.*?)```", path.read_text(), re.S)
    (tmp_path / "first.yaml").write_text(recipe)
    assert read_recipe(tmp_path / "first.yaml").output == "runs/first"


def test_the_new_benchmark_of_the_recipe_is_scored(tmp_path: Path) -> None:
    from corda_eval.vqa.benchmark import score

    names: dict[str, Any] = {"__name__": "colours"}
    exec(compile(block_of_eval("TASK = "), "eval/README.md", "exec"), names)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "test.json").write_text('[{"question": "Which colour?", "image": "0.png", "answer": "black"}]')
    examples = names["TASK"].load(tmp_path)
    assert score(names["TASK"], examples, ["Black "]).metrics == {"accuracy": 1}


def test_the_new_method_of_the_recipe_adapts(tmp_path: Path) -> None:
    from tiny_study import tiny_task

    names: dict[str, Any] = {"__name__": "frozen_a"}
    exec(compile(block_of_eval("def adapt"), "eval/README.md", "exec"), names)
    adapted = names["FrozenA"](rank=4).adapt(tiny_task(tmp_path))
    trained = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert all("lora_B" in name for name in trained)


@pytest.mark.parametrize("path", [PAGE, *READMES], ids=str)
def test_commands_and_their_flags_exist(path: Path) -> None:
    import typer

    from corda_eval.cli import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"(?:^|`)corda-vlm (\w[^`\n#]*)", path.read_text(), re.M):
        name, *words = line.split()
        assert name in commands, line
        known = {flag for parameter in commands[name].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("path", [PAGE, *READMES], ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    broken = [link for link in links(path.read_text()) if not leads_somewhere(link, path)]
    assert not broken


@pytest.mark.parametrize("path", [PAGE, *READMES], ids=str)
def test_names_of_modules_functions_and_files_exist(path: Path) -> None:
    text = path.read_text()
    modules = {name for name in re.findall(r"-m (corda_\w+(?:\.[a-z_]+)+)", text) if not is_program(name)}
    assert not modules
    assert not [name for name in set(re.findall(r"\bcorda_(?:core|vlm|eval)(?:\.\w+)+", text)) if not exists(name)]
    files = {name for name in re.findall(r"^\|.*", text, re.M) for name in re.findall(r"`(\w+\.(?:py|yaml|png|json|jsonl))`", name)}
    assert not [name for name in files if not (path.parent / name).exists()]


@pytest.mark.parametrize("folder", ["corda_core", "corda_vlm", "configs", "eval", "eval/results"])
def test_each_folder_names_what_it_holds(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text()
    names = {path.name for path in (ROOT / folder).iterdir() if path.suffix in ("", ".py", ".yaml", ".json", ".jsonl", ".png")}
    assert not {name for name in names - {"__init__.py", "__pycache__"} if name not in text}


def test_the_files_of_the_core_stand_in_the_order_in_which_they_are_read() -> None:
    table = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "corda_core/README.md").read_text(), re.M)
    assert sorted(table) == sorted(path.stem for path in (ROOT / "corda_core").glob("*.py") if path.stem != "__init__")
    for place, name in enumerate(table):
        used = re.findall(r"^from corda_core(?:\.(\w+))? import (\w+)", (ROOT / f"corda_core/{name}.py").read_text(), re.M)
        assert {module or first for module, first in used} <= set(table[:place]), name


@pytest.mark.parametrize("schema", OPTIONS, ids=lambda schema: schema.__name__)
def test_the_tables_of_options_are_made_from_their_fields(schema: type) -> None:
    written = place_of(schema).search((ROOT / "corda_vlm/README.md").read_text())
    expected = options_table(schema)
    assert written is not None
    assert written[0] == expected, f"python tests/test_readme.py writes it:\n{expected}"


def is_program(name: str) -> bool:
    """Return whether ``python -m name`` runs something."""
    spec = find_spec(name)
    return spec is not None and (spec.submodule_search_locations is None or find_spec(f"{name}.__main__") is not None)


def exists(name: str) -> bool:
    """Return whether there is such a module, or such a name in one."""
    module, _, last = name.rpartition(".")
    with suppress(ModuleNotFoundError):  # where what stands before the last name is no package
        return find_spec(name) is not None or hasattr(import_module(module), last)
    return hasattr(import_module(module), last)


def python_blocks(page: Path) -> list[str]:
    """Return a page's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def block_of_eval(mark: str) -> str:
    """Return the block of Python in eval's README that has this in it."""
    return next(block for block in python_blocks(ROOT / "eval/README.md") if mark in block)


def without_code(text: str) -> str:
    """Return Markdown without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def links(text: str) -> Iterator[str]:
    """Yield where links and pictures lead, but for addresses on the network."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if not target.startswith(("http:", "https:")):
            yield target


def leads_somewhere(link: str, page: Path) -> bool:
    """Return whether the file is there, and has the heading."""
    name, _, anchor = link.partition("#")
    path = page.parent / name if name else page
    return path.exists() and (not anchor or anchor in anchors(path.read_text()))


def anchors(text: str) -> set[str]:
    """Return what GitHub calls a page's headings: lower case, without punctuation, joined by hyphens."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def place_of(schema: type) -> re.Pattern[str]:
    """Return what finds a table of options in its page."""
    name = re.escape(OPTIONS[schema])
    return re.compile(rf"(?<=<!-- {name}: written by `python tests/test_readme.py` -->\n).*?(?=<!-- end of {name} -->)", re.S)


def options_table(schema: type) -> str:
    """Return options for users: what is written at each field of a dataclass."""
    tree = ast.parse(Path(inspect.getfile(schema)).read_text())
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == schema.__name__)
    meanings = {
        field.target.id: ast.literal_eval(below.value)
        for field, below in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr)
    }
    rows = [f"| `{field.name}` | `{shown(field)}` | {in_markdown(meanings[field.name])} |" for field in dataclasses.fields(schema)]
    return "\n".join(["| option | default | what it does |", "|---|---|---|", *rows, ""])


def shown(field: "dataclasses.Field[Any]") -> str:
    """Return a field's default as one would write it."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f'"{default}"' if isinstance(default, str) else str(default)


def in_markdown(docstring: str) -> str:
    """Return a docstring as one cell of a table."""
    return " ".join(docstring.split()).replace("``", "`").replace("|", "\\|")


def write_options() -> None:
    """Put the tables of options into their page."""
    page = ROOT / "corda_vlm/README.md"
    for schema in OPTIONS:
        page.write_text(place_of(schema).sub(lambda _, schema=schema: options_table(schema), page.read_text()))


if __name__ == "__main__":
    write_options()
