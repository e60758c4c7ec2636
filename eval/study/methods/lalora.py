"""LaLoRA (arXiv 2512.17720): A and B are held where they start, most firmly in directions that the loss of a source sample bends in.

Shapes: W (m, n), its change ``s B A``, A (r, n), B (m, r). A sample is a row of a batch; at its tokens t a layer has inputs x_t and
``g_t = ∂ℓ/∂y_t``, the gradient of the sample's loss ℓ by the layer's outputs. At the start (A₀, B₀) the sample's gradients are
``∂A = Σ_t s B₀ᵀ g_t x_tᵀ`` and ``∂B = Σ_t s g_t (A₀ x_t)ᵀ``. Λ, the empirical Fisher matrix, is the mean over samples of the products of
their entries; those of different layers are always left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from corda_core import Covariance, lora_layers
from corda_core.linears import evaluating
from corda_eval.study.methods.corda import Corda
from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.task import Adapted, Batch, Task
from corda_vlm.options import Count, NotNegative

Loss = Callable[[nn.Module, Batch], Tensor]
ADAPTER = "default"
"""PEFT's name for the adapter."""


@dataclass(frozen=True)
class Lalora:
    """Options of LaLoRA."""

    rank: Count
    strength: NotNegative
    """λ."""
    curvature: Literal["diagonal", "kfac", "tridiagonal"] = "diagonal"
    """What is taken of Λ: its diagonal; or a Kronecker product for A and one for B of each layer; or those and one between them."""
    start: Literal["lora", "corda"] = "lora"
    """Where A and B start, and are held: as LoRA's, or as those of CorDA in KPM."""
    context: Sequence[str] = ()
    """Domains of the source sample, and of CorDA's covariances; by default all that is kept."""
    source_batches: Count = 2
    """How many batches of each domain the source sample has."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with ``λ/2 Σ_layers (θ − θ₀)ᵀ Λ (θ − θ₀)`` as penalty, θ = (A, B); 0 at the start, where outputs are unchanged.

        Raises:
            ValueError: If an option or a domain is unknown, λ negative, or the setting does not say what the contexts' loss is.

        Note:
            Λ is taken once, at θ₀. From LoRA's start, where B₀ = 0, the gradients of A vanish, and with them all of Λ but B's block: only B
            is held, and "kfac" and "tridiagonal" are the same.
            The sample's loss counts as its mean over tokens. λ multiplies the mean over samples, not their sum.
        """
        if self.start not in ("lora", "corda") or self.curvature not in ("diagonal", "kfac", "tridiagonal"):
            raise ValueError(
                f'LaLoRA got start={self.start!r} and curvature={self.curvature!r}; expected "lora" or "corda", and "diagonal", "kfac" or '
                '"tridiagonal".'
            )
        if self.strength < 0 or self.source_batches < 1:
            raise ValueError(
                f"LaLoRA got strength={self.strength} and source_batches={self.source_batches}; expected at least 0, and at least 1."
            )
        if task.kept_loss is None:
            raise ValueError(
                "LaLoRA needs a loss of the contexts that are to be kept, but this setting has none (Task.kept_loss is None); "
                "give it one, or leave LaLoRA out of this study."
            )
        domains = self.context or task.default_context("kpm")
        covariances = task.covariances(*domains)  # refuses unknown domains
        adapted = (
            Corda(self.rank, context=domains).adapt(task)
            if self.start == "corda"
            else Adapted(attach_variant(task, config_for(task, self.rank)))
        )
        source = [batch for domain in domains for batch in task.contexts[domain][: self.source_batches]]
        if self.curvature == "diagonal":
            curvatures: Mapping[str, Curvature] = diagonal_fisher(adapted.model, task.kept_loss, source)
        else:
            coupled = self.curvature == "tridiagonal"
            curvatures = kronecker_fisher(adapted.model, task.kept_loss, source, covariances, coupled=coupled)
        return Adapted(adapted.model, penalty=penalty_of(adapted.model, curvatures, self.strength))


class Curvature(Protocol):
    """Λ of one layer's A and B, in some approximation."""

    def quadratic(self, change_A: Tensor, change_B: Tensor) -> Tensor:
        """Return ``δᵀ Λ δ`` of changes δ = (r, n) and (m, r)."""
        ...


@dataclass(frozen=True)
class Diagonal:
    """Only Λ's diagonal."""

    of_A: Tensor
    """(r, n)."""
    of_B: Tensor
    """(m, r)."""

    def quadratic(self, change_A: Tensor, change_B: Tensor) -> Tensor:
        """Return ``Σ Λ_A δA² + Σ Λ_B δB²``."""
        return (self.of_A * change_A.square()).sum() + (self.of_B * change_B.square()).sum()


@dataclass(frozen=True)
class Kronecker:
    """``Λ_A = s² B₀ᵀ G B₀ ⊗ C``, ``Λ_B = s² G ⊗ A₀ C A₀ᵀ`` and, between them, ``s² B₀ᵀ G ⊗ C A₀ᵀ``, for A and B read by rows.

    G (m, m) is the mean over samples of ``Σ_t g_t g_tᵀ``, C (n, n) that over tokens of ``x xᵀ``. With the block between them
    ``δᵀ Λ δ = tr(G Δ C Δᵀ)``, where ``Δ = s (B₀ δA + δB A₀)`` is the change of W to first order.
    """

    gradients_A: Tensor
    """``s² B₀ᵀ G B₀`` (r, r)."""
    inputs_A: Tensor
    """C (n, n)."""
    gradients_B: Tensor
    """``s² G`` (m, m)."""
    inputs_B: Tensor
    """``A₀ C A₀ᵀ`` (r, r)."""
    between: tuple[Tensor, Tensor] | None
    """``s² B₀ᵀ G`` (r, m) and ``A₀ C`` (r, n); None leaves the block between A and B out."""

    def quadratic(self, change_A: Tensor, change_B: Tensor) -> Tensor:
        """Return ``δᵀ Λ δ``; only r rows or columns are ever multiplied by something as large as C or G."""
        value = (self.gradients_A @ change_A @ self.inputs_A * change_A).sum() + (
            self.gradients_B @ change_B @ self.inputs_B * change_B
        ).sum()
        if self.between is None:
            return value
        gradients, inputs = self.between
        return value + 2 * (gradients @ change_B @ inputs * change_A).sum()


