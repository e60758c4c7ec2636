"""LoRA-GA (arXiv 2407.05000), on PEFT's: A and B from the gradient at the start, the base becomes ``W − s B A``.

``∂loss/∂W ≈ U Σ Vᵀ``, its mean over a few training batches; with ``c = m^(1/4) / √γ`` (section 3.3 of the paper)
``A = c V_rᵀ`` (the first r), ``B = c U_(r+1 … 2r)``.

Note:
    PEFT 0.21 has ``A = V_rᵀ`` and ``B = c U Σ``: A unscaled, and B as short as the gradient is. The paper and its code
    (Outsider565/LoRA-GA, ``lora_ga_init``) have no Σ and both factors scaled; ``form="paper"`` puts that right. The paper's scaling s is
    ``alpha / √r``; here it is ``alpha / r`` as for all methods of a study, so 1 by default.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from peft import LoraGAConfig, PeftModel
from peft.tuners.lora.loraga import preprocess_loraga

from corda_core.linears import weight_shape
from corda_core.lora import lora_layers
from corda_eval.study.peft_lora import attach_variant, config_for, refuse_shared
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count, Positive


@dataclass(frozen=True)
class LoraGa:
    """Options of LoRA-GA."""

    rank: Count
    alpha: Positive | None = None
    """None takes the rank."""

    gradient_batches: Count = 8
    """The first of the training, which the gradient is taken over."""

    gamma: Count = 16
    form: Literal["paper", "peft"] = "paper"

    def adapt(self, task: Task) -> Adapted:
        """Return the model with LoRA-GA on the task's layers; base weights are written, the function stays, up to rounding.

        Raises:
            ValueError: If a layer has fewer than ``2 · rank`` directions, another module shares its weight, or an option is unknown.
        """
        if self.form not in ("paper", "peft"):
            raise ValueError(f'form is {self.form!r}; expected "paper" or "peft".')
        small = [name for name in task.layers if min(weight_shape(task.model, name)) < 2 * self.rank]
        if small:
            raise ValueError(f"{small[0]} has fewer than {2 * self.rank} directions, which rank {self.rank} asks for; lower the rank.")
        refuse_shared(task, "LoRA-GA")
        scale = "stable" if self.form == "peft" else "unit"
        options = LoraGAConfig(direction="ArB2r", scale=scale, stable_gamma=self.gamma)
        config = replace(config_for(task, self.rank, self.alpha), init_lora_weights="lora_ga", lora_ga_config=options)

        def backward() -> None:
            for batch in task.batches[: self.gradient_batches]:
                task.loss(task.model, batch).backward()

        preprocess_loraga(task.model, config, backward)
        model = attach_variant(task, config)
        if self.form == "paper":
            rescale_(model, self.gamma)
        return Adapted(model)


@torch.no_grad()
def rescale_(model: PeftModel, gamma: float) -> None:
    """Give the rows of A and the columns of B the length ``m^(1/4) / √γ`` each, the function of each layer staying.

    Columns of zeros stay: there is no gradient in that direction, or none in that layer at all.
    """
    for layer in lora_layers(model).values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        before = B @ A
        length = B.shape[0] ** 0.25 / gamma**0.5
        A.mul_(length / A.norm(dim=1, keepdim=True))
        B.mul_(length / B.norm(dim=0).clamp_min(torch.finfo(B.dtype).tiny))
        layer.get_base_layer().weight.data += layer.scaling["default"] * (before - B @ A)
