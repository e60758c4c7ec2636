"""An image classifier whose last layer starts as the text tower's view of the classes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corda_core.linears import base_of
from corda_vlm.towers import is_open_clip

Template = str | Callable[[str], str]
PROMPTS_AT_ONCE = 800
"""Ten classes with the 80 prompts of OpenAI's CLIP, as open_clip takes them."""


class ZeroShotClassifier(nn.Module):
    """``scale · W f(x)``: f the image tower's unit features, W (classes, d) the text tower's unit features of the classes' names.

    Untrained it answers as zero-shot classification does; fine-tuned it is where WiSE-FT and its kin start (arXiv 2109.01903).
    """

    def __init__(self, model: nn.Module, head: Tensor, *, train_head: bool = False) -> None:
        """Take a model with two towers, adapted or not, and W as from ``zero_shot_head``."""
        super().__init__()
        self.model = model
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False, device=head.device, dtype=head.dtype)
        self.head.weight = nn.Parameter(head.clone(), requires_grad=train_head)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``logits`` (batch, classes), and with labels (batch,) the cross-entropy as ``loss``."""
        base = base_of(self.model)
        features = encode_images(base, {"image" if is_open_clip(base) else "pixel_values": images})
        logits = base.logit_scale.exp() * self.head(F.normalize(features, dim=-1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@torch.no_grad()
def zero_shot_head(model: nn.Module, tokenize: Callable[[list[str]], Any], classes: Sequence[str], templates: Sequence[Template]) -> Tensor:
    """Return W (classes, d): per class the mean of the unit features of its prompts, normalised again.

    Args:
        model: A model with two towers, of transformers or of open_clip, adapted or not.
        tokenize: Makes a batch of prompts: open_clip's tokenizer, or one of transformers that returns a dict of tensors.
        classes: Names of the classes.
        templates: Prompts, as functions of a name (open_clip's) or texts with ``{}`` in the name's place.

    Raises:
        ValueError: If there are no classes or no templates.
    """
    if not classes or not templates:
        raise ValueError(f"There are {len(classes)} class(es) and {len(templates)} template(s); expected at least one of each.")
    step = max(1, PROMPTS_AT_ONCE // len(templates))
    rows = []
    for some in (classes[start : start + step] for start in range(0, len(classes), step)):
        prompts = [template.format(name) if isinstance(template, str) else template(name) for name in some for template in templates]
        features = F.normalize(encode_texts(model, tokenize(prompts)), dim=-1)
        rows.append(F.normalize(features.unflatten(0, (len(some), len(templates))).mean(1), dim=-1))
    return torch.cat(rows)


def encode_images(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the image tower's features (batch, d), not normalised, of what ``read`` of a ``PairCollator`` makes."""
    base = base_of(model)
    return _features(base.encode_image(inputs["image"]) if is_open_clip(base) else base.get_image_features(**inputs))


def encode_texts(model: nn.Module, tokens: Any) -> Tensor:
    """Return the text tower's features (batch, d), not normalised, of ids for open_clip, of a dict of tensors for transformers."""
    base = base_of(model)
    device = next(base.parameters()).device
    if is_open_clip(base):
        return _features(base.encode_text(tokens.to(device)))
    return _features(base.get_text_features(**{key: value.to(device) for key, value in tokens.items()}))


def _features(output: Any) -> Tensor:
    """Return the features that models of transformers give as they are or in an output."""
    return output if isinstance(output, Tensor) else output.pooler_output
