"""The one call: model and samples in, model with a CorDA adapter out, outputs unchanged."""

import collections
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from peft import PeftModel
from PIL import Image
from torch import Tensor, nn

from corda_core import AdapterPlan, Covariance, Selection, TokenWeights, allocate_ranks, attach, collect, plan, select_covariances
from corda_core.allocate import Candidate, resolved
from corda_core.collect import collect_in_passes, split_layers
from corda_core.linears import unwrapped, weight_shape
from corda_vlm.attention import split_attention
from corda_vlm.checks import check_image_token, checked_base, warn_of_resized
from corda_vlm.config import CordaConfig
from corda_vlm.context import Context, context_batches, draw_contexts, progress_bar
from corda_vlm.coverage import coverage, tell
from corda_vlm.data.pairs import OpenClipPairs
from corda_vlm.towers import image_dtype, is_open_clip, learnable_layers, modules_of, select_layers, token_weights

logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    images_texts: Iterable[Any],
    mode: str = "kpm",
    *,
    processor: Any = None,
    preprocess: Callable[[Image.Image], Tensor] | None = None,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    rank: int = 128,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    split: str = "balanced",
    damping: float = 0.01,
    residual: str = "offset",
    quantize: str | None = None,
    train_fully: Sequence[str] = (),
    protect: str | None = None,
    variant: str = "corda",
    candidates: int | Sequence[Iterable[Any]] | None = None,
    budget: int | str | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    solver: str = "auto",
    tokens: str | Mapping[str, float] = "all",
    normalize: str | None = None,
    max_memory: str | float | None = None,
    num_samples: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> PeftModel:
    """Return the model with a CorDA adapter that has not changed anything yet: its outputs are bit for bit the base's.

    ``W x`` becomes ``W x + B A x − B0 A0 x``; A and B start at the components A0, B0 of W that matter least (mode "kpm") or
    most (mode "ipm") for the context in ``images_texts``.

    Args:
        model: A vision-language model of LLaVA's kind, a CLIP-type model, a vision tower or a causal language model of transformers; or an
            open_clip model, whose fused attention is then split in place (``corda_vlm.merge`` puts it together again). DDP, DataParallel
            and ``torch.compile`` are taken off: wrap or compile what is returned.
        images_texts: The context: what is to be kept ("kpm") or learned ("ipm"). Pairs (PIL image or None, text); dicts with
            ``text``, ``question``/``answer``, LLaVA ``conversations`` or ``messages`` of ``role`` and ``content``, and perhaps ``image``; a
            ``datasets.Dataset`` of such rows; or ready batches of model inputs. For models with two towers, pairs of image and caption.
        mode: "kpm" or "ipm".
        processor: Reads the samples: a processor, or a tokenizer for a language model. None looks beside the model's own
            files on this disk.
        preprocess: For open_clip: what makes a tensor of an image.
        tokenizer: For open_clip: what makes tokens of captions.
        rank: See ``CordaConfig``, also for the options below.
        alpha: See ``CordaConfig``.
        targets: See ``CordaConfig``.
        exclude: See ``CordaConfig``.
        parts: See ``CordaConfig``.
        split: See ``CordaConfig``.
        damping: See ``CordaConfig``.
        residual: See ``CordaConfig``.
        quantize: See ``CordaConfig``.
        train_fully: See ``CordaConfig``.
        protect: See ``CordaConfig``.
        variant: See ``CordaConfig``.
        candidates: See ``CordaConfig``; or further contexts, each as ``images_texts``. Each layer takes the one that suits it best, and
            does not see the others: several tasks that are to be kept belong into one context.
        budget: See ``CordaConfig``.
        min_rank: See ``CordaConfig``.
        max_rank: See ``CordaConfig``.
        solver: See ``CordaConfig``.
        tokens: See ``CordaConfig``.
        normalize: See ``CordaConfig``.
        max_memory: See ``CordaConfig``.
        num_samples: See ``CordaConfig``. Ready batches are all used, or ``num_samples`` of them for each candidate; under
            ``torch.distributed`` each process brings its own.
        batch_size: See ``CordaConfig``.
        seed: See ``CordaConfig``.

    Raises:
        ValueError: If an option, a sample or a layer pattern is not right; the text says which and what to do.
    """
    config = CordaConfig(
        mode=mode,
        rank=rank,
        alpha=alpha,
        targets=targets,
        exclude=exclude,
        parts=parts,
        split=split,
        damping=damping,
        residual=residual,
        quantize=quantize,
        train_fully=train_fully,
        protect=protect,
        variant=variant,
        candidates=candidates if isinstance(candidates, int | None) else len(candidates) + 1,
        budget=budget,
        min_rank=min_rank,
        max_rank=max_rank,
        solver=solver,
        tokens=tokens,
        normalize=normalize,
        max_memory=max_memory,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
    )
    model = checked_base(model)
    if preprocess is not None or tokenizer is not None:
        if preprocess is None or tokenizer is None or not is_open_clip(model):
            raise ValueError("preprocess and tokenizer are for open_clip models, and go together; other models take processor=.")
        processor = OpenClipPairs(preprocess, tokenizer, image_dtype(model))
    contexts = draw_contexts(images_texts, config) if isinstance(candidates, int | None) else [images_texts, *candidates]
    adapter_plan = plan_contexts(model, contexts, config, processor)
    return attach_plan(model, adapter_plan, config)


