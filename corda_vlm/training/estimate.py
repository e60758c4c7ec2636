"""What a recipe will take: layers, parameters, memory, FLOPs, time. Reads the model's config, never its weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from corda_core import Mode
from corda_core.allocate import budget_of_rank
from corda_core.layers import flops_per_second
from corda_core.linears import check_present, expert_of, weight_shape
from corda_core.store import read_covariances
from corda_vlm.config import CordaConfig
from corda_vlm.context import is_keep_file
from corda_vlm.coverage import Coverage, coverage
from corda_vlm.data.items import load_items
from corda_vlm.data.samples import read_sample
from corda_vlm.data.sources import DataConfig
from corda_vlm.data.tokens import encode
from corda_vlm.selfwritten import MAX_TOKENS
from corda_vlm.towers import family_of, has_two_towers, modules_of, select_layers
from corda_vlm.training.keep import default_batch_size
from corda_vlm.training.memory import Card, Memory, compute_device, memory_of
from corda_vlm.training.models import describe_base, read_processor
from corda_vlm.training.recipe import SELF, KeepConfig, Recipe

TOKENS = 512
"""Tokens of a sample, where none can be read: an image of LLaVA's is 576."""
LOOKED_AT = 16
"""How many samples are read for their length."""


@dataclass(frozen=True)
class Part:
    """The layers of one part of the model that get adapters."""

    num_layers: int
    ranks: tuple[int, int]
    """Smallest and largest; with a budget each layer's own is known only when the spectra are."""
    num_parameters: int
    """Entries of A and B."""


@dataclass(frozen=True)
class Estimate:
    """What a recipe will take; bytes, FLOPs and seconds on this machine."""

    model: str
    num_base: int
    """Parameters of the base."""
    parts: dict[str, Part]
    coverage: Coverage
    """How much of these parts is in layers that get adapters."""
    num_trainable: int
    num_samples: int | None
    """Samples of training data; None if they are not here."""
    num_tokens: int
    """Of a training sample, on average."""
    num_context_tokens: int
    """Of a sample of context, on average."""
    steps: int | None
    memory: Memory
    card: Card
    context_flops: float
    """Forward passes over the context, and the products X Xᵀ; also those in which the base writes it."""
    decomposition_flops: float
    training_flops: float | None
    flops_per_second: float
    """Of matrix products in the precision of the base, measured now."""


