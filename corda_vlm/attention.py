"""Fused attention, as open_clip has it, split into linear layers, which hooks and adapters can see, and fused again.

``nn.MultiheadAttention`` and open_clip's own ``Attention`` hold the projections of queries, keys and values as one parameter and call no
module for them. Split, each is an ``nn.Linear`` with the same numbers; fused again, the model has the parameters it had, by their names.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
READERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""torch's own blocks, which read the parameters of their attention by themselves."""


class SplitAttention(nn.Module):
    """Multi-head attention ``softmax(Q Kᵀ / √d) V`` whose projections are linear layers."""

    ln_q: nn.Module
    ln_k: nn.Module
    ln_inner: nn.Module
    out_drop: nn.Module

    def __init__(self, fused: Any) -> None:
        """Take over the weights of a fused module, which is kept to be restored."""
        super().__init__()
        self.fused = (fused,)  # in a tuple: its parameters are not to be found twice
        self.is_torch = isinstance(fused, nn.MultiheadAttention)
        self.num_heads, self.batch_first = fused.num_heads, getattr(fused, "batch_first", True)
        self.dropout = fused.dropout if self.is_torch else fused.attn_drop.p
        packed = fused.in_proj_weight
        weights = packed.chunk(3) if packed is not None else (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        biases = (None,) * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            setattr(self, name, _linear(weight, bias))
        self.out_proj = fused.out_proj
        for name in ("ln_q", "ln_k", "ln_inner", "out_drop"):
            setattr(self, name, getattr(fused, name, nn.Identity()))
        self.train(fused.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Return what the fused module returns: the outputs, and for ``nn.MultiheadAttention`` None in the place of the weights.

        Args:
            query: (batch, tokens, width), or (tokens, batch, width) without ``batch_first``.
            key: The same for keys; None takes the queries.
            value: The same for values; None takes the queries.
            attn_mask: As of ``nn.MultiheadAttention``: added to the logits, or True where attention is forbidden.
            need_weights: Not supported, as open_clip never asks for them.

        Raises:
            ValueError: If weights are asked for.
        """
        if need_weights:
            raise ValueError("Attention weights were asked for, which split attention does not return; fuse the model first.")
        inputs = (query, query if key is None else key, query if value is None else value)
        if not self.batch_first:
            inputs = tuple(x.transpose(0, 1) for x in inputs)  # type: ignore[assignment]
        q, k, v = (self._heads(getattr(self, name)(x)) for name, x in zip(PROJECTIONS, inputs, strict=True))
        if attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.reshape(len(q), self.num_heads, *attn_mask.shape[1:])
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask=attn_mask, dropout_p=dropout)
        output = self.out_drop(self.out_proj(self.ln_inner(mixed.transpose(1, 2).flatten(2))))
        output = output if self.batch_first else output.transpose(0, 1)
        return (output, None) if self.is_torch else output

    def fuse(self) -> nn.Module:
        """Return the fused module with the present weights."""
        fused: Any = self.fused[0]
        layers = [getattr(self, name) for name in PROJECTIONS]
        with torch.no_grad():
            if fused.in_proj_weight is not None:
                fused.in_proj_weight = _parameter(torch.cat([layer.weight for layer in layers]), layers[0].weight)
            else:
                for name, layer in zip(PROJECTIONS, layers, strict=True):
                    setattr(fused, f"{name}_weight", _parameter(layer.weight, layer.weight))
            if fused.in_proj_bias is not None:
                fused.in_proj_bias = _parameter(torch.cat([layer.bias for layer in layers]), layers[0].bias)
        fused.out_proj = self.out_proj
        return fused.train(self.training)

    def _heads(self, x: Tensor) -> Tensor:
        """Return x (batch, tokens, width) as (batch, heads, tokens, width / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def split_attention(model: nn.Module) -> int:
    """Replace each fused attention of an open_clip model by a split one, in place, and return how many there were.

    Outputs stay the same up to rounding. Attention that ``SplitAttention`` does not compute is left alone: biases of keys and values
    as extra tokens, cosine similarity, scaled heads.
    """
    return _replace(model, _can_split, SplitAttention)


def fuse_attention(model: nn.Module) -> int:
    """Replace each split attention in the model by the original fused one, with the present weights, and return how many.

    Raises:
        ValueError: If a projection still carries an adapter.
    """
    for name, module in model.named_modules():
        if isinstance(module, SplitAttention):
            for projection in PROJECTIONS:
                if not isinstance(getattr(module, projection), nn.Linear):
                    raise ValueError(f"{name}.{projection} still carries an adapter; merge or unload it before the attention is fused.")
    return _replace(model, lambda module: isinstance(module, SplitAttention), lambda module: module.fuse())


def _can_split(module: Any) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.bias_k is None and not module.add_zero_attn
    known = isinstance(getattr(module, "in_proj_weight", None), nn.Parameter) and isinstance(getattr(module, "out_proj", None), nn.Linear)
    return known and getattr(module, "logit_scale", None) is None and getattr(module, "head_scale", None) is None


def _replace(model: nn.Module, matches: Any, make: Any) -> int:
    matching = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent.named_children()
        if matches(child) and not isinstance(parent, READERS)
    ]
    for parent, key, child in matching:
        setattr(parent, key, make(child))
    return len(matching)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer that shares memory with the weight (m, n) and bias (m,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return layer


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """Return the value as a parameter that is trained if the other is."""
    return nn.Parameter(value.detach().clone(), like.requires_grad)
