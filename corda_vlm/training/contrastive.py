"""Training a model with two towers: its own contrastive loss, over the batches of all processes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F
from transformers import Trainer

from corda_core.layers import is_distributed
from corda_core.linears import base_of, hold_statistics_


@dataclass(frozen=True)
class Features:
    """A batch of pairs, as a model with two towers sees it."""

    image: Tensor
    """(batch, d), of length 1."""
    text: Tensor
    """(batch, d), of length 1."""
    scale: Tensor
    """What cosines are multiplied by."""
    bias: Tensor | None
    """What is added to them, where the model is trained with sigmoids (SigLIP)."""


def features_of(model: nn.Module, batch: dict[str, Any]) -> Features:
    """Return the features of a batch of images and captions, of a model of transformers or of open_clip."""
    output = model(**batch)
    base = base_of(getattr(model, "module", model))  # module: DDP
    if isinstance(output, tuple):  # open_clip
        image, text, scale, *bias = output
        # One for each device under nn.DataParallel.
        return Features(image, text, scale.reshape(-1)[0], bias[0].reshape(-1)[0] if bias else None)
    if "image_features" in output:  # open_clip with output_dict=True
        return Features(output["image_features"], output["text_features"], output["logit_scale"], output.get("logit_bias"))
    return Features(output["image_embeds"], output["text_embeds"], base.logit_scale.exp(), getattr(base, "logit_bias", None))


def contrastive_loss(features: Features) -> Tensor:
    """Return the loss (nats) of pairs that belong together against all other pairs in the batch.

    CLIP: mean over rows and columns of the cross-entropy of ``scale · I Tᵀ``. SigLIP, where there is a bias: ``−Σ log σ(±(scale · I Tᵀ +
    bias)) / batch``, plus on the diagonal.
    """
    logits = features.scale * features.image @ features.text.T
    if features.bias is not None:
        signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
        return -F.logsigmoid(signs * (logits + features.bias)).sum() / len(logits)
    places = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


def check_pairs(count: int, batch_size: int, name: str) -> None:
    """Refuse fewer pairs than one batch, as smaller batches are left out.

    Raises:
        ValueError: If there are fewer.
    """
    if count < batch_size:
        raise ValueError(
            f"{name} has {count} pair(s), but a batch has {batch_size}, and only whole ones count: their loss tells each pair from all "
            "others; make batch_size smaller, or give more."
        )


def over_processes(features: Features) -> Features:
    """Return the features of all processes' batches; gradients flow back to each process.

    Every process then computes the same loss. DDP averages their gradients, so the result is the gradient over the whole batch.
    """
    if not is_distributed():
        return features
    image, text = (torch.cat(all_gather(local.contiguous())) for local in (features.image, features.text))
    return Features(image, text, features.scale, features.bias)


class ContrastiveTrainer(Trainer):
    """transformers' Trainer with the contrastive loss."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the loss of a batch, and the features if outputs are wanted."""
        hold_statistics_(model)
        features = features_of(model, inputs)
        loss = contrastive_loss(over_processes(features))
        return (loss, {"image_features": features.image, "text_features": features.text}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a held-out batch; the Trainer takes none of models that have no labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach().mean(), None, None
