"""The one call: model and samples in, model with a CorDA adapter out, outputs unchanged."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from corda_core import AdapterPlan, Choice, Covariance, Mode, allocate, attach, choose, collect, plan
from corda_core.collect import split_layers
from corda_core.covariance import on_cpu, together
from corda_core.layers import from_first_process
from corda_core.linears import unwrapped, weight_shape
from corda_core.lora import Protect
from corda_core.plan import random_plan
from corda_core.store import Collected, check_collected, read_covariances
from corda_vlm.attention import split_attention
from corda_vlm.checks import check_image_token, checked_base, warn_of_resized
from corda_vlm.config import CordaConfig
from corda_vlm.context import Context, Sources, context_batches, draw_contexts, progress_bar, sources_of
from corda_vlm.coverage import coverage, tell
from corda_vlm.masks import token_weights
from corda_vlm.options import first_unknown
from corda_vlm.towers import is_open_clip, learnable_layers, modules_of, reach_of, select_layers

logger = logging.getLogger(__name__)

GONE = {
    "preprocess": "give processor=corda_vlm.OpenClipPairs(preprocess, tokenizer).",
    "tokenizer": "give processor=corda_vlm.OpenClipPairs(preprocess, tokenizer).",
    "normalize": "leave it out; corda_core.collect still knows it, for parity with PEFT.",
    "solver": "leave it out; the faster one is taken, and checked.",
}
"""Keywords of version 0.1.0 that ``prepare`` no longer has, and what to do."""


def prepare(
    model: nn.Module,
    images_texts: Iterable[Any] | os.PathLike[str],
    mode: str = "kpm",
    *,
    processor: Any = None,
    further_contexts: Sequence[Iterable[Any] | os.PathLike[str]] = (),
    config: CordaConfig | None = None,
    **options: Any,
) -> PeftModel:
    """Return the model with a CorDA adapter that has not changed anything yet: its outputs are bit for bit the base's.

    ``W x`` becomes ``W x + s B A0 x``, s = alpha / r (``protect="strict"``, the default for "kpm"): A0 is frozen at the directions of W
    that the context in ``images_texts`` uses least, and B trains from zero. With ``protect="start"``, the default for "ipm", it becomes
    ``W x + s (B A − B0 A0) x``: A and B train from components A0, B0 of W, those that matter most for the context with "ipm".
    With "lora" it is ``W x + s B A x``, A random and B zero.

    Args:
        model: A vision-language model of LLaVA's kind, a CLIP-type model, a vision tower or a causal language model of transformers; or an
            open_clip model, whose fused attention is then split in place (``corda_vlm.merge`` puts it together again). DDP, DataParallel
            and ``torch.compile`` are taken off: wrap or compile what is returned.
        images_texts: The context: what is to be kept ("kpm") or learned ("ipm"). Pairs (PIL image or None, text); dicts with
            ``text``, ``question``/``answer``, LLaVA ``conversations`` or ``messages`` of ``role`` and ``content``, and perhaps ``image``; a
            ``datasets.Dataset`` of such rows; or ready batches of model inputs. For models with two towers, pairs of image and caption.
            Ready batches are all used, or ``num_samples`` of them for each candidate; under ``torch.distributed`` each process brings its
            own. A keep file of ``corda-vlm collect`` (its path, ending in .safetensors), or several in a list, stand for the samples that
            they were made of, also beside samples: ``[Path("general.safetensors"), *samples]``.
        mode: "kpm" or "ipm"; or "lora" for a plain LoRA on the same layers, of whose context one sample alone is looked at, to see which
            layers can learn.
        processor: Reads the samples: a processor, a tokenizer for a language model, ``OpenClipPairs(preprocess, tokenizer)`` for open_clip.
            None looks beside the model's own files on this disk.
        further_contexts: Each as ``images_texts``. Each layer takes the one context of all that suits it best, and does not see the
            others: several tasks that are to be kept belong into one context.
        config: All options as a value, instead of ``mode`` and ``options``.
        **options: Fields of ``CordaConfig``: ``rank=32``, ``protect="strict"`` and so on.

    Raises:
        TypeError: If an option is unknown, or options are given beside a config.
        ValueError: If an option, a sample or a layer pattern is not right; the text says which and what to do.
    """
    config = _config(mode, config, options)
    if further_contexts:
        if config.candidates is not None:
            raise ValueError(f"candidates is {config.candidates}, but further_contexts are candidates themselves; leave one out.")
        config = replace(config, candidates=len(further_contexts) + 1)
    model = checked_base(model)
    contexts = [images_texts, *further_contexts] if further_contexts else draw_contexts(images_texts, config)
    return attach_plan(model, plan_contexts(model, contexts, config, processor), config)


def attach_plan(model: nn.Module, adapter_plan: AdapterPlan, config: CordaConfig) -> PeftModel:
    """Return the model with the plan attached as the config says.

    Raises:
        ValueError: If the plan belongs to another base, or options contradict each other.
    """
    return attach(
        model,
        adapter_plan,
        alpha=config.alpha,
        protect=config.protection,
        residual=config.residual,
        quantize=config.quantize,
        train_fully=modules_of(unwrapped(model), config.train_fully),
    )


def plan_contexts(model: nn.Module, contexts: Sequence[Any], config: CordaConfig, processor: Any = None) -> AdapterPlan:
    """Return the adapter plan for one context, or for the best of several in each layer; with a budget its ranks are allocated.

    Args:
        model: As in ``prepare``.
        contexts: Each as ``images_texts`` in ``prepare``. With ``max_memory`` and several contexts, or a budget, each is run twice: all
            choices are made before the first layer is decomposed.
        config: The options; ``candidates`` is not read, as the contexts are the candidates.
        processor: As in ``prepare``.

    Raises:
        ValueError: If an option, a sample or a layer pattern is not right, or the budget is too small.
    """
    model = checked_base(model)
    sources = [sources_of(context) for context in contexts]
    names, ready = _layers_and_contexts(model, sources, config, processor)
    config.check_layers(names)
    if config.mode is Mode.LORA:
        return random_plan(model, names, config.rank, seed=config.seed)
    budget = config.total_budget(weight_shape(model, name) for name in names)
    collect_of = partial(_collect, model, ready, config)
    parts = _parts(model, ready, names, config)
    if len(ready) == 1 and budget is None:
        return plan_adapters(model, (collect_of(0, part) for part in parts), config)
    if len(parts) > 1 and any(iter(context) is context for context in (source.samples for source in sources) if context is not None):
        raise ValueError(
            "max_memory with candidates or a budget runs the contexts twice, but one of them can be iterated only once; give a list."
        )
    choices: dict[str, Choice] = {}
    covariances: dict[str, Covariance] = {}
    for part in parts:
        collections = (collect_of(place, part) for place in range(len(ready)))
        covariances, chosen = choose(model, collections, damping=config.damping, in_full=budget is not None, progress=progress_bar)
        choices |= chosen
        if len(parts) > 1:  # else it would stay while the next part is collected
            covariances = {}
    ranks = None
    if budget is not None:
        ranks = allocate(model, choices, budget, config.mode, min_rank=config.min_rank, max_rank=config.max_rank)
    again = (_chosen(choices, part, collect_of) for part in parts)
    adapter_plan = plan_adapters(model, covariances if len(parts) == 1 else again, config, ranks, choices)
    if budget is not None:
        logger.info("%d parameters of a budget of %d, in %d layers", adapter_plan.num_parameters, budget, len(adapter_plan.layers))
    return replace(adapter_plan, provenance={**adapter_plan.provenance, **({} if budget is None else {"budget": budget})})


def collect_context(model: nn.Module, images_texts: Any, config: CordaConfig, processor: Any = None) -> dict[str, Covariance]:
    """Return the covariances of the context for the layers that the config names; with ``max_memory`` part by part, on the CPU.

    Raises:
        ValueError: If an option, a sample or a layer pattern is not right.
    """
    model = checked_base(model)
    names, ready = _layers_and_contexts(model, [sources_of(images_texts)], config, processor)
    parts = _parts(model, ready, names, config)
    if len(parts) == 1:
        return _collect(model, ready, config, 0, names)
    collected: dict[str, Covariance] = {}
    for part in parts:
        collected |= on_cpu(_collect(model, ready, config, 0, part))
    return {name: collected[name] for name in names if name in collected}


def collection_options(config: CordaConfig) -> dict[str, Any]:
    """Return what of the options changes a covariance, as it is written to a keep file: nothing where all tokens count."""
    weights = {kind: float(weight) for kind, weight in sorted(config.token_weights.items())}
    return {} if set(weights.values()) == {1.0} else {"tokens": weights}


def plan_adapters(
    model: nn.Module,
    covariances: Mapping[str, Covariance] | Iterable[Mapping[str, Covariance]],
    config: CordaConfig,
    ranks: Mapping[str, int] | None = None,
    choices: Mapping[str, Choice] | None = None,
) -> AdapterPlan:
    """Return the adapter plan, of constant rank or of these ranks, showing progress."""
    return plan(
        model,
        covariances,
        mode=config.mode,
        rank=config.rank,
        ranks=ranks,
        choices=choices,
        split=config.split,
        damping=config.damping,
        whiten=config.protection is Protect.WHITENED,
        progress=progress_bar,
    )


def _config(mode: str, config: CordaConfig | None, options: Mapping[str, Any]) -> CordaConfig:
    """Return the options as a value.

    Raises:
        TypeError: If one is unknown, or stands beside a config.
        ValueError: If one has an impossible value.
    """
    if config is not None:
        if options or mode not in ("kpm", config.mode):
            raise TypeError(f"prepare got both config and {[*options] or 'mode'}; put all options into the config (dataclasses.replace).")
        return config
    unknown = first_unknown(CordaConfig, options)
    if unknown is not None:
        name, meant = unknown
        raise TypeError(f"prepare has no option {name!r}: {GONE.get(name, meant)}")
    if not isinstance(options.get("candidates"), int | None):
        raise TypeError("candidates is a number; give contexts of your own as further_contexts=[...].")
    return CordaConfig(mode=mode, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Ready:
    """One context, ready to be collected."""

    samples: Context | None
    files: Mapping[Path, Collected]
    reached: frozenset[str] | None
    """The layers that the samples reach; None where nobody asked: all that are adapted."""

    def covers(self, name: str) -> bool:
        """Return whether the covariance of this layer is known, and that over all that the context is."""
        is_known = all(name in file.known for file in self.files.values())
        has_any = any(name in file.places for file in self.files.values()) or (self.reached is not None and name in self.reached)
        return is_known and has_any


def _layers_and_contexts(
    model: nn.Module, sources: Sequence[Sources], config: CordaConfig, processor: Any
) -> tuple[tuple[str, ...], list[_Ready]]:
    """Return the layers to adapt, those that can learn from any of the contexts, and the contexts as inputs of the model.

    Raises:
        ValueError: If the processor is of another model, a sample or a layer pattern is not right, or a keep file does not fit.
    """
    if is_open_clip(model):
        split_attention(model)
    warn_of_resized(model)
    if processor is not None:
        check_image_token(model, processor)
    names = select_layers(model, parts=config.parts, targets=config.targets, exclude=config.exclude)
    has_files = any(source.files for source in sources)
    read = {path: read_covariances(path) for source in sources for path in source.files}
    check_collected(read, model=model, options=collection_options(config))
    ready = []
    for source in sources:
        files = {path: read[path] for path in source.files}
        samples = None if source.samples is None else context_batches(model, source.samples, names, config, processor)
        reached = None if samples is None or not has_files else frozenset(reach_of(model, names, [samples.example]).learnable)
        ready.append(_Ready(samples, files, reached))
    if has_files:
        learnable = _covered(names, ready)
    else:
        learnable = learnable_layers(model, names, [context.samples.example for context in ready if context.samples is not None])
    tell(coverage(model, learnable, config.parts))
    return learnable, ready


def _covered(names: Sequence[str], contexts: Sequence[_Ready]) -> tuple[str, ...]:
    """Return the layers that all contexts cover, and warn of those left out.

    Raises:
        ValueError: If there are none.
    """
    covered = tuple(name for name in names if all(context.covers(name) for context in contexts))
    missing = [name for name in names if name not in covered]
    paths = [str(path) for context in contexts for path in context.files]
    files = f"{' and '.join(paths)} {'hold' if len(paths) > 1 else 'holds'}"
    if not covered:
        raise ValueError(
            f"{files} nothing of the {len(names)} layers that are to be adapted, such as {names[0]}; collect anew with the parts "
            "and targets that are adapted, or adapt those that are there."
        )
    if missing:
        warnings.warn(
            f"{len(missing)} of {len(names)} layers get no adapter, such as {missing[0]}: {files} nothing of them.",
            stacklevel=3,
        )
    return covered


def _parts(model: nn.Module, contexts: Sequence[_Ready], names: Sequence[str], config: CordaConfig) -> list[list[str]]:
    """Return the layers in parts whose covariances fit ``max_memory``."""
    batches = next((context.samples.batches for context in contexts if context.samples is not None), None)
    # The best so far and the next one share the memory limit, and so do those that are added up.
    at_once = min(2, len(contexts)) * max(len(context.files) + (context.samples is not None) for context in contexts)
    once = any(context.samples is not None and iter(context.samples.batches) is context.samples.batches for context in contexts)
    limit = config.max_bytes if config.max_bytes is not None or once else _room(model)
    parts = split_layers(model, batches, names, None if limit is None else limit // at_once)
    if config.max_bytes is None and limit is not None and len(parts) > 1:
        logger.info("covariances in %d parts of at most %.1f GB, half of what is free; max_memory sets it", len(parts), limit / 1e9)
    return parts


def _room(model: nn.Module) -> int | None:
    """Return how many bytes covariances may take where nobody said it: half of what is free on the model's GPU; on CPUs no limit.

    The other half is for activations and the decomposition.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return from_first_process((torch.cuda.mem_get_info(device)[0] + cached) // 2)


def _collect(model: nn.Module, contexts: Sequence[_Ready], config: CordaConfig, place: int, names: Sequence[str]) -> dict[str, Covariance]:
    """Return the covariances of one of the contexts."""
    context, collections = contexts[place], []
    reached = [name for name in names if context.reached is None or name in context.reached]
    try:
        if context.samples is not None and reached:
            weights = token_weights(model, config.token_weights)
            collections.append(collect(model, context.samples.batches, reached, token_weights=weights))
    except ValueError as error:
        if len(contexts) == 1:
            raise
        raise ValueError(f"Context {place + 1} of several, each of which must reach all layers: {error}") from error
    device = next(model.parameters()).device
    collections += [file.covariances(names, device) for file in context.files.values()]
    total = together(collections)
    return {name: total[name] for name in names if name in total}  # not experts that no token reached


def _chosen(
    choices: Mapping[str, Choice], names: Sequence[str], collect_of: Callable[[int, Sequence[str]], dict[str, Covariance]]
) -> dict[str, Covariance]:
    """Return the covariance that each layer chose, each context run only for the layers that chose it."""
    covariances: dict[str, Covariance] = {}
    for place in sorted({choices[name].index for name in names}):
        covariances |= collect_of(place, [name for name in names if choices[name].index == place])
    return {name: covariances[name] for name in names}
