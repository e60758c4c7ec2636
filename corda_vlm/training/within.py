"""How much of a trained change may be deployed: the largest part whose divergence from the base is within a budget."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from corda_core.export import interpolated
from corda_core.linears import base_of
from corda_core.lora import active_adapters, lora_layers, whole_modules
from corda_vlm.context import progress_bar
from corda_vlm.towers import has_two_towers
from corda_vlm.training.budget import check_budget, largest_alpha
from corda_vlm.training.divergence import context_kl
from corda_vlm.training.keep import Keep, reading

PAIRS = 64
"""Pairs among which the similarities of two towers are compared."""
SAMPLES = 8
"""Samples in one forward pass of other models; makes no difference to the divergence."""


def alpha_within(
    model: nn.Module, samples: Any, max_kl: float, *, processor: Any = None, adapter_name: str = "default"
) -> tuple[float, float]:
    """Return the largest alpha up to 1 for which ``KL(base ‖ base + alpha · change)`` on samples is within a budget, and that KL.

    For ``export(model, folder, alpha=alpha)`` and ``merge(model, alpha=alpha)``, which the model is measured as. It is left as it was.

    Args:
        model: With a trained adapter, and perhaps modules trained whole.
        samples: As ``images_texts`` of ``prepare``, with a length: what is to be kept, and was not trained on.
        max_kl: Nats a token (two towers: nats a pair, among 64); 0 gives alpha 0. It is used to a twentieth where the KL grows with alpha.
        processor: As in ``prepare``.
        adapter_name: Which adapter; it must be the only active one.

    Raises:
        ValueError: If there are no samples, the budget is no number of at least 0, the base is not there without its adapter, or other
            adapters are active than this one.
    """
    check_budget(max_kl, "max_kl")
    active = active_adapters(model)
    if active != [adapter_name]:
        raise ValueError(
            f"The active adapters are {active}, but {adapter_name!r} is to be measured, alone; call model.set_adapter({adapter_name!r}) "
            "first, outside of disable_adapter."
        )
    base = base_of(model)
    samples, collate, are_batches = reading(base, Keep(samples), processor)
    if not len(samples):
        raise ValueError("There are no samples to measure what is forgotten on; give some of what the model is to keep.")
    size = 1 if are_batches else PAIRS if has_two_towers(base) else SAMPLES
    starts = range(0, len(samples), size)

    def kl_at(alpha: float) -> float:
        with at_alpha(model, alpha, adapter_name):
            return context_kl(
                model,
                (
                    collate([samples[place] for place in range(start, min(start + size, len(samples)))])
                    for start in progress_bar(starts, f"KL at alpha {alpha:.3g}")
                ),
            )

    return largest_alpha(kl_at, max_kl)


@contextmanager
@torch.no_grad()
def at_alpha(model: nn.Module, alpha: float, adapter_name: str = "default") -> Iterator[None]:
    """Make the model compute ``base + alpha · change``, as ``export`` would write it; afterwards it is bit for bit as it was."""
    layers = lora_layers(model, adapter_name).values()
    scalings = [layer.scaling[adapter_name] for layer in layers]
    trained = [
        (value, value.clone(), part)
        for wrapper in whole_modules(model, adapter_name).values()
        for value, part in zip(
            wrapper.modules_to_save[adapter_name].state_dict().values(), interpolated(wrapper, alpha, adapter_name).values(), strict=True
        )
    ]
    try:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling[adapter_name] = alpha * scaling
        for value, _, part in trained:
            value.copy_(part)
        torch.clear_autocast_cache()
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling[adapter_name] = scaling
        for value, whole, _ in trained:
            value.copy_(whole)
        torch.clear_autocast_cache()
