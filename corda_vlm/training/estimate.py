"""What a recipe will take, before it is run: layers, parameters, memory, FLOPs, time. Reads the model's config, never its weights."""

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from corda_core.linears import weight_shape
from corda_vlm.coverage import Coverage, coverage
from corda_vlm.data.items import load_items
from corda_vlm.data.samples import encode, read_sample
from corda_vlm.data.sources import DataConfig
from corda_vlm.towers import family_of, has_two_towers, modules_of, select_layers
from corda_vlm.training.models import describe_base, read_processor
from corda_vlm.training.recipe import Recipe

TOKENS = 512
"""Tokens of a sample, where there is none to look at: an image of LLaVA's is 576."""
LOOKED_AT = 16
"""How many samples are looked at for their length."""


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
    base_bytes: int
    training_bytes: int
    """Adapters with their frozen start, gradients and AdamW's two moments, in float32."""
    covariance_bytes: int
    """At once, half of each matrix."""
    context_flops: float
    """Forward passes over the context, and the products X Xᵀ."""
    decomposition_flops: float
    training_flops: float | None
    flops_per_second: float
    """Of matrix products in the precision of the base, measured now."""


def estimate(recipe: Recipe) -> Estimate:
    """Return what a recipe will take.

    Counted are products of matrices: 2 m n FLOPs a token and layer forwards, as many backwards, as the base takes no gradient; attention's
    own products and activations are not. Layers that turn out not to reach the output are counted too. Samples have the mean length of
    ``LOOKED_AT`` of them, or ``TOKENS`` where data or processor are not on this disk.

    Raises:
        ModuleNotFoundError: If an extra is needed that is not installed.
        ValueError: If the model is not here, or an option does not fit it.
    """
    model = describe_base(recipe.model)
    corda, family = recipe.corda, family_of(model)
    names = select_layers(model, parts=corda.parts, targets=corda.targets, exclude=corda.exclude)
    shapes = {name: weight_shape(model, name) for name in names}
    budget = corda.total_budget(shapes.values())
    grouped: dict[str, list[tuple[int, int]]] = {}
    for name, shape in shapes.items():
        grouped.setdefault(family.part_of(name) or "model", []).append(shape)
    parts = {part: _part(ofs, recipe) for part, ofs in grouped.items()}
    whole = sum(p.numel() for name in modules_of(model, corda.train_fully) for p in model.get_submodule(name).parameters())
    adapters = sum(part.num_parameters for part in parts.values()) if budget is None else budget
    trained = adapters if corda.protection != "strict" else sum(m * min(corda.rank, m, n) for m, n in shapes.values())
    num_base = sum(parameter.numel() for parameter in model.parameters())
    bits = 4.5 if recipe.model.quantize or corda.quantize else 8 * getattr(torch, recipe.model.dtype).itemsize
    samples, length = _look_at(recipe.data, recipe, model)
    context_length = length if recipe.context is None else _look_at(recipe.context, recipe, model)[1]
    steps = recipe.training.steps or (None if samples is None else -(-samples * recipe.training.epochs // recipe.training.batch_size))
    tokens = corda.num_samples * corda.num_candidates * context_length
    distinct = Counter((name.rpartition(".")[0], n) for name, (_, n) in shapes.items())  # q, k and v read the same
    passes_backward = 3 if recipe.training.gradient_checkpointing else 2
    return Estimate(
        model=type(model).__name__,
        num_base=num_base,
        parts=parts,
        coverage=coverage(model, names, corda.parts),
        num_trainable=trained + whole,
        num_samples=samples,
        num_tokens=length,
        num_context_tokens=context_length,
        steps=None if steps is None else int(steps),
        base_bytes=int(num_base * bits / 8),
        training_bytes=4 * (adapters * (2 if corda.protection == "start" else 1) + 3 * (trained + whole) + whole),
        covariance_bytes=min(sum(4 * n * (n + 1) // 2 for _, n in distinct), corda.max_bytes or 1 << 62),
        context_flops=tokens * (2 * num_base + sum(n * n for _, n in distinct)),
        # The products with C, and the iteration or factorisation: some multiples of them.
        decomposition_flops=sum(2 * m * n * n + 4 * min(m, n) * m * n + 10 * min(m, n) ** 3 for m, n in shapes.values()),
        training_flops=None
        if steps is None
        else steps * recipe.training.batch_size * length * (2 * num_base * passes_backward + 6 * adapters),
        flops_per_second=_speed(getattr(torch, recipe.model.dtype)),
    )


def describe(found: Estimate) -> str:
    """Return an estimate as text for a terminal."""
    lines = [f"{found.model}, {found.num_base / 1e6:,.1f} M parameters, {_size(found.base_bytes)}"]
    for part, its in found.parts.items():
        low, high = its.ranks
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        lines.append(f"  {part}: {its.num_layers} layers, {ranks}, {its.num_parameters:,} parameters of A and B")
    lines += [
        str(found.coverage),
        f"trainable: {found.num_trainable:,} ({found.num_trainable / found.num_base:.2%} of the base)",
        f"memory beside the base, without activations: covariances {_size(found.covariance_bytes)} while preparing; "
        f"adapters, gradients and optimiser {_size(found.training_bytes)} while training",
        f"context: {_work(found.context_flops, found)}",
        f"decomposition: {_work(found.decomposition_flops, found)}",
    ]
    if found.steps is None:
        lines.append("training: the data are not here, so the number of steps is not known; training.steps would set it")
    else:
        samples = "" if found.num_samples is None else f", {found.num_samples:,} samples"
        lines.append(f"training: {found.steps:,} steps{samples}, {_work(found.training_flops or 0, found)}")
    lines.append(
        f"(times: {found.flops_per_second / 1e9:,.0f} GFLOP/s, measured just now for one process; {found.num_tokens} tokens a sample, "
        f"{found.num_context_tokens} of context)"
    )
    return "\n".join(lines)


def _part(shapes: list[tuple[int, int]], recipe: Recipe) -> Part:
    ranks = [min(recipe.corda.rank, *shape) for shape in shapes]
    if recipe.corda.spreads:
        limits = recipe.corda.min_rank, max(min(shape) for shape in shapes)
        spread = (limits[0], min(limits[1], recipe.corda.max_rank or limits[1]))
    else:
        spread = (min(ranks), max(ranks))
    return Part(len(shapes), spread, sum((m + n) * rank for (m, n), rank in zip(shapes, ranks, strict=True)))


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


def _speed(dtype: torch.dtype) -> float:
    """Return FLOP/s of a product of matrices on the device that will compute."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    left, right = (torch.randn(1024, 1024, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((left @ right)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def _work(flops: float, found: Estimate) -> str:
    seconds = flops / found.flops_per_second
    span = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
    return f"{flops / 1e12:,.1f} TFLOP, about {span}"


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
