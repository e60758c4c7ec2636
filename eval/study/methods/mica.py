"""MiCA (arXiv 2604.01694), PEFT's: B = the last r left singular vectors of W, frozen; A trains from 0."""

from types import MappingProxyType

from corda_eval.study.peft_lora import PeftVariant


class Mica(PeftVariant):
    """Options of MiCA; it starts as the base."""

    changes = MappingProxyType({"init_lora_weights": "mica"})
