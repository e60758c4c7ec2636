"""What was trained, for others: an ordinary LoRA for the untouched base, or a plain model; whole, in part, or compressed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper
from torch import Tensor, nn

from corda_core.attach import attachment_of, check_base_kept
from corda_core.bases import Moved, Step, ancestry_as_json, ancestry_of, set_ancestry_, weight_digests
from corda_core.drift import DriftBound, weight_change
from corda_core.files import check_finite, json_digest, read_json, read_tensors, replacing_in, weight_digest, write_tensors
from corda_core.layers import process_rank
from corda_core.linears import (
    LINEAR_TYPES,
    base_of,
    expert_of,
    gathered_whole,
    is_quantized,
    plain_linear,
    unwrapped,
    weight_matrix,
    write_weight_,
)
from corda_core.lora import (
    ContextLora,
    by_stack,
    change_factors,
    lora_config,
    lora_layers,
    peft_layers,
    saved_names,
    stacked,
    whole_modules,
)
from corda_core.store import ATTACHMENT, WEIGHTS


@dataclass(frozen=True)
class Exported:
    """What ``export`` wrote."""

    folder: Path
    rank: int
    """The largest of all layers: what servers must allow (vLLM: ``--max-lora-rank``)."""

    lost: Mapping[str, float]
    """``‖ΔW − ΔW_r‖_F / ‖ΔW‖_F`` by layer; 0 where nothing was compressed."""

    @property
    def mean_lost(self) -> float:
        """Its mean over the layers."""
        return sum(self.lost.values()) / len(self.lost)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    alpha: float = 1.0,
    compress: int | None = None,
    adapter_name: str = "default",
) -> Exported:
    """Write the change as an ordinary LoRA for the untouched base.

    ``[A; A − A0]``, ``[B − B0, B0]``: rank 2r for ``protect="start"``, r for "strict". The scaling is folded into B, so LoRA's alpha equals
    the rank in every layer and each consumer reads the same function, also those that ignore patterns. Files are replaced one by one,
    whole or not at all. Of a quantised residual (Q-CorDA) the change is against the unquantised base.

    Args:
        model: With the adapter; under ``torch.distributed`` all processes call, the first one writes.
        path: The folder.
        alpha: How much of the change, from 0 (the base) to 1 (as trained): ``W + alpha ΔW``, the interpolation of WiSE-FT.
        compress: The rank of the best approximation of each ``ΔW`` (Eckart-Young) that is written instead; what it loses is returned.
        adapter_name: Which adapter.

    Raises:
        ValueError: If the model carries no adapter of this name, an option or the trained weights are not right, or something of the base
            has changed that is not written.
    """
    if (Path(path) / ATTACHMENT).exists():
        raise ValueError(f"{path} holds an adapter in training, which the export would destroy; name another folder.")
    changes = _changes(model, alpha, adapter_name)
    check_base_kept(model, adapter_name)
    if compress is not None and compress < 1:
        raise ValueError(f"compress is {compress}; expected a rank of at least 1, or None.")
    lost = dict.fromkeys(changes, 0.0)
    if compress is not None:
        for name, (A, B) in changes.items():
            A, B, lost[name] = compressed(A, B, compress)
            changes[name] = A, B
    ranks = {name: len(A) for name, (A, _) in changes.items()}
    tensors, held = {}, _as_held(model, changes, adapter_name)
    saved = saved_names(base_of(model), held)
    for name, (A, B) in held.items():
        for side, factor in (("A", A), ("B", B)):
            tensors[f"base_model.model.{saved.get(name, name)}.lora_{side}.weight"] = factor.cpu().contiguous()
    whole = whole_modules(model, adapter_name)
    for name, wrapper in whole.items():
        for key, value in interpolated(wrapper, alpha, adapter_name).items():
            tensors[f"base_model.model.{name}.{key}"] = value.cpu().contiguous()
    peft_model: Any = unwrapped(model)
    trained = peft_model.peft_config[adapter_name]
    config = lora_config(base_of(model), ranks, max(ranks.values()), scaling=1.0)
    config.base_model_name_or_path = trained.base_model_name_or_path
    config.task_type = trained.task_type
    config.fan_in_fan_out = trained.fan_in_fan_out
    config.modules_to_save = list(whole) or None
    config.inference_mode = True
    folder = Path(path)
    if process_rank() == 0:
        with replacing_in(folder) as fresh:  # weights before the config, which names what is whole
            config.save_pretrained(fresh)
            write_tensors(tensors, fresh / WEIGHTS, {"format": "pt", CONFIG_NAME: _config_digest(fresh / CONFIG_NAME)})
    return Exported(folder, max(ranks.values()), lost)


def check_lora(folder: Path) -> None:
    """Check the files of an ordinary LoRA: whole, finite, and, where ``export`` wrote them, as it did.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged.
    """
    again = "export the adapter again"
    tensors, metadata = read_tensors(folder / WEIGHTS, again)
    check_finite(tensors, folder / WEIGHTS, again)
    digest = _config_digest(folder / CONFIG_NAME)
    if metadata.get(CONFIG_NAME, digest) != digest:
        raise ValueError(f"{folder / CONFIG_NAME} is not that which {WEIGHTS} was exported with; {again}.")


def _config_digest(path: Path) -> str:
    """Return a digest of what a LoRA's config says but for where its base is, which may move."""
    values = read_json(path, "export the adapter again")
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a config of a LoRA; export the adapter again.")
    return json_digest({key: value for key, value in values.items() if key not in ("base_model_name_or_path", "revision")})


