"""How the house is built: which package may use which, and how large its pieces may be."""

import ast
import io
import tokenize
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

import corda_core

ROOT = Path(__file__).parents[1]
PACKAGES = {"corda_core": "corda_core", "corda_vlm": "corda_vlm", "corda_eval": "eval"}
"""Package -> folder, from the lowest to the highest: each may use those before it."""
FUNCTION_TYPES = (ast.FunctionDef, ast.AsyncFunctionDef)
MOST_LINES, MOST_ARGUMENTS = 40, 10
MOST_OPTIONS = 12
"""Of a command: what its help shows on one screen."""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / PACKAGES[package]).rglob("*.py"))


def module_name(package: str, path: Path) -> str:
    parts = [package, *path.relative_to(ROOT / PACKAGES[package]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Yield what a file imports, also within functions: modules, and names with their module before them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_lines(path: Path) -> int:
    """Return how many lines hold code: no blank ones, comments or docstrings."""
    text = path.read_text()
    blocks = (node.body for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTION_TYPES)))
    docstrings = [statement for block in blocks for statement in block if is_docstring(statement)]
    strings = {line for node in docstrings for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = (token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in empty)
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - strings)


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the place of each function, the lines of its body behind the docstring, and by how much it has too many arguments.

    Not counted is self; of a command its arguments are the options of the command line.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, FUNCTION_TYPES):
            body = node.body[1:] if is_docstring(node.body[0]) else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            is_command = any("command(" in ast.unparse(decorator) for decorator in node.decorator_list)
            count = len([name for name in names if name not in ("self", "cls")])
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", lines, count - (MOST_OPTIONS if is_command else MOST_ARGUMENTS)


def in_circles(uses: Mapping[str, Set[str]]) -> list[str]:
    """Return what needs itself by way of others, and what needs such."""
    free: set[str] = set()
    while ready := {name for name, others in uses.items() if name not in free and others <= free}:
        free |= ready
    return sorted(uses.keys() - free)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_uses_only_those_below_it(package: str) -> None:
    above = list(PACKAGES)[list(PACKAGES).index(package) + 1 :]
    wrong = [(str(path), name) for path in sources(package) for name in imports(path) if name.partition(".")[0] in above]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_files_need_each_other(package: str) -> None:
    files = {module_name(package, path): path for path in sources(package)}
    uses = {
        name: {other if other in files else other.rpartition(".")[0] for other in imports(path)} & files.keys()
        for name, path in files.items()
    }
    assert in_circles(uses) == []


def test_no_two_rooms_of_eval_need_each_other() -> None:
    uses: dict[str, set[str]] = {}
    for path in sources("corda_eval"):
        room = path.relative_to(ROOT / "eval").with_suffix("").parts[0]
        others = {name.split(".")[1] for name in imports(path) if name.startswith("corda_eval.")}
        uses[room] = uses.get(room, set()) | others - {room}
    assert in_circles(uses) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package: str) -> None:
    measured = [function for path in sources(package) for function in functions(path)]
    assert [place for place, lines, surplus in measured if lines > MOST_LINES or surplus > 0] == []


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest takes files of one name in folders that are no packages for the same module."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py") if not (path.parent / "__init__.py").exists()]
    assert sorted(names) == sorted(set(names))


def test_the_core_is_small() -> None:
    assert len(sources("corda_core")) <= 16
    assert len(corda_core.__all__) <= 30


def main() -> None:
    """Print the size of each package."""
    for package in PACKAGES:
        files = sources(package)
        code, raw = sum(map(code_lines, files)), sum(len(path.read_text().splitlines()) for path in files)
        print(f"{package}: {len(files)} files, {code:,} lines of code, {raw:,} in all")


if __name__ == "__main__":
    main()
