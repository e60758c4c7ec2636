"""DoRA (arXiv 2402.09353), PEFT's: ``W' = diag(μ) (W + B A) / ‖W + B A‖_row``, μ (m,) from ``‖W‖_row``, A Kaiming, B = 0, all three train.

The norms are taken over each output's weights and pass no gradient (section 4.3 of the paper).
"""

from types import MappingProxyType

from corda_eval.study.peft_lora import PeftVariant


class Dora(PeftVariant):
    """Options of DoRA; it starts as the base, up to rounding."""

    changes = MappingProxyType({"use_dora": True})
