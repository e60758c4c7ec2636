"""What an adapter relies on in its base beside the layers that it adapts: that it is all there, untouched, and still the same."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from corda_core.files import weight_digest
from corda_core.layers import in_threads, threads_for
from corda_core.linears import check_in_memory, gathered_whole, is_quantized, quantized_values, unwrapped, weight_matrix

UNREAD = "packed"
"""Stands for the values of a tensor that is packed in a way that is not known: it is not compared."""
ANCESTRY = "corda_ancestry"
"""Where a merged model records what it was merged from: an entry of its ``config.json``."""


@dataclass(frozen=True)
class Moved:
    """How far a layer has moved."""

    change: float = 0.0
    """``‖ΔW‖_F / ‖W‖_F``."""
    drift: float | None = 0.0
    """``‖ΔW C^(1/2)‖_F / ‖W C^(1/2)‖_F`` on the context that its adapter was made with; None where that is not known."""

    def plus(self, other: "Moved") -> "Moved":
        """Return a bound of how far one move after the other leads."""
        return Moved(self.change + other.change, None if self.drift is None or other.drift is None else self.drift + other.drift)


Step = dict[str, tuple[str, str, Moved]]
"""What one merge changed: of each layer the digests of its weight before and after, and how far it moved."""


def check_untouched(base: nn.Module) -> None:
    """Refuse a model whose own layers are not all there, or have been replaced by adapters'.

    Raises:
        ValueError: If weights are offloaded or were never loaded, or an earlier call left its adapters in the model.
    """
    carries = next((name for name, module in base.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))), None)
    if carries is not None:
        raise ValueError(
            f"The base carries an adapter already (at {carries}), which an earlier prepare, attach or load put into this very object: "
            "go on with the model that it returned, take the base back from that with `.unload()`, or load the base again."
        )
    check_in_memory(base.named_parameters())


def other_tensors(base: nn.Module, layers: Mapping[str, object], train_fully: Sequence[str] = ()) -> dict[str, str]:
    """Return type, shape and checksum of each tensor of the base but the weights of these layers and what trains whole, by name.

    Parameters, and the floating-point buffers that are saved with a model, under the names they have without adapters; what several modules
    share is there under each of its names. Sharded ones are gathered, one by one, by all processes.
    """
    inside = tuple(f"{name}." for name in train_fully)
    adapted = {f"{name}.weight" for name in layers}
    wanted = ((name, tensor) for name, tensor in _tensors(base) if name not in adapted and not name.startswith(inside))
    return dict(in_threads(_described, wanted, threads_for(base)))


def check_same(recorded: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse a base that has other tensors, or other values in them; floating types may be others.

    Raises:
        ValueError: If a tensor differs; the text names it.
    """
    name = next((name for name in {**recorded, **now} if not _equal(recorded.get(name), now.get(name))), None)
    if name is not None:
        change = _change(recorded.get(name), now.get(name))
        raise ValueError(
            f"The adapter's outputs depend on {name}, which {change} in this base: load it on the one that it was attached to, as "
            "save_pretrained wrote it (what is resized or made anew has other values each time); or train again with that module in "
            "train_fully, which is kept with the adapter."
        )


def check_unchanged(recorded: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to leave out of an adapter's file what has changed since it was attached; what has another type by now is not compared.

    Raises:
        ValueError: If a tensor has changed; the text names it.
    """
    both = [name for name in recorded if name in now and recorded[name].partition(" ")[0] == now[name].partition(" ")[0]]
    name = next((name for name in both if not _equal(recorded[name], now[name])), None)
    if name is not None:
        raise ValueError(
            f"{name} {_change(recorded[name], now[name])} since the adapter was attached, but is no part of its file: merge the adapter "
            "and save the whole model; or attach it anew with that module in train_fully."
        )


def checksum(tensor: Tensor) -> str:
    """Return Fletcher's checksum of the values, ``Σ bᵢ`` and ``Σ i bᵢ`` modulo 2^64, where bᵢ are the bits of value i.

    The same whatever floating type and device hold the values, and as fast as memory is; float64 alone has other bits.
    """
    flat, size = tensor.detach().reshape(-1), 1 << (16 if tensor.device.type == "cpu" else 24)  # what a core's cache holds
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), size):
        bits = _bits(flat[start : start + size])
        places = torch.arange(start + 1, start + 1 + len(bits), device=bits.device)
        sums += torch.stack([bits.sum(), (bits * places).sum()])
    return "".join(f"{value % (1 << 64):016x}" for value in sums.tolist())


def _bits(values: Tensor) -> Tensor:
    """Return each value's bits as an integer."""
    if values.dtype == torch.float64:
        return values.view(torch.int64)
    return (values.float().view(torch.int32) if values.is_floating_point() else values).long()


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor | None]]:
    """Yield the tensors of a base by name, seen through the adapters on it; None for one that cannot be read."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    own |= {
        key: buffer
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        if buffer.is_floating_point() and key not in module._non_persistent_buffers_set
    }
    for key, tensor in own.items():
        yield prefix + key, _values(module, key, tensor)
    for key, child in module._modules.items():  # named_children would leave out a second name of the same
        if child is not None:
            yield from _tensors(child, f"{prefix}{key}.")


def _values(module: nn.Module, key: str, tensor: Tensor) -> Tensor | None:
    """Return the values of a module's tensor; None where it is packed in a way that is not known."""
    if key == "weight" and is_quantized(module):
        try:
            return quantized_values(module, key)
        except ValueError:  # packed anew for inference
            return None
    whole = gathered_whole(tensor).detach()
    return whole if type(whole) is Tensor else None


