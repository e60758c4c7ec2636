"""How far an adapter moves its layers' outputs on the context, and a bound that holds it there while it trains."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from corda_core.attach import find_attachment
from corda_core.covariance import Covariance, Symmetric
from corda_core.linears import base_of, gathered_whole, weight_matrix
from corda_core.lora import ExpertLora, Protect, change_factors, lora_layers, shrink_layer_
from corda_core.plan import AdapterInit


def context_drift(model: nn.Module, covariances: Mapping[str, Covariance], adapter_name: str = "default") -> dict[str, float]:
    """Return ``‖ΔW C^(1/2)‖_F / ‖W C^(1/2)‖_F`` per layer: the root mean square of ``ΔW x`` over that of ``W x`` on the context.

    Computed from the factors, ``‖B A C^(1/2)‖² = tr(BᵀB · A C Aᵀ)``. W is the weight the base layer holds now.

    Args:
        model: A model with a LoRA adapter, ours or PEFT's.
        covariances: Undamped C of the context, by full layer name.
        adapter_name: Which adapter.

    Raises:
        KeyError: If an adapted layer has no covariance.
    """
    drift = {}
    for name, layer in _known_layers(model, covariances, adapter_name).items():
        A, B = change_factors(layer, adapter_name)
        C, weight = covariances[name].packed, weight_matrix(base_of(model), name).float()
        changed = _trace(B.T @ B, A @ C.times(A.T.contiguous()))
        drift[name] = float(changed.clamp(min=0).sqrt() / C.energy(weight).sqrt())
    return drift


def _known_layers(model: nn.Module, covariances: Mapping[str, Covariance], adapter_name: str) -> dict[str, LoraLayer]:
    """Return the layers that carry the adapter, without experts that no context reached: they have none, and no change."""
    layers = lora_layers(model, adapter_name)
    return {
        name: layer
        for name, layer in layers.items()
        if name in covariances or not isinstance(layer, ExpertLora) or bool(layer.lora_A[adapter_name].weight.any())
    }


def weight_change(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """Return ``‖ΔW‖_F / ‖W‖_F`` per layer: the size of the change where there is no context; W as in ``context_drift``."""
    sizes = {}
    for name, layer in lora_layers(model, adapter_name).items():
        A, B = change_factors(layer, adapter_name)
        changed = _trace(B.T @ B, A @ A.T)
        sizes[name] = float(changed.clamp(min=0).sqrt() / weight_matrix(base_of(model), name).float().norm())
    return sizes


def _trace(left: Tensor, right: Tensor) -> Tensor:
    """Return ``tr(leftᵀ right)``."""
    return (left * right).sum()


class DriftBound:
    """Holds the drift of an adapter on the context at or below ε while it trains.

    It is d, the root mean square over the layers of ``d_l = ‖ΔW C^(1/2)‖_F / ‖W C^(1/2)‖_F``. Call ``hold_`` after each optimiser step:
    an adapter above ε is taken back towards its start by ε / d, all layers alike (each held to ε by itself, they forget more for what is
    learned). That depends on the weights alone: there is nothing to save, and nothing to restore when a training resumes.

    ``‖B A C^(1/2)‖² = tr(BᵀB · A C Aᵀ)``, and ``A C Aᵀ`` (r, r) costs next to nothing where the adapter's plan knows it:

    - ``protect="strict"``: A is frozen, and the plan holds ``A0 C A0ᵀ``.
    - ``protect="whitened"``: ``μ₀ Ã Ãᵀ`` for the damped C, so that d is a little too large.
    - ``protect="start"`` and plain LoRA: n² r products a layer and step, with the covariances given.

    Note:
        What trains whole beside the adapter is not held. Under DDP and FSDP2 all processes call, and do the same.
    """

    def __init__(
        self, model: nn.Module, max_drift: float, covariances: Mapping[str, Covariance] | None = None, adapter_name: str = "default"
    ) -> None:
        """Take what is to be held.

        Args:
            model: A model with a LoRA adapter, ours or PEFT's.
            max_drift: ε: how much of the root mean square of ``W x`` on the context that of ``ΔW x`` may be, in the mean over layers.
            covariances: Undamped C of the context, by full layer name; None takes what the adapter's plan knows of it.
            adapter_name: Which adapter.

        Raises:
            ValueError: If ε is not positive, a layer has no covariance, or there are none and the plan does not do.
        """
        if not 0 < max_drift < math.inf:
            raise ValueError(f"max_drift is {max_drift}; expected a finite number above 0, such as 0.02.")
        self.max_drift, self.adapter_name = max_drift, adapter_name
        gauges = _planned(model, adapter_name) if covariances is None else _collected(model, covariances, adapter_name)
        self._layers = [gauge.layer for gauge in gauges.values()]
        self._gauges = {name: gauge for name, gauge in gauges.items() if gauge.weight > 0}

    def hold_(self) -> float:
        """Take back what is above ε, and return d as it then is."""
        measured = self._measured()
        drift = math.sqrt(fmean(square / self._gauges[name].weight for name, (square, *_) in measured.items()))
        if not drift > self.max_drift:
            return drift
        alpha = self.max_drift / drift
        parts = [[part / self._gauges[name].weight for part in rest] for name, (_, *rest) in measured.items() if rest]
        if parts:
            p, pq, q = (sum(values) for values in zip(*parts, strict=True))
            alpha = _root(p, pq, q, alpha)
        with torch.no_grad():
            for layer in self._layers:
                shrink_layer_(layer, alpha, self.adapter_name)
        return self.max_drift

    def drift(self) -> float:
        """Return d."""
        return math.sqrt(fmean(drift**2 for drift in self.drifts().values()))

    def drifts(self) -> dict[str, float]:
        """Return d_l by layer; those whose W gives nothing on the context, so that they have none, are left out."""
        return {name: math.sqrt(square / self._gauges[name].weight) for name, (square, *_) in self._measured().items()}

    @torch.no_grad()
    def _measured(self) -> dict[str, list[float]]:
        """Return what each gauge measures, summed over processes that each have some rows of B."""
        measured: dict[str, list[float]] = {}
        for place, names in self._by_place().items():
            each = [self._gauges[name].measure() for name in names]
            total = torch.stack([values.to(each[0].device) for values in each])
            if place is not None:
                mesh, placements = place
                parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
                total = DTensor.from_local(total, mesh, parts).full_tensor()
            total[:, 0].clamp_(min=0)  # which rounding makes negative
            measured |= dict(zip(names, total.tolist(), strict=True))
        return measured

    def _by_place(self) -> dict[Any, list[str]]:
        """Return together the layers whose B the same processes share (FSDP2), by mesh and placements; under None those held whole."""
        places: dict[Any, list[str]] = {}
        for name, gauge in self._gauges.items():
            B = gauge.layer.lora_B[self.adapter_name].weight
            place = (B.device_mesh, B.placements) if isinstance(B, DTensor) and gauge.sums_own_rows else None
            places.setdefault(place, []).append(name)
        return places


@dataclass(frozen=True)
class _Gauge:
    """What measures the drift of one layer."""

    layer: LoraLayer
    measure: Callable[[], Tensor]
    """Gives ``‖ΔW C^(1/2)‖²``; where A is taken back with B (``protect="start"``), so that α leaves ``α P + α² Q`` of the change, also
    ``‖P‖², ⟨P, Q⟩, ‖Q‖²`` in C's norm."""
    weight: float
    """``‖W C^(1/2)‖²``."""
    sums_own_rows: bool
    """Whether ``measure`` takes only the rows of B that this process holds."""


