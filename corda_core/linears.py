"""Linear layers: which are adapted, how their weights lie (Linear, Conv1D, bitsandbytes), are read and written; the base under wrappers."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from types import ModuleType
from typing import Any

import torch
from accelerate.utils.other import is_compiled_module
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)
PLAIN_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCK = 64
"""Weights that share one scale in bitsandbytes."""


FUSED = "experts"
"""Must stand in a pattern for layers that shall match fused experts: they take much memory, and are not adapted by the way."""
Patterns = str | Sequence[str | re.Pattern[str]]
"""A regular expression for whole names; or, in a sequence, name endings and compiled regular expressions."""


class FourBit(StrEnum):
    """bitsandbytes' types of 4 bits."""

    NF4 = "nf4"
    FP4 = "fp4"


@dataclass(frozen=True)
class Expert:
    """One expert's matrix in a parameter that holds those of all: a layer like others, called ``mlp.experts.gate_up_proj[3]``."""

    module: str
    parameter: str
    index: int

    @property
    def stack(self) -> str:
        """The full name of the parameter."""
        return f"{self.module}.{self.parameter}"


def expert_of(name: str) -> Expert | None:
    """Return which expert's matrix a layer is; None if it is a module."""
    match = re.fullmatch(r"(.+)\.(\w+)\[(\d+)\]", name)
    return Expert(match[1], match[2], int(match[3])) if match else None


def stacks_of(module: Any) -> tuple[str, ...]:
    """Return the names of the parameters in which transformers fuses the matrices of experts, what reads the tokens first; often none."""
    if not hasattr(module, "_is_expert_parallel"):  # as its ``use_experts_implementation`` leaves experts
        return ()
    keys = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    stacks = [getattr(module, key, None) for key in keys]
    return keys if all(isinstance(stack, Tensor) and stack.ndim == 3 and stack.dtype in PLAIN_TYPES for stack in stacks) else ()


def experts_at(model: nn.Module, name: str) -> Any:
    """Return the module of fused experts of this name, seen through PEFT's layers on it."""
    module = unwrapped(model).get_submodule(name)
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def select_linears(model: nn.Module, targets: Patterns | None = None, exclude: Patterns | None = None) -> tuple[str, ...]:
    """Return the full names of the linear layers to adapt, in the order of ``model.named_modules()``.

    Experts that transformers holds fused, as a 3-D parameter, are linear layers too: ``mlp.experts.gate_up_proj[3]``. They match by the
    parameter's name, all of them; as targets only by a pattern in which ``experts`` stands.

    Args:
        model: Any module tree.
        targets: As in PEFT: a string is a regular expression for the whole name, a sequence holds names or name endings
            ("q_proj", "layers.0.mlp.up_proj", "experts.down_proj"), or compiled regular expressions for the whole name. None takes every
            linear layer except the output embedding (``lm_head``) and fused experts.
        exclude: Layers to leave out, in the same two forms.

    Raises:
        ValueError: If a pattern matches no linear layer; the text names the closest ones.
    """
    model = unwrapped(model)
    layers = _layers(model)
    if targets is None:
        find_output: Any = getattr(model, "get_output_embeddings", lambda: None)
        output = find_output()
        chosen = [name for name, fused in layers.items() if not fused and (output is None or model.get_submodule(name) is not output)]
    else:
        chosen = _matching(layers, targets, "targets")
    left_out = set(_matching(layers, exclude, "exclude")) if exclude else set()
    chosen = [layer for name in chosen if name not in left_out for layer in layers[name] or (name,)]
    if not chosen:
        packed = [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if hasattr(module, "qweight")]
        if packed:
            raise ValueError(
                f"The linear layers hold packed weights that cannot be decomposed, such as {packed[0]}; "
                "prepare the adapter on the unquantised model."
            )
        raise ValueError(
            f"No linear layer is left to adapt: targets={targets!r}, exclude={exclude!r}, {len(layers)} linear layers in the model."
        )
    return tuple(chosen)


