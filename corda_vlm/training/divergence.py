"""How far an adapted model has moved from its base on samples, in nats: the Kullback-Leibler divergence of what the two predict.

Language and vision-language models: ``KL(p₀ ‖ p)`` of the base's next-token distribution p₀ and the adapted model's p, a mean over the text
tokens that are predicted. Two towers: the same of each image's distribution over the batch's captions, and of each caption's over the
images.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from corda_core.attach import Residual
from corda_core.layers import sum_over_processes_
from corda_core.linears import base_of, evaluating, hold_statistics_, in_mode, unwrapped
from corda_vlm.context import model_inputs
from corda_vlm.data.samples import IGNORED_LABEL
from corda_vlm.towers import has_two_towers, image_tokens
from corda_vlm.training.contrastive import Features, contrastive_loss, features_of, over_processes

CHUNK = 1 << 21
"""How many logits are converted to float32 at a time: a vocabulary of 256,000 and long samples else take gigabytes. So many fit
a processor's cache."""
OF_THE_BASE = ("base_layer.", "original_module.")
"""How names of parameters begin that are the base's own, in what stands in the place of its layers."""
RECOMPUTES = ("gradient_checkpointing", "activation_checkpointing", "grad_checkpointing")
"""What says of a module that it computes its activations again in the backward pass."""
WRITES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How names of PEFT's ways to start begin that change the base's own weights."""
NOTHING = "There are no samples to keep with a text token that is predicted from others; give some, or longer ones."


class Kind(StrEnum):
    """What holds a model to what it was."""

    DISTILL = "distill"
    """The divergence from the base's predictions."""
    REPLAY = "replay"
    """The samples' own loss."""


@contextmanager
def base_outputs(model: nn.Module) -> Iterator[None]:
    """Make the model compute what its untouched base does, bit for bit: without adapters and what trains whole, gradients and dropout.

    What takes gradients stays as it is (PEFT's ``disable_adapter`` switches that too, which sharded models do not bear).

    Raises:
        ValueError: If the base is not there without its adapter, or there is no adapter.
    """
    layers = [module for module in base_of(model).modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    _check_base_there(unwrapped(model), layers)
    states = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        with evaluating(unwrapped(model)):
            yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer._disable_adapters = state


def _check_base_there(model: Any, layers: list[Any]) -> None:
    """Refuse a model whose base cannot be run by switching adapters off."""
    if not layers:
        raise ValueError(
            f"{type(model).__name__} carries no adapter, so there is no base to compare it with; prepare it, or attach a LoRA (of a model "
            "that trains whole the base would be a second copy)."
        )
    own = {parameter for layer in layers for name, parameter in layer.named_parameters() if not name.startswith(OF_THE_BASE)}
    other = next((name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter not in own), None)
    if other is not None:
        raise ValueError(
            f"{other} of the base trains itself, so the base is not what it was and cannot be compared with; freeze it, or let its module "
            "train whole beside the adapter (train_fully, PEFT's modules_to_save)."
        )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError("The adapter is merged into the base's weights (merge_adapter), so the base is not there; call unmerge_adapter.")
    for name, config in getattr(model, "peft_config", {}).items():
        start, attachment = getattr(config, "init_lora_weights", None), getattr(config, "corda", None)
        if attachment is not None and attachment.residual is Residual.SUBTRACT:
            raise ValueError(
                f'The adapter {name!r} was attached with residual="subtract", so its base lacks what the adapter started from and cannot '
                'be run without it; attach with residual="offset".'
            )
        if attachment is None and isinstance(start, str) and start.startswith(WRITES_THE_BASE):
            raise ValueError(
                f"The adapter {name!r} has init_lora_weights={start!r}, for which PEFT has changed the base's weights, so the base cannot "
                "be run without it; take another start, such as one of corda_vlm.prepare."
            )


def keep_loss(model: nn.Module, batch: Mapping[str, Any], *, kind: Kind | str = Kind.DISTILL) -> Tensor:
    """Return the loss (nats, a scalar with a gradient) that holds an adapted model to its base on a batch.

    "distill": ``KL(p₀ ‖ p)``, a mean over the text tokens that are predicted; nothing at the start. For two towers
    ``½ (KL of each image's softmax(s₀ T₀ᵀ i₀) + KL of each caption's) + ½ s₀ (½ mean ‖i − i₀‖² + ½ mean ‖t − t₀‖²)``, s the scale of
    cosines: similarities as ZSCL (arXiv 2303.06628) has them, and features. "replay": the loss of the batch's ``labels``, or of all its
    text; for two towers the contrastive loss. Both passes are without dropout, but where activations are checkpointed.

    Args:
        model: With an adapter; "distill" runs it a second time, with that switched off.
        batch: Inputs of the model, as a ``Collator`` makes them.
        kind: "distill" or "replay".

    Raises:
        ValueError: If the base is not there without its adapter, or the batch has no text that is predicted.

    Note:
        Under ``torch.distributed`` the loss of two towers is that of all processes' pairs; else it is this process's own.
    """
    count = num_kept(model, batch, Kind(kind))
    if not count:
        raise ValueError(NOTHING)
    return kept_sum(model, batch, Kind(kind), count)[0] / count


def num_kept(model: nn.Module, batch: Mapping[str, Any], kind: Kind) -> int:
    """Return over how much of a batch the mean of ``keep_loss`` is taken: text tokens that are predicted, or pairs; perhaps none.

    Raises:
        ValueError: If the model neither predicts text nor compares towers.
    """
    base = base_of(model)
    if has_two_towers(base):
        return len(next(value for value in batch.values() if isinstance(value, Tensor)))
    find_output: Any = getattr(base, "get_output_embeddings", lambda: base)
    if "input_ids" not in batch or find_output() is None:
        raise ValueError(f"{type(base).__name__} predicts no text and compares no towers, so there is nothing to distil or to replay.")
    replayed = kind is Kind.REPLAY and "labels" in batch
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum() if replayed else _predicted(base, batch).sum())


