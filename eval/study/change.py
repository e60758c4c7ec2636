"""How far a method moved each layer, whatever it does inside: read off what the layers compute."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from corda_core import Covariance
from corda_core.covariance import Symmetric
from corda_core.linears import base_of, evaluating, weight_matrix


def linear_copies(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the layers as they are now, as plain layers that later changes of the model do not reach."""
    copies = {}
    for name in names:
        weight, bias = weight_matrix(model, name).detach(), getattr(model.get_submodule(name), "bias", None)
        copy = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        copy.weight.data = weight.clone()
        if bias is not None:
            copy.bias.data = bias.detach().clone()
        copies[name] = copy.requires_grad_(False)
    return copies


@torch.no_grad()
def effective_weight(model: nn.Module, name: str, num_inputs: int) -> Tensor:
    """Return W (m, n) of what a layer computes, ``W x + b``, whatever it is made of."""
    layer = base_of(model).get_submodule(name)
    identity = torch.eye(num_inputs)
    return (layer(identity) - layer(torch.zeros_like(identity[:1]))).T


@contextmanager
def interpolated(model: nn.Module, originals: Mapping[str, nn.Linear], alpha: float) -> Iterator[None]:
    """Let each layer give ``(1 − alpha)`` of the original's output and ``alpha`` of its own (WiSE-FT, arXiv 2109.01903)."""

    def mix(original: nn.Linear, inputs: Tensor, output: Tensor) -> Tensor:
        return torch.lerp(original(inputs).to(output.dtype), output, alpha)

    handles = [
        base_of(model).get_submodule(name).register_forward_hook(lambda _, args, output, original=original: mix(original, args[0], output))
        for name, original in originals.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative_changes(model: nn.Module, originals: Mapping[str, nn.Linear], covariances: Mapping[str, Covariance]) -> tuple[float, float]:
    """Return the means over the layers of ``‖ΔW C^(1/2)‖_F / ‖W C^(1/2)‖_F``, on a context, and of ``‖ΔW‖_F / ‖W‖_F``."""
    on_context, plain = [], []
    for name, original in originals.items():
        weight = original.weight
        change = effective_weight(model, name, weight.shape[1]) - weight
        C = covariances[name].packed
        on_context.append((_energy(change, C) / _energy(weight, C)).sqrt())
        plain.append(change.norm() / weight.norm())
    return float(torch.stack(on_context).mean()), float(torch.stack(plain).mean())


@torch.no_grad()
def kl_from_base(model: nn.Module, originals: Mapping[str, nn.Linear], batches: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean over tokens of ``KL(p_base ‖ p)``, nats, of a language model's next tokens; with ``labels``, of those labelled.

    The base is the same model whose layers give the originals' outputs, so that any method can be asked.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            wanted = batch["labels"][:, 1:] >= 0 if "labels" in batch else torch.ones_like(batch["input_ids"][:, 1:], dtype=torch.bool)
            with interpolated(model, originals, 0.0):
                base = model(**inputs, use_cache=False).logits[:, :-1][wanted].float().log_softmax(-1)
            logits = model(**inputs, use_cache=False).logits[:, :-1][wanted].float().log_softmax(-1)
            total += functional.kl_div(logits, base, reduction="sum", log_target=True).item()
            count += len(logits)
    return total / count


def _energy(weight: Tensor, C: Symmetric) -> Tensor:
    """Return ``‖W C^(1/2)‖²_F = tr(W C Wᵀ)``, which rounding makes negative where W avoids C."""
    return (weight * C.times(weight.T.contiguous()).T).sum().clamp(min=0)
