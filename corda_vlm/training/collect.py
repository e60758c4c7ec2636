"""Keep files: the covariances of a context, without the samples; collected on a base, or added up from others."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corda_core import save_covariances
from corda_core.covariance import together
from corda_core.layers import process_rank
from corda_core.store import Collected, read_covariances, write_covariances
from corda_vlm.context import KEEP_FILE, Sources, is_keep_file
from corda_vlm.data.sources import DataConfig
from corda_vlm.outputs import processes
from corda_vlm.prepare import collect_context, collection_options
from corda_vlm.towers import select_layers
from corda_vlm.training.contexts import items_of, read_context, reads_data
from corda_vlm.training.models import load_base, network_only_if
from corda_vlm.training.recipe import SELF, Recipe
from corda_vlm.yaml import from_mapping, overridden, read_yaml

NO_DATA = "none"
"""Stands in a recipe of options alone where no samples to train on are named."""


def collection_recipe(config: Path | None, model: str | None, data: str | None, overrides: Sequence[str], output: Path) -> Recipe:
    """Return the recipe whose context is collected: that of a file, or one of options alone.

    Args:
        config: The file.
        model: ``model.path``, instead of the file's.
        data: Instead of the file's context: a source of samples, or what else ``context`` takes, lists and options in brackets.
        overrides: ``key.key=value``.
        output: The keep file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an option is unknown, missing or has an impossible value.
    """
    source = "collect" if config is None else str(config)
    values = {} if config is None else read_yaml(config)
    if not isinstance(values, dict):
        raise ValueError(f"{config} holds a {type(values).__name__}; expected option: value lines.")
    if model is not None:
        options = values.get("model")
        values["model"] = {**(options if isinstance(options, dict) else {}), "path": model}
    if data is not None:
        values["context"] = data if data == SELF or is_keep_file(data) else {"source": data}
        if data.startswith(("[", "{")):
            overrides = [f"context={data}", *overrides]
    values = overridden(values, overrides, source)
    if not values.get("model") or not (values.get("context") or values.get("data")):
        raise ValueError("There is no base, or nothing to collect; give --model and --data, or a recipe as --config.")
    return from_mapping({"data": {"source": NO_DATA}, "output": str(output.parent), **values}, Recipe, source)


def collect_file(recipe: Recipe, path: Path, *, half: bool = False) -> str:
    """Write the covariances of a recipe's context as a keep file, and return a sentence that says what it holds.

    Under ``accelerate launch`` the samples are shared out. What the base made itself is written beside it, ``<name>.jsonl``.

    Args:
        recipe: Which base, context, layers and tokens, and how long samples may be (``training.max_length``); its other options do not
            matter.
        path: The file.
        half: Whether to write 16 bits a value instead of 32.

    Raises:
        FileNotFoundError: If there is no such base or data.
        ValueError: If an option, a sample, a file or the model is not right.
    """
    _check_name(path)
    corda = recipe.corda
    with network_only_if(recipe.model.download):
        device = processes().device
        model, processor = load_base(recipe.model)
        if recipe.model.quantize is None:  # else it is there already
            model.to(device)
        has_data = reads_data(recipe) and recipe.data.source != NO_DATA
        data = items_of(recipe.data, recipe, model, processor) if has_data else None
        sources = read_context(recipe, model, processor, data, path.parent, file=path.with_name(f"{path.name}.jsonl"))
        covariances = collect_context(model, sources, corda, processor)
    selected = select_layers(model, parts=corda.parts, targets=corda.targets, exclude=corda.exclude)
    if process_rank() == 0:
        save_covariances(
            covariances,
            path,
            model=model,
            data=_fingerprint(sources),
            options=collection_options(corda),
            unreached=[name for name in selected if name not in covariances],
            about={"model": Path(recipe.model.path).name, "context": _names(recipe), "num_samples": corda.num_samples, "seed": corda.seed},
            half=half,
        )
    return _sentence(covariances, path)


def add_files(paths: Sequence[Path], output: Path, *, half: bool = False) -> str:
    """Write the keep file of what several were made of, taken together, and return a sentence that says what it holds.

    A layer is taken if it is in all of them; where the samples of one did not reach it, that is as good as none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is damaged, or two are of other bases or options, or have no layer in common; the text says which.
    """
    _check_name(output)
    if len(paths) < 2:
        raise ValueError(f"--add takes at least two keep files; {len(paths)} given.")
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} was given twice, and would count double; leave it out once.")
    files = {path: read_covariances(path) for path in paths}
    first = files[paths[0]]
    for path, file in files.items():
        _check_same(paths[0], first, path, file)
    known = set.intersection(*(set(file.known) for file in files.values()))
    names = [name for name in first.weights if name in known and any(name in file.places for file in files.values())]
    if not names:
        raise ValueError(f"{' and '.join(map(str, paths))} have no layer in common; collect them anew with the same parts and targets.")
    total = together([file.covariances(names) for file in files.values()])
    write_covariances(
        {name: total[name] for name in names},
        output,
        weights={name: first.weights[name] for name in sorted(known)},
        data=hashlib.sha256("".join(file.data_digest for file in files.values()).encode()).hexdigest(),
        options=first.options,
        about={"sum_of": [{"file": path.name, "data_digest": file.data_digest, "about": file.about} for path, file in files.items()]},
        half=half,
    )
    left_out = len(set.union(*(set(file.known) for file in files.values())) - known)
    return _sentence(total, output) + (f" {left_out} layers that are not in all of them are left out." if left_out else "")


def _check_same(first_path: Path, first: Collected, path: Path, file: Collected) -> None:
    """Refuse to add what is of another base, or was collected in another way."""
    if not file.weights:
        raise ValueError(f"{path} was written by an earlier version, which did not record each layer's weights; collect it anew.")
    if file.options != first.options:
        raise ValueError(
            f"{path} was collected with the options {dict(file.options)}, {first_path} with {dict(first.options)}; collect one anew."
        )
    other = next((name for name, digest in file.weights.items() if first.weights.get(name, digest) != digest), None)
    if other is not None:
        raise ValueError(f"{path} is of another base than {first_path}: {other} has other weights; add files of one base only.")


def _check_name(path: Path) -> None:
    if path.suffix != KEEP_FILE:
        raise ValueError(f"--output is {path}; a keep file's name ends in {KEEP_FILE}.")


def _fingerprint(sources: Sources) -> str:
    """Return a digest of what a context was made of."""
    samples: Any = sources.samples
    parts = [read_covariances(path).data_digest for path in sources.files] + ([] if samples is None else [samples.fingerprint()])
    return str(parts[0]) if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _names(recipe: Recipe) -> list[str]:
    """Return what the context's sources are called, without the folders of this machine."""
    context = recipe.data if recipe.context is None else recipe.context
    return [Path(name).name for name in ([context.source] if isinstance(context, DataConfig) else recipe.context_names)]


def _sentence(covariances: Any, path: Path) -> str:
    tokens = max(covariance.num_tokens for covariance in covariances.values())
    size = f", {path.stat().st_size / 1e6:,.1f} MB" if path.exists() else ""
    return f"Covariances of {len(covariances)} layers over {tokens:,} tokens{size}: {path}."
