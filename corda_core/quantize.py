"""Linear layers whose weights bitsandbytes holds in 4 or 8 bits: made, recognised, read, and made plain again."""

from collections.abc import Iterable
from enum import StrEnum
from types import ModuleType
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn


class FourBit(StrEnum):
    """bitsandbytes' types of 4 bits."""

    NF4 = "nf4"
    FP4 = "fp4"


BLOCK = 64
"""Weights that share one scale in bitsandbytes."""


def quantize_linears_(model: nn.Module, names: Iterable[str], kind: FourBit | str = FourBit.NF4) -> None:
    """Replace the named linear layers by bitsandbytes' layers of 4 bits with doubly quantised scales, as in QLoRA.

    Args:
        model: Changed in place; layers that are not named stay.
        names: Full names of ``nn.Linear`` layers in float32, bfloat16 or float16.
        kind: "nf4" or "fp4".

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed.
        ValueError: If a layer cannot be held in 4 bits; nothing has changed then.
    """
    bnb = bitsandbytes()
    names = list(names)
    check_quantizable(model, names)
    for name in names:
        layer: Any = model.get_submodule(name)
        weight, bias = layer.weight.data, layer.bias
        packed = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias is not None, compute_dtype=weight.dtype, quant_type=kind, device="meta"
        )
        packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=True, module=packed)
        packed.bias = bias
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, packed.to(weight.device).train(layer.training))


def check_quantizable(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers that ``quantize_linears_`` cannot take.

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed.
        ValueError: If a layer is of another kind, or its rows are no whole blocks.
    """
    bitsandbytes()
    for name in names:
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layer).__name__}, which cannot be quantised here; leave it out with `exclude`.")
        if layer.in_features % BLOCK:
            raise ValueError(
                f"{name} has {layer.in_features} inputs; to be quantised it needs a multiple of {BLOCK}: leave it out with `exclude`."
            )


def bitsandbytes() -> ModuleType:
    """Return the package.

    Raises:
        ModuleNotFoundError: If it is not installed; the text names the extra.
    """
    # Imported here: it belongs to the extra `quantized`.
    try:
        import bitsandbytes as package
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Quantising needs bitsandbytes, which is not installed; run: pip install 'corda-vlm[quantized]'"
        ) from error
    return package


def is_quantized(layer: Any) -> bool:
    """Return whether bitsandbytes holds the layer's weight in 4 or 8 bits."""
    kind, weight = type(layer.weight).__name__, layer.weight
    return (kind == "Params4bit" and weight.quant_state is not None) or (kind == "Int8Params" and weight.dtype == torch.int8)


def plain_linear(layer: Any, weight: Tensor) -> nn.Linear:
    """Return a plain layer with this weight, of the type that the quantised layer computes in."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    dtype = getattr(layer, "compute_dtype", None) or weight.dtype if layer.bias is None else layer.bias.dtype
    plain.weight, plain.bias = nn.Parameter(weight.to(dtype), requires_grad=False), layer.bias
    return plain.train(layer.training)


def quantized_values(layer: Any, name: str) -> Tensor:
    """Return the weight (m, n) of a layer of bitsandbytes in floating point; the layer stays as it is."""
    if layer.weight.dtype != torch.int8:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name}: bitsandbytes has packed this weight anew for inference on the CPU, after which no gradient passes it; "
                "load the model again and prepare it before it is run in evaluation mode."
            )
        return dequantize_bnb_weight(layer.weight).detach()
    # Not by PEFT, which on CPUs leaves the layer without its scales. The first forward pass moves them from the weight to the state.
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.detach().float() * (scales.to(layer.weight.device).float() / 127)[:, None]
