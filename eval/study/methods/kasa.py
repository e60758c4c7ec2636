"""KaSA (arXiv 2412.06071), PEFT's, regularised as by the reference: the base loses its r smallest components, ``ΔW = (α/r) B diag(δ) A``.

δ (r,) is normal, A Kaiming, B = 0, all three train, with ``β ‖δ‖² + γ (‖BᵀB − I‖_F + ‖A Aᵀ − I‖_F)`` added to the loss (eqs. 9 to 12),
the mean over the layers. The function is NOT that of the base at the start: what was dropped is missing.

Note:
    The reference (juyongjiang/KaSA, ``main.py`` and its copy of PEFT's ``layer.py``) departs from the paper, and PEFT from the reference:

    - The regulariser is the mean over the layers in the reference, their sum in PEFT.
    - The reference takes the outer products, ``‖B Bᵀ − I_m‖_F`` and ``‖Aᵀ A − I_n‖_F``. As ``‖AᵀA − I_n‖² = ‖A Aᵀ − I_r‖² + n − r``,
      they have a floor (γ · 2 √760 = 0.055 for n = 768, r = 8, which its published losses of 0.059 end at) and pull less near it.
    - It keeps the first ``n − r`` of ``min(m, n)`` components, which drops fewer than r, or none, where a layer has more inputs than
      outputs. The paper and PEFT drop r, and so does this.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import KasaConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from corda_core.linears import weight_shape
from corda_core.lora import lora_layers
from corda_eval.study.peft_lora import attach_variant, config_for, refuse_shared
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count, NotNegative, Positive


@dataclass(frozen=True)
class Kasa:
    """Options of KaSA."""

    rank: Count = 8
    alpha: Positive | None = None
    """None takes twice the rank, as the paper does."""

    beta: NotNegative = 1e-4
    gamma: NotNegative = 1e-3

    def adapt(self, task: Task) -> Adapted:
        """Return the model with KaSA on the task's layers, and its regulariser as the penalty; base weights are written.

        Raises:
            ValueError: If the rank leaves nothing of a layer, or another module shares a layer's weight.
        """
        small = [name for name in task.layers if min(weight_shape(task.model, name)) <= self.rank]
        if small:
            raise ValueError(f"{small[0]} has no more than {self.rank} components, all of which KaSA would drop; lower the rank.")
        refuse_shared(task, "KaSA")
        config = config_for(task, self.rank, 2 * self.rank if self.alpha is None else self.alpha)
        model = attach_variant(task, replace(config, kasa_config=KasaConfig(beta=self.beta, gamma=self.gamma)))
        return Adapted(model, penalty=kasa_penalty(model))


def kasa_penalty(model: PeftModel, *, outer: bool = False) -> Callable[[], Tensor]:
    """Return KaSA's regulariser, the mean over the layers, as a function of what the model's adapters are then.

    Args:
        model: With one adapter, whose config has β and γ.
        outer: Take the outer products, as the reference does.
    """
    layers = list(lora_layers(model).values())
    options = model.peft_config["default"].kasa_config
    if outer:
        return lambda: torch.stack([_outer_penalty(layer, options.beta, options.gamma) for layer in layers]).mean()
    return lambda: model.base_model._get_kasa_loss() / len(layers)


def _outer_penalty(layer: LoraLayer, beta: float, gamma: float) -> Tensor:
    """Return ``β ‖δ‖² + γ (‖B Bᵀ − I_m‖_F + ‖Aᵀ A − I_n‖_F)`` of one layer, by way of the inner products."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight.T
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    norms = [((X @ X.T - eye).square().sum() + X.shape[1] - len(X)).sqrt() for X in (A, B)]
    return beta * layer.lora_diag["default"].square().sum() + gamma * (norms[0] + norms[1])