def penalty_of(model: nn.Module, curvatures: Mapping[str, Curvature], strength: float) -> Callable[[], Tensor]:
    """Return what computes ``λ/2 Σ_layers δᵀ Λ δ``, δ how far A and B then are from where they are now."""
    held = [(curvatures[name], *adapter_weights(layer)) for name, layer in lora_layers(model).items()]
    starts = [(A.detach().clone(), B.detach().clone()) for _, A, B in held]

    def penalty() -> Tensor:
        each = [curvature.quadratic(A - A0, B - B0) for (curvature, A, B), (A0, B0) in zip(held, starts, strict=True)]
        return strength / 2 * torch.stack(each).sum()

    return penalty


def diagonal_fisher(model: nn.Module, loss: Loss, source: Sequence[Batch]) -> dict[str, Diagonal]:
    """Return the diagonal of Λ by layer: means over samples of squared gradients, a sample's tokens summed before they are squared."""
    layers = lora_layers(model)

    def squares(name: str, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        A, B = (weight.detach() for weight in adapter_weights(layers[name]))
        x, g = x.to(A.dtype), g.to(A.dtype) * layers[name].scaling[ADAPTER]
        of_A, of_B = torch.einsum("btr,btn->brn", g @ B, x), torch.einsum("btm,btr->bmr", g, x @ A.T)
        return of_A.square().sum(0), of_B.square().sum(0)

    return {name: Diagonal(*means) for name, means in means_over_samples(model, loss, source, squares).items()}


def kronecker_fisher(
    model: nn.Module, loss: Loss, source: Sequence[Batch], covariances: Mapping[str, Covariance], *, coupled: bool
) -> dict[str, Kronecker]:
    """Return Λ by layer as Kronecker products; gradients of different tokens count as independent.

    Note:
        C is the covariance that other methods take too, over all of the context; G is over the source sample.
    """
    layers, dense = lora_layers(model), {id(covariance): covariance.matrix for covariance in covariances.values()}

    def grams(name: str, x: Tensor, g: Tensor) -> tuple[Tensor]:
        g = g.flatten(0, 1).to(adapter_weights(layers[name])[0].dtype) * layers[name].scaling[ADAPTER]
        return (g.T @ g,)

    products = {}
    for name, (G,) in means_over_samples(model, loss, source, grams).items():
        A, B = (weight.detach() for weight in adapter_weights(layers[name]))
        C = dense[id(covariances[name])].to(A)  # layers with the same inputs share one
        products[name] = Kronecker(B.T @ G @ B, C, G, A @ C @ A.T, (B.T @ G, A @ C) if coupled else None)
    return products


def means_over_samples(
    model: nn.Module, loss: Loss, source: Sequence[Batch], statistic: Callable[[str, Tensor, Tensor], tuple[Tensor, ...]]
) -> dict[str, tuple[Tensor, ...]]:
    """Return by layer the mean over samples of what ``statistic(name, x, g)`` sums over those of a batch."""
    sums: dict[str, tuple[Tensor, ...]] = {}
    samples: dict[str, int] = {}
    for batch in source:
        for name, (x, g) in inputs_and_gradients(model, loss, batch).items():
            new = statistic(name, x, g)
            sums[name] = tuple(map(torch.add, sums[name], new)) if name in sums else new
            samples[name] = samples.get(name, 0) + len(x)
    return {name: tuple(total / samples[name] for total in totals) for name, totals in sums.items()}


def inputs_and_gradients(model: nn.Module, loss: Loss, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by layer x (b, t, n) and g (b, t, m) for the b samples of a batch, each of t tokens (1 where inputs are (b, n))."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        layer.register_forward_hook(lambda _, args, output, name=name: seen.setdefault(name, []).append((args[0].detach(), output)))
        for name, layer in lora_layers(model).items()
    ]
    try:
        with evaluating(model), torch.enable_grad():
            mean = loss(model, batch)
            flat = [(name, x, y) for name, calls in seen.items() for x, y in calls]
            gradients = torch.autograd.grad(mean, [y for _, _, y in flat], materialize_grads=True)
    finally:
        for handle in handles:
            handle.remove()
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (name, x, _), g in zip(flat, gradients, strict=True):
        # The loss is a mean over samples: times their number it is each one's own.
        parts.setdefault(name, []).append((_with_tokens(x), _with_tokens(g) * len(g)))
    return {name: (torch.cat([x for x, _ in calls], 1), torch.cat([g for _, g in calls], 1)) for name, calls in parts.items()}


def adapter_weights(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return what trains of a layer: A (r, n) and B (m, r)."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _with_tokens(tensor: Tensor) -> Tensor:
    """Return (b, d) as (b, 1, d), and (b, …, d) as (b, t, d)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])