def kept_sum(model: nn.Module, batch: Mapping[str, Any], kind: Kind, count: int) -> tuple[Tensor, float]:
    """Return ``keep_loss`` times ``count``, the batch's ``num_kept``, and the same of what it measures: the KL alone, of a replay its loss.

    0 where nothing counts, by a pass all the same, in which sharded models take part together.

    Raises:
        ValueError: As ``keep_loss``.
    """
    base = base_of(model)
    inputs = model_inputs(base, False, batch)
    with _without_dropout(model):
        if has_two_towers(base):
            after = over_processes(features_of(model, inputs))
            if kind is Kind.REPLAY:
                loss = contrastive_loss(after) * count
                return loss, float(loss.detach())
            with base_outputs(model):
                before = over_processes(features_of(model, inputs))
            kl = similarity_kl(before, after) * count
            return kl + _feature_distance(before, after) * count, float(kl.detach())
        loss = _replayed(model, inputs, batch.get("labels"), count) if kind is Kind.REPLAY else _token_divergence(model, inputs)
    return loss, float(loss.detach())


def _replayed(model: nn.Module, inputs: dict[str, Any], labels: Tensor | None, count: int) -> Tensor:
    """Return the sum of the labels' losses, or without labels of all text's."""
    if labels is None:
        labels = inputs["input_ids"].masked_fill(~_predicted(base_of(model), inputs), IGNORED_LABEL)
    output = model(**inputs, labels=labels.to(inputs["input_ids"].device))
    total: Tensor = output.loss * count if count else output.logits.nan_to_num(0, 0, 0).sum() * 0.0
    return total


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, as the base is run; where activations are computed again, which is done in training mode only, in that."""
    bare = unwrapped(model)
    again = any(getattr(module, name, False) is True for module in bare.modules() for name in RECOMPUTES)
    with in_mode(bare, training=again):
        hold_statistics_(bare)
        yield


@torch.no_grad()
def context_kl(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Return ``KL(base ‖ adapted)`` in nats, a mean over the predicted text tokens (two towers: pairs) of all batches of all processes.

    In evaluation mode; for two towers the distributions are those over each batch, without the features' distance of ``keep_loss``.

    Raises:
        ValueError: If the base is not there without its adapter, or there is nothing that is predicted.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    base = base_of(model)
    with evaluating(unwrapped(model)):
        for batch in batches:
            inputs, count = model_inputs(base, False, batch), num_kept(model, batch, Kind.DISTILL)
            if has_two_towers(base):
                after = features_of(model, inputs)
                with base_outputs(model):
                    value = similarity_kl(features_of(model, inputs), after) * count
            else:
                value = _token_divergence(model, inputs)
            sums += torch.tensor([float(value), count], dtype=torch.float64)
    sum_over_processes_(sums)
    if not sums[1]:
        raise ValueError(NOTHING)
    return float(sums[0] / sums[1])


def similarity_kl(before: Features, after: Features) -> Tensor:
    """Return the KL (nats a pair) of the base's similarity distributions to those of the adapted model, mean of both directions.

    Images over captions and captions over images; of a model trained with sigmoids (SigLIP) the sum over an image's captions of the KL of
    each "belongs together".
    """
    old, new = (features.scale.float() * features.image.float() @ features.text.float().T for features in (before, after))
    if before.bias is not None and after.bias is not None:
        old, new = old + before.bias, new + after.bias
        both = [(F.logsigmoid(sign * old), F.logsigmoid(sign * new)) for sign in (1, -1)]
        return _sum_of_kl(both) / len(old)
    sides = [(old.log_softmax(dim), new.log_softmax(dim)) for dim in (0, 1)]
    return _sum_of_kl(sides) / (2 * len(old))


def _sum_of_kl(logarithms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of ``_kl`` over pairs of logarithms."""
    return torch.stack([_kl(log_p, log_q).sum() for log_p, log_q in logarithms]).sum()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``p (d + e^(−d) − 1)``, d = log p − log q, whose sum over all outcomes is the KL.

    Of ``p d`` it is the same sum, as Σ q = Σ p; but no term is negative, and what is of first order in d need not cancel between terms.
    """
    p, d = log_p.exp(), log_p - log_q
    return (p * (d + torch.expm1(-d))).masked_fill(p == 0, 0)


def _feature_distance(before: Features, after: Features) -> Tensor:
    """Return ``½ s₀ (½ mean ‖i − i₀‖² + ½ mean ‖t − t₀‖²)``: what the features' own logits have lost, in nats."""
    sides = ((before.image, after.image), (before.text, after.text))
    distances = [(new.float() - old.float()).square().sum(1).mean() for old, new in sides]
    return before.scale.float() / 4 * torch.stack(distances).sum()