def check_pattern(pattern: str, option: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        ValueError: If it is broken; the text names the option.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{option} is {pattern!r}, which is no regular expression ({error}); mend it, or give names of layers in a list."
        ) from error


def _layers(model: nn.Module) -> dict[str, list[str]]:
    """Return what patterns may match: linear layers, without members, and parameters of fused experts, with the experts as members."""
    layers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LINEAR_TYPES):
            layers[name] = []
        for key in stacks_of(module):
            layers[f"{name}.{key}"] = [f"{name}.{key}[{index}]" for index in range(len(getattr(module, key)))]
    return layers


def _matching(layers: Mapping[str, list[str]], patterns: Patterns, option: str) -> list[str]:
    """Return what patterns match, each by itself."""
    if isinstance(patterns, str):
        check_pattern(patterns, option)
        patterns = [re.compile(patterns)]
    matched: set[str] = set()
    for pattern in patterns:
        text = pattern if isinstance(pattern, str) else pattern.pattern
        known = [name for name, fused in layers.items() if not fused or option == "exclude" or FUSED in text]
        hits = {name for name in known if (f".{name}".endswith(f".{text}") if isinstance(pattern, str) else pattern.fullmatch(name))}
        if not hits:
            raise ValueError(
                f"{option}: {text!r} matches no linear layer; closest: {_closest(known, text)}. "
                "A string is a regular expression for the whole name, a list holds name endings."
            )
        matched |= hits
    return [name for name in layers if name in matched]


def _closest(names: list[str], pattern: str) -> str:
    endings = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    near = get_close_matches(pattern.rsplit(".", 1)[-1], endings, n=3, cutoff=0.4) or list(endings)[:3]
    return ", ".join(near) if near else "none (the model has no linear layers)"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself where it is compiled, or wrapped for several devices (DDP, DataParallel)."""
    while (compiled := is_compiled_module(model)) or isinstance(model, (DistributedDataParallel, DataParallel)):
        inner: nn.Module = model._orig_mod if compiled else model.module  # type: ignore[assignment]
        model = inner
    return model


def base_of(model: nn.Module) -> Any:
    """Return the model that PEFT has put adapters into, or the model itself."""
    model = unwrapped(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def weight_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """Return m (outputs) and n (inputs) of a linear layer.

    Raises:
        ValueError: As ``weight_matrix``.
    """
    if expert_of(name) is not None:
        m, n = _expert_matrix(model, name).shape
        return m, n
    layer = _linear(model, name)
    if is_quantized(layer):
        return layer.out_features, layer.in_features
    m, n = _oriented(layer, name).shape
    return m, n


def weight_matrix(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a linear layer as W (m, n): m outputs, n inputs, whatever way it is stored.

    The tensor shares memory with the layer, except where the layer is sharded (FSDP2): then it is gathered, by all processes at once; or
    quantised by bitsandbytes: then it is a dequantised copy.

    Raises:
        ValueError: If the layer is not a linear one, or its weight is not in memory or packed in a way that is not known.
    """
    if expert_of(name) is not None:
        matrix = _expert_matrix(model, name)
        check_in_memory([(name, matrix)])
        return gathered_whole(matrix)
    layer = _linear(model, name)
    check_in_memory([(f"{name}.weight", layer.weight)])
    if is_quantized(layer):
        return quantized_values(layer, name)
    return gathered_whole(_oriented(layer, name))


