"""What a recipe's ``context`` stands for: keep files, samples of data, and samples that the base makes itself."""

import hashlib
import logging
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn

from corda_core.layers import from_first_process, process_rank
from corda_core.store import ATTACHMENT
from corda_vlm.context import Sources, collator_for, image_reader, is_keep_file
from corda_vlm.data.items import Items, load_items
from corda_vlm.data.lengths import within_length
from corda_vlm.data.samples import Collator
from corda_vlm.data.sources import DataConfig
from corda_vlm.selfwritten import SelfWritten, read_self_context, self_context
from corda_vlm.towers import has_two_towers
from corda_vlm.training.recipe import SELF, Recipe

logger = logging.getLogger(__name__)

SELF_WRITTEN = "context.jsonl"
"""The file of a run's output with what the base made for its context."""


class Joined(Sequence[Any]):
    """Samples of several sources, one behind the other."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        """Take each source's samples."""
        self.parts, self.ends = parts, [*accumulate(map(len, parts))]

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """Return the sample at a place, or the samples of a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        number = next(number for number, end in enumerate(self.ends) if place < end)
        return self.parts[number][place - self.ends[number]]

    def fingerprint(self) -> str:
        """Return a SHA-256 over the sources' fingerprints."""
        return hashlib.sha256("".join(part.fingerprint() for part in self.parts).encode()).hexdigest()  # type: ignore[attr-defined]


def reads_data(recipe: Recipe) -> bool:
    """Return whether what a context holds may depend on the samples that are trained on."""
    return recipe.context is None or SELF in recipe.context_names


def read_context(
    recipe: Recipe, model: nn.Module, processor: Any, data: Items | None, output: Path, *, file: Path | None = None
) -> Sources:
    """Return what the recipe's context holds: ``files`` need no sample, and ``samples`` (None with files only) may be kept by a loss too.

    Args:
        recipe: The recipe.
        model: The untouched base, which writes what ``context: self`` stands for.
        processor: The model's.
        data: The samples that are trained on: what a recipe without a context takes; None where it does not matter (``reads_data``).
        output: The run's folder, where a context that the base made is kept.
        file: Where to write it anew instead; None writes it into ``output``, or reads it there where the run has begun.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a source is broken, empty or of an unknown kind.
    """
    context = recipe.context
    if context is None or isinstance(context, DataConfig):
        return Sources((), data if context is None else items_of(context, recipe, model, processor))
    named = recipe.context_names
    parts = [
        self_written(recipe, model, processor, data, output, file) if name == SELF else items_of(DataConfig(name), recipe, model, processor)
        for name in named
        if not is_keep_file(name)
    ]
    files = tuple(Path(name) for name in named if is_keep_file(name))
    return Sources(files, None if not parts else parts[0] if len(parts) == 1 else Joined(parts))


def items_of(data: DataConfig, recipe: Recipe, model: nn.Module, processor: Any) -> Items:
    """Return the samples of a source, as this model needs them, and no longer than it or the recipe takes them (``within_length``).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the source is broken, empty or of an unknown kind, or has samples that are too long.
    """
    items = load_items(data, download=recipe.model.download, needs_images=has_two_towers(model), accepts=image_reader(processor))
    collate, options = collator_for(model, processor), recipe.training
    if isinstance(collate, Collator):
        return within_length(items, collate, options.max_length, options.on_long)
    if options.max_length is not None:
        raise ValueError(
            "training.max_length is for language models; pairs of images and captions are cut by their processor: leave it out."
        )
    return items


def self_written(
    recipe: Recipe, model: nn.Module, processor: Any, data: Items | None, output: Path, file: Path | None = None
) -> SelfWritten:
    """Return what the base makes itself, as many samples as are drawn of a context; from the output where that run has begun.

    Arguments are those of ``read_context``.

    Raises:
        FileNotFoundError: If the run has begun, and what it began with is gone.
        ValueError: If what it began with is damaged or not what the recipe asks for, or the base cannot make samples.
    """
    path = file or output / SELF_WRITTEN
    count, seed = recipe.corda.num_samples * recipe.corda.num_candidates, recipe.corda.seed
    if file is None and from_first_process((output / ATTACHMENT).exists()):
        written = read_self_context(path, () if data is None else data)
        held = written.options["count"], written.options["seed"]
        if held != (count, seed):
            raise ValueError(
                f"{path} was made with count {held[0]} and seed {held[1]}, but the recipe asks for {count} and {seed}; put it back as it "
                "was, or name another output to begin anew."
            )
        return written
    written = self_context(model, processor, data, count=count, seed=seed)
    if process_rank() == 0:
        written.save(path)
    logger.info("The base made %d samples of context: %s", len(written), path)
    return written