def _token_divergence(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the sum of ``KL(p₀ ‖ p)`` over the text tokens that are predicted."""
    base = base_of(model)
    wanted = _predicted(base, inputs)[:, 1:]  # by the position before each
    columns = wanted.any(0).nonzero()[:, 0]
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        inputs, wanted = inputs | {"logits_to_keep": columns}, wanted[:, columns]
    else:
        wanted = F.pad(wanted, (0, 1))
    with base_outputs(model):
        before = model(**inputs).logits
    after = model(**inputs).logits
    rows = wanted.flatten().nonzero()[:, 0]
    total: Tensor = _SumOfKl.apply(after, before, rows)
    return total


def _predicted(base: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return which tokens (batch, tokens) are text that is predicted from what stands before it: no padding, no image, no first token."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask > 0
    counts = counts & F.pad(counts[:, :-1], (1, 0))
    return counts & ~torch.isin(ids, torch.tensor(image_tokens(base), device=ids.device, dtype=ids.dtype))


class _SumOfKl(torch.autograd.Function):
    """``Σ_rows KL(softmax(before) ‖ softmax(after))`` in float32, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, after: Tensor, before: Tensor, rows: Tensor) -> Tensor:
        """Return the sum over these rows of the logits (batch, tokens, vocabulary), flattened.

        ``∂/∂after = softmax(after) − softmax(before)``, which is all that the backward pass needs: no more is kept than the base's logits
        took.
        """
        size = after.shape[-1]
        new, old = after.reshape(-1, size), before.reshape(-1, size)
        total = torch.zeros((), device=after.device)
        gradient = torch.zeros_like(new) if ctx.needs_input_grad[0] else None
        for some in rows.split(max(1, CHUNK // size)):
            log_p, log_q = old[some].float().log_softmax(-1), new[some].float().log_softmax(-1)
            total += _kl(log_p, log_q).sum()
            if gradient is not None:
                gradient[some] = (log_q.exp() - log_p.exp()).to(gradient.dtype)
        ctx.gradient = None if gradient is None else gradient.view_as(after)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient by ``after``, once: it is scaled in place, as a copy would be as large as the logits."""
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("The gradient of keep_loss was asked for twice; it is given once: compute the loss again.")
        return gradient.mul_(grad_outputs[0].to(gradient.dtype)), None, None
