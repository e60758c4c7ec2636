"""From a trained folder to what is deployed: an ordinary LoRA or a plain model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

import corda_core
from corda_core.bases import ANCESTRY, ancestry_as_json, ancestry_of
from corda_core.files import replacing_in
from corda_vlm.adapted import load
from corda_vlm.adapted import merge as merged
from corda_vlm.context import image_reader
from corda_vlm.data.items import load_items
from corda_vlm.data.sources import DataConfig
from corda_vlm.outputs import LOCK, locked, processes
from corda_vlm.selfwritten import self_context
from corda_vlm.towers import has_two_towers, is_open_clip
from corda_vlm.training.budget import check_budget
from corda_vlm.training.models import OPEN_CLIP_WEIGHTS, load_base
from corda_vlm.training.recipe import RECIPE, SELF, ModelConfig, read_model
from corda_vlm.training.within import alpha_within

NUM_WRITTEN = 64
"""Samples of its own that a base is measured on."""
HELD_OUT_SEED = 1_000_003
"""Of those samples: not a seed that a context is made with."""


@dataclass(frozen=True)
class Budget:
    """What may be forgotten, and what it is measured on."""

    max_kl: float
    """KL(base ‖ adapted) in nats a token; of two towers a pair."""
    on: str
    """A file, folder or id of samples that were not trained on; "self" for what a language model writes itself."""

    def __post_init__(self) -> None:
        """Refuse what is no budget."""
        check_budget(self.max_kl, "--max-kl")


def deploy(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    alpha: float | None = None,
    budget: Budget | None = None,
    compress: int | None = None,
    merge: bool = False,
    download: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Write the adapter for others, and return a sentence that says what was written.

    Args:
        adapter: Folder that ``train`` wrote, or one of its checkpoints.
        output: Folder to write: a LoRA in PEFT's form; with ``merge`` a model and its processor (open_clip: its weights).
        base: Where the base is; None takes the model of the recipe beside the adapter.
        dtype: Precision to load it in: that which the adapter was made in; None takes the recipe's, or float32.
        alpha: How much of the change; None takes all of it, or what is within the budget.
        budget: What may be forgotten.
        compress: Rank of the best approximation of the change.
        merge: Whether to write a plain model.
        download: Whether the base may be fetched; what the recipe beside the adapter says of this is ignored.
        trust_remote_code: Whether code that comes with the base may run; what the recipe says of this is ignored.

    Raises:
        BlockingIOError: If another export writes to the output.
        FileNotFoundError: If a file is missing.
        ValueError: If options contradict each other, a file is damaged, or the base is another one.
    """
    if merge and compress is not None:
        raise ValueError("--compress and --merge were both given; a merged model has no rank: leave one of them out.")
    if merge and (output / "config.json").exists():
        raise ValueError(f"{output} holds a model already, perhaps the base; name another folder.")
    if budget is not None and (alpha is not None or compress is not None):
        given = "--compress" if alpha is None else "--alpha"
        raise ValueError(
            f"--max-kl and {given} were both given, but the first says how much of the change, all of its ranks: leave one out."
        )
    config = _base_of(adapter, base, dtype, download=download, trust_remote_code=trust_remote_code)
    model, processor = load_base(config)
    if budget is not None and config.quantize is None:  # else it is there already
        model.to(processes().device)
    samples = None if budget is None else _samples(budget, model, processor, download)
    adapted = load(model, adapter)
    alpha, held = 1.0 if alpha is None else alpha, ""
    if budget is not None and samples is not None:
        alpha, kl = alpha_within(adapted, samples, budget.max_kl, processor=processor)
        unit = "pair" if has_two_towers(model) else "token"
        held = f" It holds {alpha:.4g} of the change (alpha): KL to the base {kl:.4g} nats a {unit}, on {len(samples)} samples."
    with locked(output):
        sentence = _write_model(adapted, processor, output, alpha) if merge else _write_lora(adapted, output, alpha, compress)
        (output / LOCK).unlink(missing_ok=True)  # not for those who are given the folder
    return sentence + held


def _samples(budget: Budget, model: nn.Module, processor: Any, download: bool) -> Sequence[Any]:
    """Return what a budget is measured on."""
    if budget.on == SELF:
        return self_context(model, processor, count=NUM_WRITTEN, seed=HELD_OUT_SEED)
    return load_items(DataConfig(budget.on), download=download, needs_images=has_two_towers(model), accepts=image_reader(processor))


def _write_lora(adapted: PeftModel, output: Path, alpha: float, compress: int | None) -> str:
    exported = corda_core.export(adapted, output, alpha=alpha, compress=compress)
    lost = f"; compressing it lost {exported.mean_lost:.1%} of the change (mean over {len(exported.lost)} layers)" if compress else ""
    return f"Wrote a LoRA of rank {exported.rank} for the untouched base to {output}{lost}."


def _write_model(adapted: PeftModel, processor: Any, output: Path, alpha: float) -> str:
    plain: Any = merged(adapted, alpha=alpha)
    with replacing_in(output) as fresh:
        if is_open_clip(plain):
            state = {key: value.contiguous() for key, value in plain.state_dict().items()}
            save_file(state, fresh / OPEN_CLIP_WEIGHTS, {ANCESTRY: json.dumps(ancestry_as_json(ancestry_of(plain)))})
        else:
            plain.save_pretrained(fresh)
            processor.save_pretrained(fresh)
    return f"Wrote a plain model to {output}."


def _base_of(adapter: Path, base: str | None, dtype: str | None, *, download: bool, trust_remote_code: bool) -> ModelConfig:
    """Return the base that an adapter's recipe names, at another place if one is given.

    The folder may be a stranger's: only which weights they are is taken from it, nothing that reaches the network or runs code.
    """
    recipe = next((folder / RECIPE for folder in (adapter, adapter.parent) if (folder / RECIPE).exists()), None)
    if recipe is None and base is None:
        raise FileNotFoundError(f"{adapter} has no {RECIPE} that names its base; give it with --base.")
    named = ModelConfig(base or "", dtype="float32") if recipe is None else read_model(recipe)
    return replace(
        named,
        path=base or named.path,
        dtype=dtype or named.dtype,
        attention=None,  # which may name a kernel on the hub
        download=download,
        trust_remote_code=trust_remote_code,
    )