def check_in_memory(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors without values.

    Raises:
        ValueError: If one is offloaded or was never loaded.
    """
    absent = next((name for name, tensor in named if tensor.is_meta), None)
    if absent is not None:
        raise ValueError(
            f"{absent} holds no values here (device meta): weights that are offloaded or not loaded cannot be decomposed; load the whole "
            "model into memory, with no device_map that offloads."
        )


def check_present(model: nn.Module, names: Iterable[str], what: str) -> None:
    """Refuse a model that lacks a layer; ``what`` was made for these layers.

    Raises:
        ValueError: If a layer is missing.
    """
    modules = dict(unwrapped(model).named_modules())
    parts = {name: expert_of(name) for name in names}
    absent = [name for name, expert in parts.items() if (name if expert is None else expert.module) not in modules]
    if absent:
        raise ValueError(f"{what} was made for another model: this one has no layer {absent[0]}; use the base that it was made from.")


def is_shared(model: nn.Module, weight: Tensor) -> bool:
    """Return whether this parameter has several names: a tied output layer has the embedding's, and a module may stand in two places."""
    return sum(_is_same(other, weight) for _, other in model.named_parameters(remove_duplicate=False)) > 1


def hold_statistics_(model: nn.Module) -> None:
    """Keep batch statistics of which nothing trains as they are: a training step would change the base by them, in no adapter's file."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether writing into one tensor changes the other."""
    plain = not (isinstance(tensor, DTensor) or isinstance(other, DTensor) or tensor.is_meta)
    return tensor is other or (plain and tensor.numel() > 0 and tensor.data_ptr() == other.data_ptr())


def write_weight_(model: nn.Module, name: str, weight: Tensor) -> None:
    """Give a linear layer this weight (m, n), and leave all else in the model as it is, also what shares the weight or the very layer.

    A layer that bitsandbytes quantised becomes a plain one.
    """
    if expert_of(name) is not None:
        _expert_matrix(model, name).copy_(weight)
        return
    parent, _, key = name.rpartition(".")
    holder: Any = model.get_submodule(parent)
    if isinstance(getattr(holder, key), LoraLayer):
        holder, key = getattr(holder, key), "base_layer"
    layer = getattr(holder, key)
    if is_quantized(layer):
        setattr(holder, key, plain_linear(layer, weight))
        return
    if is_shared(model, layer.weight):
        layer = copy.deepcopy(layer)
        setattr(holder, key, layer)
    layer.weight.data.copy_(weight.T if isinstance(layer, Conv1D) else weight)


def gathered_whole(tensor: Tensor) -> Tensor:
    """Return the tensor; where it is sharded (FSDP2), gathered by all processes at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _expert_matrix(model: nn.Module, name: str) -> Tensor:
    """Return an expert's matrix (m, n) where it lies."""
    expert = expert_of(name)
    assert expert is not None, "asked before"
    module = experts_at(model, expert.module)
    if expert.parameter not in stacks_of(module) or expert.index >= len(getattr(module, expert.parameter)):
        raise ValueError(f"{name} is no expert of this model's ({type(module).__name__}); use the base that it was made from.")
    matrix: Tensor = getattr(module, expert.parameter).detach()[expert.index]
    return matrix.T if module.is_transposed else matrix


def _linear(model: nn.Module, name: str) -> Any:
    layer = unwrapped(model).get_submodule(name)
    layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if not isinstance(layer, LINEAR_TYPES):
        raise ValueError(f"{name} is a {type(layer).__name__}; expected nn.Linear or transformers' Conv1D: leave it out with `exclude`.")
    return layer


def _oriented(layer: Any, name: str) -> Tensor:
    weight: Tensor = layer.weight.detach()
    if weight.dtype not in PLAIN_TYPES or weight.ndim != 2 or type(layer.weight).__module__.startswith("torchao"):
        raise ValueError(
            f"{name} holds a packed weight ({type(layer.weight).__name__}, {weight.dtype}, shape {tuple(weight.shape)}); expected a "
            "floating-point matrix, or one quantised by bitsandbytes: prepare the adapter on the unquantised model."
        )
    return weight.T if isinstance(layer, Conv1D) else weight


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and in evaluation mode; afterwards each module is in the mode it was in."""
    # Tensors of inference mode do not say when they are overwritten.
    with in_mode(model, training=False), torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run in training or in evaluation mode; afterwards each module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    for module in modes:
        if type(module).__name__ == "Linear4bit":
            module.training = True  # in evaluation mode bitsandbytes packs weights on CPUs anew: no gradient passes them then
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