def attach_plan(model: nn.Module, adapter_plan: AdapterPlan, config: CordaConfig) -> PeftModel:
    """Return the model with the plan attached as the config says.

    Raises:
        ValueError: If the plan belongs to another base, or options contradict each other.
    """
    return attach(
        model,
        adapter_plan,
        alpha=config.alpha,
        protect=config.protection,  # type: ignore[arg-type]
        residual=config.residual,  # type: ignore[arg-type]
        quantize=config.quantize,
        train_fully=modules_of(unwrapped(model), config.train_fully),
    )


def plan_contexts(model: nn.Module, contexts: Sequence[Iterable[Any]], config: CordaConfig, processor: Any = None) -> AdapterPlan:
    """Return the adapter plan for one context, or for the best of several in each layer; with a budget its ranks are allocated.

    Args:
        model: As in ``prepare``.
        contexts: Each as ``images_texts`` in ``prepare``. With a budget and ``max_memory`` they are gone over twice.
        config: All options but ``candidates``.
        processor: As in ``prepare``.

    Raises:
        ValueError: If an option, a sample or a layer pattern is not right, or the budget is too small.
    """
    model = checked_base(model)
    names, ready = _layers_and_contexts(model, contexts, config, processor)
    budget = config.total_budget(weight_shape(model, name) for name in names)
    if len(contexts) == 1 and budget is None:
        return plan_adapters(model, _covariances(model, ready[0], names, config), config)
    again = budget is not None and config.max_bytes is not None
    if again and any(iter(context) is context for context in contexts):
        raise ValueError("budget with max_memory goes over the context twice, but it can be gone over only once; give a list.")
    found: list[Selection] = []

    def covariances_of(selection: Selection) -> Mapping[str, Covariance]:
        if budget is not None:
            selection = resolved(model, selection, damping=config.damping, progress=progress_bar)
        found.append(replace(selection, covariances={}))  # what is known of a layer stays, its covariance goes
        return selection.covariances

    ranks = None
    parts: Iterator[Mapping[str, Covariance]] = map(covariances_of, _selections(model, ready, names, config))
    if budget is not None:  # all layers must be known before one gets its rank; with a memory limit they are collected again after that
        kept = None if again else list(parts)
        collections.deque(parts, maxlen=0)
        ranks = _ranks(model, {name: selection.best(name) for selection in found for name in selection.candidates}, budget, config)
        parts = map(attrgetter("covariances"), _selections(model, ready, names, config)) if kept is None else iter(kept)
    made = plan_adapters(model, parts, config, ranks)
    candidates = {name: one for selection in found for name, one in selection.candidates.items()}
    chosen = {name: place for selection in found for name, place in selection.chosen.items()}
    layers = {name: replace(init, candidates=candidates[name], chosen=chosen[name]) for name, init in made.layers.items()}
    if budget is not None:
        logger.info("%d parameters of a budget of %d, in %d layers", made.num_parameters, budget, len(layers))
    return replace(made, layers=layers, provenance={**made.provenance, "budget": budget})