def merge(model: PeftModel, *, alpha: float = 1.0, adapter_name: str = "default") -> nn.Module:
    """Return the base model with the change added to its weights, without PEFT; its ``state_dict`` has the keys it always had.

    Layers that bitsandbytes quantised become plain ones, dequantised: 4 bits would round most of the change away. The model records what
    it was merged from, in its config if it is one of transformers: files of covariances of its ancestors are then taken.

    Args:
        model: With the adapter, its weights whole; its base is changed in place and returned.
        alpha: How much of the change, as in ``export``.
        adapter_name: Which adapter; others are dropped.

    Raises:
        ValueError: If the model carries no adapter of this name, or an option or the trained weights are not right; nothing has
            changed then.
    """
    changes = _changes(model, alpha, adapter_name)
    layers, base = lora_layers(model, adapter_name), base_of(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{merged[0]} has its change in its weight already (merge_adapter); call unmerge_adapter first.")
    starts, moves = _starts(model, adapter_name), _moves(model, alpha, adapter_name)
    for name, (A, B) in changes.items():
        weight = weight_matrix(base, name).float() + B @ A
        if name in starts:  # "subtract": the base lacks what the change starts from
            weight += starts[name].to(weight)
        write_weight_(base, name, weight)
    for wrapper in whole_modules(model, adapter_name).values():
        own = wrapper.modules_to_save[adapter_name]  # a copy, written freely: other modules may have parts of the original
        places = own.state_dict(keep_vars=True)
        for key, value in interpolated(wrapper, alpha, adapter_name).items():
            places[key].data = value
        wrapper.original_module = own.requires_grad_(False)
        for name in wrapper.modules_to_save:  # which one PEFT keeps is its affair
            wrapper.modules_to_save[name] = own
    plain: nn.Module = model.unload()
    _dequantize_rest_(plain)
    _untie_configs(plain)
    after = weight_digests(plain, moves)
    step: Step = {name: (before, after[name], moved) for name, (before, moved) in moves.items()}
    set_ancestry_(plain, ancestry_as_json([*ancestry_of(plain), step]))
    return plain


def compressed(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return factors (A, B) of the best approximation of ``B A`` of this rank, balanced, and ``‖BA − (BA)_r‖_F / ‖BA‖_F``.

    Args:
        A: (r', n).
        B: (m, r').
        rank: r; nothing is lost where r' is no larger.
    """
    if rank >= len(A):
        return A, B, 0.0
    row_basis, row = torch.linalg.qr(A.T.double())  # of the large sides only their bases: the SVD is r' × r'
    column_basis, column = torch.linalg.qr(B.double())
    U, sigma, Vt = torch.linalg.svd(column @ row.T)
    root = sigma[:rank].sqrt()
    kept_A, kept_B = root[:, None] * (Vt[:rank] @ row_basis.T), column_basis @ U[:, :rank] * root
    whole = float(sigma.norm())
    return kept_A.to(A), kept_B.to(B), float(sigma[rank:].norm()) / whole if whole else 0.0


def _changes(model: nn.Module, alpha: float, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``alpha ΔW`` by layer as factors.

    Raises:
        ValueError: If there is none, it is not finite, or it is not of a kind that two factors hold.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a number from 0 (the base) to 1 (as trained).")
    layers = lora_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"The model carries no LoRA adapter named {adapter_name!r}; there is nothing to export.")
    changes = {}
    for name, layer in layers.items():
        if not isinstance(layer.lora_variant.get(adapter_name, ContextLora()), ContextLora):
            kind = type(layer.lora_variant[adapter_name]).__name__
            raise ValueError(f"{name} has an adapter of PEFT's kind {kind}, which is no product of two factors; use merge_and_unload().")
        if layer.lora_bias.get(adapter_name):
            raise ValueError(f"{name} has a bias beside its factors (lora_bias), which is no product of two; use merge_and_unload().")
        A, B = change_factors(layer, adapter_name)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(f"{name}: the trained weights are not finite; take an earlier checkpoint.")
        changes[name] = A, alpha * B
    return changes


def _as_held(model: nn.Module, changes: Mapping[str, tuple[Tensor, Tensor]], adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return factors by layer as PEFT holds them, by its own modules."""
    held = {name: factors for name, factors in changes.items() if expert_of(name) is None}
    layers = peft_layers(model, adapter_name)
    for stack, factors in by_stack(changes).items():
        place, layer = layers[stack]
        held[place] = stacked(factors, layer.num_experts)
    return held


def _moves(model: nn.Module, alpha: float, adapter_name: str) -> dict[str, tuple[str, Moved]]:
    """Return of each layer that merging is about to change the digest of its weight, and how far it will move."""
    layers, base = lora_layers(model, adapter_name), base_of(model)
    try:  # the base's own weights, whatever ``attach`` has made of them since
        digests = attachment_of(model, adapter_name).plan.provenance["weights"]
    except (KeyError, ValueError):  # of an earlier version, or a plain LoRA
        digests = weight_digests(base, layers)
    try:
        drift = DriftBound(model, 1.0, adapter_name=adapter_name).drifts()
    except ValueError:  # the plan does not know
        drift = {}
    moves = {
        name: (digests[name], Moved(alpha * change, alpha * drift[name] if name in drift else None))
        for name, change in weight_change(model, adapter_name).items()
        if name in digests  # not of experts that no context reached: they never move
    }
    for prefix, wrapper in whole_modules(model, adapter_name).items():
        before, trained = wrapper.original_module, wrapper.modules_to_save[adapter_name]
        for key, module in before.named_modules():
            if isinstance(module, LINEAR_TYPES):
                name, W = f"{prefix}.{key}".rstrip("."), weight_matrix(before, key).float()
                change = alpha * float((weight_matrix(trained, key).float() - W).norm() / W.norm())
                moves[name] = (weight_digest({name: weight_matrix(before, key)}), Moved(change, None))
    return moves


def _starts(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return ``B0 A0`` of each layer whose base lacks it."""
    try:
        attachment = attachment_of(model, adapter_name)
    except ValueError:  # a plain LoRA
        return {}
    if attachment.residual != "subtract":
        return {}
    return {name: init.B0 @ init.A0 for name, init in attachment.plan.layers.items()}


def interpolated(wrapper: ModulesToSaveWrapper, alpha: float, adapter_name: str) -> dict[str, Tensor]:
    """Return a module's state, ``(1 − alpha) · base + alpha · trained``, in the order of its own."""
    base = wrapper.original_module.state_dict()
    trained = wrapper.modules_to_save[adapter_name].state_dict()
    return {
        key: torch.lerp(before.to(value), value, alpha).to(before.dtype) if value.is_floating_point() else value
        for key, before, value in ((key, gathered_whole(base[key]), gathered_whole(value)) for key, value in trained.items())
    }


def _dequantize_rest_(model: Any) -> None:
    """Make plain layers of what is still quantised, and take that out of a transformers model's config."""
    plain: dict[nn.Module, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if getattr(module, "weight", None) is not None and is_quantized(module):
            plain[module] = plain.get(module) or plain_linear(module, weight_matrix(model, name))
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, plain[module])
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config
        model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        model.hf_quantizer = None


def _untie_configs(model: nn.Module) -> None:
    """Tell the configs of transformers models whose tied weights differ by now that they are not tied."""
    part: Any
    for part in model.modules():
        tied = getattr(part, "get_expanded_tied_weights_keys", dict)
        if any(part.get_parameter(name) is not part.get_parameter(source) for name, source in tied().items()):
            part.config.tie_word_embeddings = False
