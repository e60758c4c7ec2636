"""Which layers can learn anything: one batch is run, and its output is followed back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from corda_core.linears import evaluating, expert_of, unwrapped

RESULTS = ("logits", "logits_per_image", "logits_per_text", "image_features", "text_features")
"""Outputs of transformers' models from which losses are computed; where there is none of them, all tensors count."""


@dataclass(frozen=True)
class Reach:
    """What became of each layer in one batch; all by full layer name, in the order they were given."""

    learnable: tuple[str, ...]
    """It ran, and the output depends on it differentiably."""

    unused: tuple[str, ...]
    """It ran, but what it computes does not reach the output, or not differentiably."""

    not_run: tuple[str, ...]


def probe(model: nn.Module, batch: Mapping[str, Any], names: Sequence[str]) -> Reach:
    """Return which layers would get a gradient from this batch, without computing one; experts all alike, with their module.

    Each layer adds a zero of its own to its output; then autograd's graph is followed from the results to the zeros it reaches.
    Nothing is kept for a backward pass, so this takes the memory and time of one forward pass.

    Args:
        model: The model, in any mode; left as it was.
        batch: Keyword arguments of the model's forward.
        names: Full layer names.

    Note:
        A layer is unused if it comes after the block whose output is read (LLaVA's ``vision_feature_layer``), in a head that is not, or
        under ``torch.no_grad()`` in the model's own code.
    """
    bare = unwrapped(model)
    experts = {name: expert_of(name) for name in names}
    modules = {name: name if expert is None else expert.module for name, expert in experts.items()}
    zeros: dict[str, Tensor] = {}

    def add_zero(name: str, output: Tensor) -> Tensor:
        if name not in zeros:
            zeros[name] = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        return output + zeros[name]

    handles = [
        bare.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: add_zero(name, output))
        for name in dict.fromkeys(modules.values())
    ]
    try:
        with evaluating(bare), torch.enable_grad(), saved_tensors_hooks(_forget, _forget):
            reached = _leaves(_results(bare(**batch)))
    finally:
        for handle in handles:
            handle.remove()
    learnable = {name for name, module in modules.items() if module in zeros and id(zeros[module]) in reached}
    ran = {name for name, module in modules.items() if module in zeros}
    return Reach(
        learnable=tuple(name for name in names if name in learnable),
        unused=tuple(name for name in names if name in ran - learnable),
        not_run=tuple(name for name in names if name not in ran),
    )


def _forget(_: Tensor | None) -> Any:
    """Keep nothing of what a backward pass would need."""
    return None


def _results(output: Any) -> list[Tensor]:
    """Return the tensors from which losses are computed."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        named = [output[key] for key in RESULTS if isinstance(output.get(key), Tensor)]
        return named or [tensor for value in output.values() for tensor in _results(value)]
    if isinstance(output, Iterable) and not isinstance(output, (str, bytes)):
        return [tensor for value in output for tensor in _results(value)]
    return []


def _leaves(results: Iterable[Tensor]) -> set[int]:
    """Return the ids of the leaf tensors that the results depend on."""
    leaves: set[int] = set()
    waiting = [result.grad_fn for result in results if result.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)  # only the nodes that accumulate a leaf's gradient have it
        if leaf is not None:
            leaves.add(id(leaf))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves
