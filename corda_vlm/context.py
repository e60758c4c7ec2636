"""From samples to batches of model inputs: what is drawn, what each process reads, and what the model is called with."""

import copy
import inspect
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import AutoProcessor, AutoTokenizer

from corda_core.layers import num_processes, process_rank
from corda_core.linears import expert_of
from corda_vlm.config import CordaConfig
from corda_vlm.data.limits import limits_of, num_positions
from corda_vlm.data.pairs import PairCollator, TransformersImages, TransformersPairs
from corda_vlm.data.rows import Numbered
from corda_vlm.data.samples import Collator, has_image
from corda_vlm.towers import has_two_towers, image_dtype, is_open_clip, is_text_only, is_vision_only

NUM_LOOKED_AT = 64
"""How many samples are looked at for one with an image."""


def progress_bar(steps: Iterable[Any], title: str) -> Iterable[Any]:
    """Show progress with the time left on a terminal, in the first process only."""
    return tqdm(steps, desc=title, disable=None if process_rank() == 0 else True)


KEEP_FILE = ".safetensors"
"""How the name of a keep file ends: covariances, as ``corda-vlm collect`` writes them."""


@dataclass(frozen=True)
class Sources:
    """One context as it was given: keep files, and samples or batches; together they count as if all had been collected at once."""

    files: tuple[Path, ...]
    samples: Iterable[Any] | None
    """None where there are files only."""


def is_keep_file(item: Any) -> bool:
    """Return whether this names a keep file."""
    return isinstance(item, (str, os.PathLike)) and os.fspath(item).endswith(KEEP_FILE)


def sources_of(images_texts: Any) -> Sources:
    """Return a context as its keep files and its samples: a file by itself, or some in a list, perhaps among samples.

    Raises:
        ValueError: If a name is none of a keep file.
    """
    if isinstance(images_texts, Sources):
        return images_texts
    items = images_texts if isinstance(images_texts, (list, tuple)) else [images_texts]
    other = next((item for item in items if isinstance(item, (str, os.PathLike)) and not is_keep_file(item)), None)
    if other is not None:
        raise ValueError(f"images_texts names {os.fspath(other)!r}; expected samples, or keep files, whose names end in {KEEP_FILE}.")
    files = tuple(Path(item).expanduser() for item in items if is_keep_file(item))
    if not files:
        return Sources((), images_texts)
    return Sources(files, [item for item in items if not is_keep_file(item)] or None)


@dataclass(frozen=True)
class Context:
    """One context of samples, ready for the model."""

    batches: Iterable[dict[str, Any]]
    """This process's batches as inputs of the model; an iterator only if the source is one."""
    example: dict[str, Any]
    """Inputs of one sample, or of one batch where batches were given: what the layers to adapt are probed with."""


