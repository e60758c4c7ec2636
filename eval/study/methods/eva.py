"""EVA (arXiv 2410.07170), PEFT's: A = main directions of each layer's inputs on what is learned, B = 0, ranks by explained variance.

Note:
    PEFT centres the inputs (incremental PCA), iterates over the batches until each direction stays within a cosine of 0.99, and keeps
    alpha / rank the same in all layers. Padding does not count; unlike PEFT's default, tokens without a label do, as the batches of a
    context need no labels, and so do a vision tower's tokens, which have no mask. The directions take minutes where a training takes one
    (SmolLM2-135M, rank 32, rho 2: more than 30 batches of 256 tokens, each with a decomposition of each layer's inputs), so they are kept
    in the task's cache for the other learning rates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import EvaConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from corda_core import data_digest
from corda_core.bases import base_digest
from corda_core.files import replacing_in
from corda_core.linears import weight_shape
from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.task import TARGET, Adapted, Task
from corda_vlm.options import Count, Positive

PASSES = 20
"""Over the context, after which directions that have not settled are an error: PEFT would loop for ever."""


@dataclass(frozen=True)
class Eva:
    """Options of EVA."""

    rank: Count
    """Of all layers together: ``rank`` times their number is spent."""

    rho: Positive = 2.0
    """The most that one layer gets, as a multiple of ``rank``; 1 leaves all ranks equal."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with EVA on the task's layers but those that no rank is left for; it starts as the base.

        Raises:
            ValueError: If rho is below 1, a layer has fewer than ``rank · rho`` inputs, or the directions do not settle: as a batch with
                fewer tokens than that counts for nothing.
        """
        most = round(self.rank * self.rho)
        small = [name for name in task.layers if min(weight_shape(task.model, name)) < most]
        if small:
            raise ValueError(
                f"{small[0]} has no {most} directions, the most that rank {self.rank} and rho {self.rho:g} ask for; lower them."
            )
        config = replace(config_for(task, self.rank), init_lora_weights="eva", eva_config=EvaConfig(rho=self.rho))
        digests = base_digest(task.model, task.layers)[:12] + data_digest(task.contexts[TARGET])[:12]
        path = task.cache / f"eva-{self.rank}-{self.rho:g}-{digests}.safetensors"
        model = attach_variant(task, config)
        if not path.exists():
            by_layer = directions(model, task.contexts[TARGET])
            with replacing_in(task.cache) as fresh:
                save_file({name: rows.contiguous() for name, rows in by_layer.items()}, fresh / path.name)
        initialize_lora_eva_weights(model, eva_state_dict=load_file(path))
        return Adapted(model)


def directions(model: PeftModel, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return by PEFT's names of the layers their directions (rank, n), as many as the layer's rank becomes.

    Raises:
        ValueError: If they do not settle.
    """
    left = PASSES * len(batches)

    def forward(model: nn.Module, batch: Mapping[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(
                f"EVA's directions did not settle within {PASSES} passes over {len(batches)} batches; give the context {TARGET!r} more "
                "tokens in each batch, at the very least rank · rho, or lower these."
            )
        model(**batch)

    return get_eva_state_dict(
        model,
        list(batches),
        forward_fn=forward,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=valid_tokens,
        show_progress_bar=False,
    )


def valid_tokens(inputs: Any, batch: Mapping[str, Any], name: str) -> Tensor:
    """Return a layer's inputs (tokens, n) without padding, where the batch's mask is of their shape."""
    x = inputs[0] if isinstance(inputs, tuple) else inputs
    mask = batch.get("attention_mask")
    return x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
