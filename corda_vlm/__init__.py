"""CorDA adapters for vision-language models: prepare, train with any trainer, export an ordinary LoRA."""

from corda_core import attach, export
from corda_vlm.config import CordaConfig
from corda_vlm.prepare import collect_context, plan_adapters, prepare
from corda_vlm.towers import select_layers
from corda_vlm.train import attach_lora, fine_tune

__all__ = ["CordaConfig", "attach", "attach_lora", "collect_context", "export", "fine_tune", "plan_adapters", "prepare", "select_layers"]