@dataclass(frozen=True)
class _Batches:
    """Inputs of the model, made anew at each iteration, with a progress bar."""

    source: Iterable[Any]
    inputs_of: Callable[[Any], dict[str, Any]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Go over the batches."""
        return map(self.inputs_of, progress_bar(self.source, "context"))


def context_batches(model: nn.Module, images_texts: Iterable[Any], names: Sequence[str], config: CordaConfig, processor: Any) -> Context:
    """Return what this process reads of the context.

    Raises:
        ValueError: If the context is empty, there are fewer samples than processes, or no processor is known.
    """
    chosen, are_batches = _draw(images_texts, config.num_samples, config.seed)
    inputs_of = partial(model_inputs, model, not _reads_output(model, names))
    if are_batches:
        if isinstance(chosen, Iterator):
            first = next(chosen)
            return Context(iter(_Batches(chain([first], chosen), inputs_of)), inputs_of(first))
        # The one with most keys: one with images, if there are any.
        return Context(_Batches(chosen, inputs_of), inputs_of(max(islice(chosen, 8), key=len)))
    collate = collator_for(model, processor or own_processor(model))
    # Samples are read when their batch comes: a dataset decodes its images only then.
    groups = share_out(len(chosen), config.batch_size)
    looked_at = range(0, len(chosen), max(1, len(chosen) // NUM_LOOKED_AT))  # all over: perhaps texts stand first
    with_image = next((i for i in looked_at if has_image(chosen[i])), 0)
    return Context(_Batches(groups, lambda group: inputs_of(collate([chosen[i] for i in group]))), inputs_of(collate([chosen[with_image]])))


def collator_for(model: nn.Module, processor: Any) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Return what makes batches for this model: of pairs for two towers, else of conversations and text that it can read."""
    if isinstance(processor, PairCollator):
        return processor
    if has_two_towers(model):
        return TransformersPairs(processor, num_positions(model))
    if is_vision_only(model):
        return TransformersImages(processor)
    writes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return Collator(with_sizes_of(model, processor), writes=writes, limits=limits_of(model))


def with_sizes_of(model: Any, processor: Any) -> Any:
    """Return the processor; where it was saved before processors knew their patches, a copy that has them from the model."""
    config: Any = getattr(model, "config", None)
    if getattr(processor, "patch_size", 0) is not None or not hasattr(config, "vision_config"):
        return processor
    known = copy.copy(processor)
    known.patch_size = config.vision_config.patch_size
    known.vision_feature_select_strategy = config.vision_feature_select_strategy
    known.num_additional_image_tokens = int(any(name.endswith("class_embedding") for name, _ in model.named_parameters()))
    return known


def share_out(num_samples: int, batch_size: int) -> list[range]:
    """Return the places of this process's samples in batches; under ``torch.distributed`` each process has as many batches as the others.

    Raises:
        ValueError: If there are fewer samples than processes.
    """
    if num_samples < num_processes():
        raise ValueError(f"There are {num_samples} samples of context for {num_processes()} processes; give at least one for each.")
    places = range(process_rank(), num_samples, num_processes())
    count = min(-(-num_samples // (batch_size * num_processes())), num_samples // num_processes())
    bounds = [number * len(places) // count for number in range(count + 1)]
    return [places[start:end] for start, end in pairwise(bounds)]


def _draw(images_texts: Iterable[Any], count: int, seed: int) -> tuple[Any, bool]:
    """Return what to use as context, and whether it is ready batches (all of them) or samples (``count`` at most)."""
    if isinstance(images_texts, Sequence) or (hasattr(images_texts, "__len__") and hasattr(images_texts, "__getitem__")):
        items = Numbered(images_texts, "images_texts")
        total = len(items)
        if total and not is_batch(items[0]):
            order = range(total) if total <= count else sorted(random.Random(seed).sample(range(total), count))
            return Subset(items, list(order)), False
        if total:
            return items, True
    iterator = iter(images_texts)
    first = next(iterator, None)
    if first is None:
        raise ValueError("images_texts is empty: there is no context to collect; give samples of what the model is to keep (or to learn).")
    if is_batch(first):
        return (chain([first], iterator) if iterator is images_texts else images_texts), True
    return Numbered([first, *islice(iterator, count - 1)], "images_texts"), False


def draw_contexts(images_texts: Any, config: CordaConfig) -> Sequence[Any]:
    """Return the context, or as many disjoint contexts drawn from it as there are candidates.

    Raises:
        ValueError: If there are fewer samples than candidates, or keep files, from which nothing can be drawn.
    """
    count, sources = config.num_candidates, sources_of(images_texts)
    if count == 1:
        return [sources]
    if sources.files:
        raise ValueError(
            f"{sources.files[0]} holds no samples of which {count} candidates could be drawn; set candidates=1, or give keep files as "
            "further_contexts."
        )
    images_texts = sources.samples
    wanted = count * config.num_samples
    sized = hasattr(images_texts, "__len__") and hasattr(images_texts, "__getitem__")
    items = Numbered(images_texts if sized else list(islice(images_texts, wanted)), "images_texts")
    if len(items) < count:
        raise ValueError(f"images_texts has {len(items)} sample(s) for {count} candidates; give more samples, or set candidates=1.")
    drawn = random.Random(config.seed).sample(range(len(items)), min(wanted, len(items) // count * count))
    contexts: list[Any] = [Subset(items, sorted(drawn[number::count])) for number in range(count)]
    return contexts


def is_batch(sample: Any) -> bool:
    """Whether these are inputs of a model: tensors, and no text that is still to be read."""
    values = list(sample.values()) if isinstance(sample, Mapping) else []
    return any(isinstance(value, Tensor) and value.ndim > 1 for value in values) and not any(isinstance(value, str) for value in values)


def own_processor(model: nn.Module) -> Any:
    """Return the processor beside the model's own files; never from the network."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"{type(model).__name__} has no processor of its own; pass processor=corda_vlm.OpenClipPairs(preprocess, tokenizer), or give "
            "ready batches."
        )
    path = getattr(config, "_name_or_path", "")
    reader = AutoTokenizer if is_text_only(model) else AutoProcessor
    try:
        return reader.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No processor was found beside the model ({path or 'no path known'}); pass processor= (or a tokenizer)."
        ) from error


def _reads_output(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether a named layer belongs to the head, which sees no more tokens than logits are asked for."""
    base = getattr(model, "base_model", model)
    if base is model:  # the head is not told apart
        return True
    inside = set(base.modules())
    return any(expert_of(name) is None and model.get_submodule(name) not in inside for name in names)


def model_inputs(model: nn.Module, trim_logits: bool, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch on the model's device, with no cache of keys and values, and with the logits of one position if that will do."""
    device = next(model.parameters()).device
    writes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # its labels are what its decoder reads
    kept = {key: value for key, value in batch.items() if key != "labels" or (writes and "decoder_input_ids" not in batch)}
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in kept.items()}
    if is_open_clip(model):  # which leaves it to the caller to convert images
        inputs["image"] = inputs["image"].to(image_dtype(model))
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known or getattr(model, "can_generate", lambda: False)():
        inputs["use_cache"] = False
    if trim_logits and "logits_to_keep" in known and "input_ids" in inputs and not writes:
        inputs["logits_to_keep"] = torch.tensor([inputs["input_ids"].shape[1] - 1], device=device)
    return inputs


def image_reader(processor: Any) -> Callable[[Any], Any] | None:
    """Return what makes the model's inputs of one image, or None for a tokenizer."""
    if isinstance(processor, PairCollator):
        return lambda image: processor.read([image])
    reader = getattr(processor, "image_processor", processor)
    return (lambda image: reader(images=[image], return_tensors="pt")) if hasattr(reader, "preprocess") else None
