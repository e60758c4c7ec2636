"""From a trained folder to what is deployed: an ordinary LoRA or a plain model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file

import corda_core
from corda_core.files import replacing_in
from corda_vlm.adapted import load
from corda_vlm.adapted import merge as merged
from corda_vlm.outputs import LOCK, locked
from corda_vlm.towers import is_open_clip
from corda_vlm.training.models import load_base
from corda_vlm.training.recipe import RECIPE, ModelConfig, read_model


def deploy(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    alpha: float = 1.0,
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
        alpha: How much of the change.
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
    model, processor = load_base(_base_of(adapter, base, dtype, download=download, trust_remote_code=trust_remote_code))
    adapted = load(model, adapter)
    with locked(output):
        sentence = _write_model(adapted, processor, output, alpha) if merge else _write_lora(adapted, output, alpha, compress)
        (output / LOCK).unlink(missing_ok=True)  # not for those who are given the folder
    return sentence


def _write_lora(adapted: PeftModel, output: Path, alpha: float, compress: int | None) -> str:
    exported = corda_core.export(adapted, output, alpha=alpha, compress=compress)
    lost = f"; compressing it lost {exported.mean_lost:.1%} of the change (mean over {len(exported.lost)} layers)" if compress else ""
    return f"Wrote a LoRA of rank {exported.rank} for the untouched base to {output}{lost}."


def _write_model(adapted: PeftModel, processor: Any, output: Path, alpha: float) -> str:
    plain: Any = merged(adapted, alpha=alpha)
    with replacing_in(output) as fresh:
        if is_open_clip(plain):
            save_file({key: value.contiguous() for key, value in plain.state_dict().items()}, fresh / "open_clip_model.safetensors")
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