def _described(named: tuple[str, Tensor | None]) -> tuple[str, str]:
    """Return a tensor's name, and its type, shape and checksum."""
    name, tensor = named
    if tensor is None:
        return name, UNREAD
    return name, f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {checksum(tensor)}"


def _equal(before: str | None, now: str | None) -> bool:
    """Return whether two tensors have the same shape and values, as far as they could be read; None stands for no tensor."""
    if before is None or now is None:
        return before is now
    return UNREAD in (before, now) or before.partition(" ")[2] == now.partition(" ")[2]


def _change(before: str | None, now: str | None) -> str:
    """Return in words how a tensor differs from what it was."""
    was, is_now = (text.rpartition(" ")[0] if text else "absent" for text in (before, now))
    return "has other values" if was == is_now else f"is {is_now} instead of {was}"


def base_digest(model: nn.Module, names: Iterable[str]) -> str:
    """Return the digest of the weights of the named layers, gathered one by one where they are sharded."""
    return digest_of(weight_digests(model, names))


def weight_digests(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the digest of each named layer's weight, several at a time wherever they lie.

    Nothing is remembered from one call to the next: a weight may change without a sign (``weight.data.copy_`` leaves ``_version`` alone).
    """
    names = sorted(names)
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        torch.cuda.synchronize(device)  # what is still being written, on whatever stream, is to be read by other threads
    # Several wait for their turn: on this machine, where they had to be gathered or dequantised.
    are_made = any(isinstance(p, DTensor) or type(p).__name__ in ("Params4bit", "Int8Params") for p in model.parameters())
    weights = ((name, weight_matrix(model, name)) for name in names)
    held = ({name: weight.cpu() if are_made else weight} for name, weight in weights)
    return dict(zip(names, in_threads(weight_digest, held, min(8, torch.get_num_threads())), strict=True))


def digest_of(digests: Mapping[str, str]) -> str:
    """Return the digest of several layers' weights from that of each."""
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


def ancestry_of(model: nn.Module) -> list[Step]:
    """Return the merges that led from its first ancestor to this model, in their order.

    Raises:
        ValueError: If what is recorded is of another form.
    """
    recorded = getattr(_holder(model), ANCESTRY, [])
    try:
        return [
            {
                name: (str(before), str(after), Moved(float(change), drift and float(drift)))
                for name, (before, after, change, drift) in step.items()
            }
            for step in recorded
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"The model's {ANCESTRY} is not as merge wrote it ({error!r}); remove it from its config.json.") from error


def set_ancestry_(model: nn.Module, recorded: Sequence[Mapping[str, Any]]) -> None:
    """Give a model the merges that led to it, as ``ancestry_as_json`` tells them."""
    setattr(_holder(model), ANCESTRY, list(recorded))


def ancestry_as_json(steps: Sequence[Step]) -> list[dict[str, list[Any]]]:
    """Return merges as JSON values, of each layer ``[digest before, digest after, change, drift]``."""
    return [{name: [before, after, moved.change, moved.drift] for name, (before, after, moved) in step.items()} for step in steps]


def moved_since(model: nn.Module, digest: str, weights: Mapping[str, str]) -> dict[str, Moved] | None:
    """Return how far layers have moved at most since their weights had this digest; None if the model and its ancestors never had it.

    What several merges did is added up; infinite where a layer was changed between or after them, which nothing has recorded. Empty if the
    model has these very weights.

    Args:
        model: The model.
        digest: As ``base_digest`` of these layers was.
        weights: As ``weight_digests`` of these layers is.
    """
    digests, moved = dict(weights), dict[str, Moved]()
    if digest_of(digests) == digest:
        return moved
    for step in reversed(ancestry_of(model)):
        for name in digests.keys() & step.keys():
            before, after, last = step[name]
            moved[name] = moved.get(name, Moved()).plus(last if digests[name] == after else Moved(math.inf, None))
            digests[name] = before
        if digest_of(digests) == digest:
            return moved
    return None


def _holder(model: nn.Module) -> Any:
    """Return what a model's ancestry is written to: its config, which transformers saves; without one the model itself."""
    model = unwrapped(model)
    config = getattr(model, "config", None)
    return config if isinstance(config, PretrainedConfig) else model
