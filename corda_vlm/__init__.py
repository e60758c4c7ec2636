"""CorDA adapters for vision-language models: prepare, train with any trainer, export an ordinary LoRA."""

from corda_core import attach, export
from corda_vlm.config import CordaConfig
from corda_vlm.plan_report import write_plan_report
from corda_vlm.prepare import collect_context, plan_adapters, plan_contexts, prepare
from corda_vlm.towers import select_layers
from corda_vlm.train import DriftLog, attach_lora, fine_tune

__all__ = [
    "CordaConfig",
    "DriftLog",
    "attach",
    "attach_lora",
    "collect_context",
    "export",
    "fine_tune",
    "plan_adapters",
    "plan_contexts",
    "prepare",
    "select_layers",
    "write_plan_report",
]