def collect_context(model: nn.Module, images_texts: Iterable[Any], config: CordaConfig, processor: Any = None) -> dict[str, Covariance]:
    """Return the covariances of the context for the layers that the config names, whatever memory they take.

    Raises:
        ValueError: If an option, a sample or a layer pattern is not right.
    """
    model = checked_base(model)
    names, (context,) = _layers_and_contexts(model, [images_texts], config, processor)
    whole: dict[str, Covariance] = {}
    for part in _covariances(model, context, names, replace(config, max_memory=None)):
        whole |= part
    return whole


def plan_adapters(
    model: nn.Module,
    covariances: Mapping[str, Covariance] | Iterable[Mapping[str, Covariance]],
    config: CordaConfig,
    ranks: Mapping[str, int] | None = None,
) -> AdapterPlan:
    """Return the adapter plan, of constant rank or of these ranks, showing progress."""
    return plan(
        model,
        covariances,
        mode=config.mode,
        rank=config.rank,
        ranks=ranks,
        split=config.split,
        damping=config.damping,
        solver=config.solver,
        whiten=config.protection == "whitened",
        progress=progress_bar,
    )


def _layers_and_contexts(
    model: nn.Module, contexts: Sequence[Iterable[Any]], config: CordaConfig, processor: Any
) -> tuple[tuple[str, ...], list[Context]]:
    """Return the layers to adapt, those that can learn from any of the contexts, and the contexts as inputs of the model.

    Raises:
        ValueError: If the processor is of another model, or a sample or a layer pattern is not right.
    """
    if is_open_clip(model):
        split_attention(model)
    warn_of_resized(model)
    if processor is not None:
        check_image_token(model, processor)
    names = select_layers(model, parts=config.parts, targets=config.targets, exclude=config.exclude)
    ready = [context_batches(model, context, names, config, processor) for context in contexts]
    learnable = learnable_layers(model, names, [context.example for context in ready])
    tell(coverage(model, learnable, config.parts))
    return learnable, ready


def _covariances(model: nn.Module, context: Context, names: Sequence[str], config: CordaConfig) -> Iterator[dict[str, Covariance]]:
    """Yield the covariances of the context, in one part or in as many as the memory asks for."""
    return collect_in_passes(
        model,
        context.batches,
        names,
        config.max_bytes,
        token_weights=token_weights(model, config.token_weights),
        normalize=config.normalize,  # type: ignore[arg-type]
    )


def _selections(model: nn.Module, contexts: Sequence[Context], names: Sequence[str], config: CordaConfig) -> Iterator[Selection]:
    """Yield the choice among the contexts, part by part: the best so far and the next share the memory limit."""
    weights = token_weights(model, config.token_weights)
    limit = None if config.max_bytes is None else config.max_bytes // min(2, len(contexts))
    for part in split_layers(model, contexts[0].batches, names, limit):
        sets = (_covariances_of(number, model, one, part, weights, config) for number, one in enumerate(contexts, 1))
        yield select_covariances(model, sets, damping=config.damping, progress=progress_bar)


def _covariances_of(
    number: int, model: nn.Module, context: Context, names: Sequence[str], weights: TokenWeights, config: CordaConfig
) -> dict[str, Covariance]:
    """Return the covariances of one of several contexts."""
    try:
        return collect(model, context.batches, names, token_weights=weights, normalize=config.normalize)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"Context {number} of several, each of which must reach all layers: {error}") from error


def _ranks(model: nn.Module, candidates: Mapping[str, Candidate], budget: int, config: CordaConfig) -> dict[str, int]:
    """Return each layer's share of the budget."""
    return allocate_ranks(
        {name: one.spectrum for name, one in candidates.items()},
        {name: one.log_pi for name, one in candidates.items()},
        {name: sum(weight_shape(model, name)) for name in candidates},
        budget,
        config.mode,
        min_rank=config.min_rank,
        max_rank=config.max_rank,
    )