def _planned(model: nn.Module, adapter_name: str) -> dict[str, _Gauge]:
    """Return what measures each layer, from what the adapter's plan knows of the context.

    Raises:
        ValueError: If it knows too little.
    """
    cure = 'give it the context\'s covariances, DriftBound(model, max_drift, covariances), or prepare with protect="strict"'
    attachment = find_attachment(model, adapter_name)
    if attachment is None:
        raise ValueError(f"max_drift needs to know the context, which the plain LoRA {adapter_name!r} does not; {cure}.")
    if attachment.protect in (Protect.START, Protect.NONE):
        raise ValueError(f'max_drift needs to know the whole context where A moves as in protect="start"; {cure}.')
    unknown = next((name for name, init in attachment.plan.layers.items() if init.energy is None), None)
    if unknown is not None:
        raise ValueError(f"max_drift needs a plan that knows what the context gives each layer, but that of {unknown} is older; {cure}.")
    layers = lora_layers(model, adapter_name)
    return {name: _planned_gauge(layers[name], init, adapter_name) for name, init in attachment.plan.layers.items()}


def _planned_gauge(layer: LoraLayer, init: AdapterInit, adapter_name: str) -> _Gauge:
    assert init.energy is not None, "checked before"
    rows, white = init.energy.rows.to(layer.lora_B[adapter_name].weight.device), init.whitening
    is_white = adapter_name in getattr(layer, "lora_Q", {})

    def measure() -> Tensor:
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        inner = rows
        if is_white and white is not None:
            A = gathered_whole(A).float()
            inner = white.unit**2 * A @ A.T
        own = (B.to_local() if isinstance(B, DTensor) else B).float() * layer.scaling[adapter_name]
        return _trace(own.T @ own, inner).reshape(1)

    return _Gauge(layer, measure, init.energy.weight, sums_own_rows=True)