def estimate(recipe: Recipe) -> Estimate:
    """Return what a recipe will take.

    Counted are products of matrices: 2 m n FLOPs a token and layer forwards, as many backwards, as the base takes no gradient; attention's
    own products are not. Layers that turn out not to reach the output are counted too. Samples have the mean length of ``LOOKED_AT`` of
    them, or ``TOKENS`` where data or processor are not on this disk.

    Raises:
        FileNotFoundError: If a keep file is not there.
        ModuleNotFoundError: If an extra is needed that is not installed.
        ValueError: If the model is not here, an option does not fit it, or a keep file is damaged.
    """
    model = describe_base(recipe.model)
    corda, training = recipe.corda, recipe.training
    shapes = _shapes(model, corda)
    parts = _parts(model, shapes, recipe)
    budget = corda.total_budget(shapes.values())
    adapters = sum(part.num_parameters for part in parts.values()) if budget is None else budget
    trained = adapters if corda.protection != "strict" else sum(m * min(corda.rank, m, n) for m, n in shapes.values())
    whole = sum(p.numel() for name in modules_of(model, corda.train_fully) for p in model.get_submodule(name).parameters())
    num_base = sum(parameter.numel() for parameter in model.parameters())
    samples, length = _look_at(recipe.data, recipe, model)
    context_length = _context_length(recipe, model, length)
    steps = training.steps or (None if samples is None else int(-(-samples * training.epochs // training.batch_size)))
    passes = 3 if training.gradient_checkpointing else 2
    step_flops: float = training.batch_size * length * (2 * num_base * passes + 6 * adapters)
    if recipe.keep is not None:  # beside its own the base's forward pass
        more = passes + (recipe.keep.kind == "distill")
        step_flops += _kept_tokens(recipe.keep, recipe, model, context_length) * (2 * num_base * more + 6 * adapters)
    covariance_bytes, context_flops, decomposition_flops = _preparation(corda, shapes, context_length, num_base)
    training_bytes = 4 * (adapters * (2 if corda.protection == "start" else 1) + 3 * (trained + whole) + whole)
    lengths = {"tokens": length, "context_tokens": context_length}
    card, memory = Card.here(), memory_of(model, recipe, shapes, covariances=covariance_bytes, training=training_bytes, **lengths)
    return Estimate(
        model=type(model).__name__,
        num_base=num_base,
        parts=parts,
        coverage=coverage(model, list(shapes), corda.parts),
        num_trainable=trained + whole,
        num_samples=samples,
        num_tokens=length,
        num_context_tokens=context_length,
        steps=steps,
        memory=memory if corda.max_bytes is not None else memory.split_for(card),
        card=card,
        context_flops=context_flops + 2 * num_base * _num_written(recipe, model),
        decomposition_flops=decomposition_flops,
        training_flops=None if steps is None else steps * step_flops,
        flops_per_second=flops_per_second(compute_device(), getattr(torch, recipe.model.dtype)),
    )


def _preparation(
    corda: CordaConfig, shapes: Mapping[str, tuple[int, int]], context_length: float, num_base: int
) -> tuple[int, float, float]:
    """Return the bytes of the covariances and the products of collecting and of decomposing; nothing where the start is random."""
    if corda.mode is Mode.LORA:
        return 0, 0.0, 0.0
    # q, k and v read the same; each expert its own tokens, here as many as all.
    inputs = Counter((name if expert_of(name) else name.rpartition(".")[0], n) for name, (_, n) in shapes.items())
    num_bytes = min(sum(4 * n * (n + 1) // 2 for _, n in inputs), corda.max_bytes or 1 << 62)
    tokens = corda.num_samples * corda.num_candidates * context_length
    # The products with C, and the iteration or factorisation: some multiples of them.
    decomposing = sum(2 * m * n * n + 4 * min(m, n) * m * n + 10 * min(m, n) ** 3 for m, n in shapes.values())
    return num_bytes, tokens * (2 * num_base + sum(n * n for _, n in inputs)), decomposing


def _shapes(model: nn.Module, corda: CordaConfig) -> dict[str, tuple[int, int]]:
    """Return the layers that are to be adapted, and their shapes (m, n)."""
    names = select_layers(model, parts=corda.parts, targets=corda.targets, exclude=corda.exclude)
    corda.check_layers(names)
    return {name: weight_shape(model, name) for name in names}


def describe(estimate: Estimate) -> str:
    """Return an estimate as text for a terminal."""
    lines = [f"{estimate.model}, {estimate.num_base / 1e6:,.1f} M parameters"]
    for name, part in estimate.parts.items():
        low, high = part.ranks
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        lines.append(f"  {name}: {part.num_layers} layers, {ranks}, {part.num_parameters:,} parameters of A and B")
    lines += [
        str(estimate.coverage),
        f"trainable: {estimate.num_trainable:,} ({estimate.num_trainable / estimate.num_base:.2%} of the base)",
        *estimate.memory.lines(),
        f"on {estimate.card}: {estimate.memory.verdict(estimate.card)}",
        f"context: {_work(estimate.context_flops, estimate.flops_per_second)}",
        f"decomposition: {_work(estimate.decomposition_flops, estimate.card.double)}",
    ]
    if estimate.steps is None:
        lines.append("training: the data are not here, so the number of steps is not known; training.steps would set it")
    else:
        samples = "" if estimate.num_samples is None else f", {estimate.num_samples:,} samples"
        lines.append(f"training: {estimate.steps:,} steps{samples}, {_work(estimate.training_flops or 0, estimate.flops_per_second)}")
    lines.append(
        f"(times: {estimate.flops_per_second / 1e9:,.0f} GFLOP/s, measured just now for one process; {estimate.num_tokens} tokens a "
        f"sample, {estimate.num_context_tokens} of context)"
    )
    return "\n".join(lines)


def _parts(model: nn.Module, shapes: Mapping[str, tuple[int, int]], recipe: Recipe) -> dict[str, Part]:
    """Return the layers of these shapes by the part of the model that they belong to."""
    family = family_of(model)
    grouped: dict[str, list[tuple[int, int]]] = {}
    for name, shape in shapes.items():
        grouped.setdefault(family.part_of(name) or "model", []).append(shape)
    return {name: _part(members, recipe) for name, members in grouped.items()}


def _part(shapes: Sequence[tuple[int, int]], recipe: Recipe) -> Part:
    ranks = [min(recipe.corda.rank, *shape) for shape in shapes]
    limits = min(ranks), max(ranks)
    if recipe.corda.spreads:
        largest = max(min(shape) for shape in shapes)
        limits = recipe.corda.min_rank, min(largest, recipe.corda.max_rank or largest)
    return Part(len(shapes), limits, budget_of_rank(shapes, recipe.corda.rank))


def _context_length(recipe: Recipe, model: nn.Module, length: int) -> int:
    """Return how many tokens a sample of context has on average; 0 where none is run, as keep files hold covariances.

    Raises:
        FileNotFoundError: If a keep file is not there.
        ValueError: If one is damaged, or for another model.
    """
    if recipe.context is None or isinstance(recipe.context, DataConfig):
        return length if recipe.context is None else _look_at(recipe.context, recipe, model)[1]
    named = [name for name in recipe.context_names if not is_keep_file(name)]
    for name in recipe.context_names:
        if is_keep_file(name):
            check_present(model, read_covariances(name).places, name)
    own = TOKENS if has_two_towers(model) else MAX_TOKENS
    written = recipe.corda.num_samples * recipe.corda.num_candidates
    looked_at = [(written, own) if name == SELF else _look_at(DataConfig(name), recipe, model) for name in named]
    counts = [count or 1 for count, _ in looked_at]
    return round(sum(count * length for count, (_, length) in zip(counts, looked_at, strict=True)) / sum(counts)) if named else 0


def _kept_tokens(keep: KeepConfig, recipe: Recipe, model: nn.Module, context_length: int) -> float:
    """Return on how many tokens a step is held to the base, on average."""
    size = keep.batch_size or default_batch_size(model, recipe.training.batch_size)
    length = context_length if keep.samples is None else _look_at(keep.samples, recipe, model)[1]
    return size * length / keep.every


def _num_written(recipe: Recipe, model: nn.Module) -> int:
    """Return how many tokens of context the base writes, each in a forward pass; with two towers it chooses captions instead."""
    if SELF not in recipe.context_names or has_two_towers(model):
        return 0
    return recipe.corda.num_samples * recipe.corda.num_candidates * MAX_TOKENS


def _look_at(data: DataConfig, recipe: Recipe, model: nn.Module) -> tuple[int | None, int]:
    """Return how many samples there are on this disk (None if they are not here), and how many tokens one has on average."""
    try:
        items = load_items(data)
    except FileNotFoundError:
        return None, TOKENS
    except ValueError as error:
        if "download" in str(error):  # on the hub, and not in the cache
            return None, TOKENS
        raise
    if recipe.model.library != "transformers" or has_two_towers(model):
        return len(items), TOKENS
    try:
        processor = read_processor(recipe.model, model)
    except (OSError, ValueError):
        return len(items), TOKENS
    places = range(0, len(items), max(1, len(items) // LOOKED_AT))[:LOOKED_AT]
    lengths = [len(encode(read_sample(items[place], processor), processor)["input_ids"]) for place in places]
    return len(items), round(sum(lengths) / len(lengths))


def _work(flops: float, per_second: float) -> str:
    seconds = flops / per_second
    span = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
    return f"{flops / 1e12:,.1f} TFLOP, about {span}"
