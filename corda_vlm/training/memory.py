"""What a recipe takes of a card's memory, by part, and whether it fits; from shapes alone."""

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from corda_core.layers import flops_per_second
from corda_core.linears import LINEAR_TYPES, expert_of, stacks_of
from corda_vlm.towers import family_of, has_two_towers
from corda_vlm.training.recipe import Recipe

PACKED_BITS = 4.127
"""Of a weight in 4 bits with its doubly quantised scales."""
LOGIT_BYTES = 12
"""Of one logit that a loss is taken of: in half precision and in float32, and their gradients."""
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")
"""Where configs say how many experts a token is routed to."""
USABLE = 0.93
"""The part of a card's memory that tensors can have: the rest is the driver's, and what the allocator cannot use."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a recipe takes at once, by part."""

    weights: int
    """Of the base, as it is loaded."""
    covariances: int
    """At once, half of each matrix."""
    decomposition: int
    """Of the largest layer, in float64."""
    context_activations: int
    """Of one batch of context, without gradients."""
    training: int
    """Adapters with their frozen start, gradients and AdamW's two moments, in float32."""
    activations: int
    """Of one micro-batch, as they wait for the backward pass, with its logits; 0 where they are not counted."""
    copies: int = 0
    """Of fused experts with their change, which PEFT makes in the forward pass, as they wait for the backward pass."""

    @property
    def while_preparing(self) -> int:
        """All while covariances are collected or decomposed, which come one after the other."""
        return self.weights + self.covariances + max(self.decomposition, self.context_activations)

    @property
    def while_training(self) -> int:
        """All while the adapter trains."""
        return self.weights + self.training + self.activations + self.copies

    def split_for(self, card: "Card") -> "Memory":
        """Return this where nobody set ``max_memory``: a GPU takes the covariances in parts of half of what the weights leave free."""
        return replace(self, covariances=min(self.covariances, max(0, card.memory - self.weights) // 2)) if card.is_gpu else self

    def lines(self) -> list[str]:
        """Return it in words."""
        preparing = f"covariances {size(self.covariances)}, then decomposition {size(self.decomposition)}"
        activations = f"activations about {size(self.activations)}" if self.activations else "activations not counted"
        copies = f", a copy of the experts {size(self.copies)}" if self.copies else ""
        training = f"adapters, gradients and optimiser {size(self.training)}{copies}, {activations}"
        return [
            f"memory: weights {size(self.weights)}",
            f"  while preparing: {preparing}; {size(self.while_preparing)} with the weights",
            f"  while training: {training}; {size(self.while_training)} with the weights",
        ]

    def verdict(self, card: "Card") -> str:
        """Return whether it fits the card, and what to change where it does not."""
        room, most = card.memory * USABLE, max(self.while_preparing, self.while_training)
        if most <= room:
            return f"it fits, {size(most)} of {size(card.memory)}"
        cures = []
        if self.while_preparing > room:
            cures.append(f"preparing takes {size(self.while_preparing)}: set corda.max_memory lower, or model.quantize: nf4")
        if self.while_training > room:
            cures.append(
                f"training takes {size(self.while_training)}: set training.gradient_checkpointing, a smaller training.micro_batch_size, or "
                "model.quantize: nf4"
            )
        return f"it does not fit {size(card.memory)}: {'; '.join(cures)}"


@dataclass(frozen=True)
class Card:
    """The device that will compute."""

    name: str
    memory: int
    """Bytes of it, of which other programs may have some."""
    half: float
    """FLOP/s of matrix products in bfloat16, measured now."""
    double: float
    """The same in float64, in which layers are decomposed."""
    is_gpu: bool = False
    """Whether it is one of CUDA's, whose memory covariances are split for."""

    @staticmethod
    def here() -> "Card":
        """Return this machine's GPU; where there is none its processor, whose memory is the machine's."""
        device = compute_device()
        if device.type == "cuda":
            about = torch.cuda.get_device_properties(device)
            name, memory = str(about.name), int(about.total_memory)
        else:
            kind = platform.processor() or platform.machine()
            name, memory = (f"the CPU ({kind})" if device.type == "cpu" else device.type.upper()), psutil.virtual_memory().total
        double = torch.device("cpu") if device.type == "mps" else device
        return Card(name, memory, flops_per_second(device, torch.bfloat16), flops_per_second(double, torch.float64), device.type == "cuda")

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.name}, {size(self.memory)}, bfloat16 {_speed(self.half)}, float64 {_speed(self.double)}"


def compute_device() -> torch.device:
    """Return the device that will compute."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if device is None else device


def memory_of(
    model: nn.Module,
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, int]],
    *,
    covariances: int,
    training: int,
    tokens: int,
    context_tokens: int,
) -> Memory:
    """Return what a recipe takes at once.

    Args:
        model: Without its weights.
        recipe: The recipe.
        shapes: m and n of each adapted layer.
        covariances: Their bytes at once.
        training: Bytes of adapters, gradients and moments.
        tokens: Of a training sample.
        context_tokens: Of a sample of context.

    Note:
        Activations are counted from linear layers: each keeps its input and its output for the backward pass, which stands for what lies
        between them too; with checkpointing each block keeps its input alone, and one block at a time the rest. Only parts of the model
        that train keep any; fused experts as many as a token is routed to. Those of models with two towers are not counted.
    """
    if has_two_towers(model):  # whose images and texts have other lengths than samples are counted with
        tokens = context_tokens = 0
    half = recipe.model.dtype != "float32" or recipe.training.bf16
    kept, blocks, hidden, vocabulary = _activation_sizes(model, shapes)
    width = 2 if half else 4
    inner = width * kept
    a_token = inner // blocks + width * blocks * hidden if recipe.training.gradient_checkpointing else inner
    micro = recipe.training.micro_batch_size or recipe.training.batch_size
    most = tokens * (a_token + LOGIT_BYTES * vocabulary)
    if recipe.keep is not None:  # its turn comes before or after; beside its own logits the base's
        most = max(most, context_tokens * (a_token + 3 * LOGIT_BYTES * vocabulary // 2))
    work = max((8 * (2 * m * n + 4 * min(m, n) ** 2) for m, n in shapes.values()), default=0) if covariances else 0
    return Memory(
        weights=_weight_bytes(model, recipe, shapes),
        covariances=covariances,
        decomposition=work,
        context_activations=recipe.corda.batch_size * context_tokens * (inner // blocks),
        training=training,
        activations=micro * most,
        copies=_copies_of_experts(shapes, recipe),
    )


def _copies_of_experts(shapes: Mapping[str, tuple[int, int]], recipe: Recipe) -> int:
    """Return the bytes of ``W + ΔW`` of all experts; with checkpointing of those of the largest module alone."""
    sizes = Counter[str]()
    for name, (m, n) in shapes.items():
        if expert := expert_of(name):
            sizes[expert.module] += m * n
    kept = max(sizes.values(), default=0) if recipe.training.gradient_checkpointing else sizes.total()
    return kept * int(getattr(torch, recipe.model.dtype).itemsize)


def _weight_bytes(model: nn.Module, recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return the bytes of the base as it is loaded; 4 bits are for linear layers but the output."""
    whole = getattr(torch, recipe.model.dtype).itemsize
    total = whole * sum(parameter.numel() for parameter in model.parameters())
    if recipe.model.quantize is None:
        return total
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = find()
    packed = [module.weight for module in model.modules() if isinstance(module, LINEAR_TYPES) and module is not output]
    return int(total - sum(weight.numel() for weight in packed) * (whole - PACKED_BITS / 8))


def _activation_sizes(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int, int, int]:
    """Return values that a token leaves in all blocks that gradients pass, how many blocks, their width, and logits a token."""
    family = family_of(model)
    parts = {family.part_of(name) for name in shapes}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    blocks, hidden = (int(getattr(text, key, None) or 1) for key in ("num_hidden_layers", "hidden_size"))
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = find()
    passed = [
        module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES) and module is not output and family.part_of(name) in parts
    ]
    vocabulary = 0 if output is None else int(getattr(text, "vocab_size", 0) or 0)
    routed = [
        getattr(module, key).shape[1:]
        for name, module in model.named_modules()
        if family.part_of(name) in parts
        for key in stacks_of(module)
    ]
    chosen = next((top for key in EXPERTS_OF_A_TOKEN if isinstance(top := getattr(text, key, None), int)), 1)
    return sum(sum(shape) for shape in passed) + chosen * sum(sum(shape) for shape in routed), blocks, hidden, vocabulary


def _speed(rate: float) -> str:
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.0f} GFLOP/s"


def size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