def _collected(model: nn.Module, covariances: Mapping[str, Covariance], adapter_name: str) -> dict[str, _Gauge]:
    """Return what measures each layer, from covariances; layers that share one share it also where they are.

    Raises:
        ValueError: If a layer has none.
    """
    layers, places = _known_layers(model, covariances, adapter_name), dict[tuple[int, torch.device], Symmetric]()
    lacking = next((name for name in layers if name not in covariances), None)
    if lacking is not None:
        raise ValueError(f"max_drift has no covariance for {lacking}; give those of all adapted layers.")
    gauges = {}
    for name, layer in layers.items():
        C, device = covariances[name].packed, layer.lora_B[adapter_name].weight.device
        C = places.setdefault((id(C), device), C.to(device))
        gauges[name] = _collected_gauge(C, weight_matrix(base_of(model), name), layer, adapter_name)
    return gauges


def _collected_gauge(C: Symmetric, weight: Tensor, layer: LoraLayer, adapter_name: str) -> _Gauge:
    moves = adapter_name in getattr(layer, "lora_A0", {})

    def measure() -> Tensor:
        A, B = change_factors(layer, adapter_name)
        outer, inner = B.T @ B, A @ C.times(A.T.contiguous())
        whole = _trace(outer, inner)
        if not moves:
            return whole.reshape(1)
        r = len(inner) // 2  # of [A; δA] and [δB, B0]: Q = δB δA takes the first half of the one and the second of the other
        both, last = _trace(outer[:, :r], inner[:, r:]), _trace(outer[:r, :r], inner[r:, r:])
        return torch.stack([whole, whole - 2 * both + last, both - last, last])

    return _Gauge(layer, measure, float(C.energy(weight.float())), sums_own_rows=False)


def _root(p: float, pq: float, q: float, alpha: float) -> float:
    """Return the x in 0 … 1 for which ``‖x P + x² Q‖ = alpha ‖P + Q‖``, of ``‖P‖²``, ``⟨P, Q⟩`` and ``‖Q‖²``."""
    goal, low, high = alpha**2 * (p + 2 * pq + q), 0.0, 1.0
    for _ in range(60):
        x = (low + high) / 2
        low, high = (low, x) if x**2 * (p + 2 * x * pq + x**2 * q) > goal else (x, high)
    return low
