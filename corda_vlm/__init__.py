"""CorDA adapters for vision-language models: prepare, train with any trainer, export an ordinary LoRA."""

from corda_core import attach, export, save
from corda_vlm.adapted import load, merge
from corda_vlm.attention import fuse_attention, split_attention
from corda_vlm.classifier import ZeroShotClassifier, zero_shot_head
from corda_vlm.config import CordaConfig
from corda_vlm.data.pairs import OpenClipPairs
from corda_vlm.prepare import collect_context, plan_adapters, plan_contexts, prepare
from corda_vlm.selfwritten import self_context
from corda_vlm.towers import select_layers
from corda_vlm.training.bound import DriftCallback
from corda_vlm.training.divergence import context_kl, keep_loss
from corda_vlm.training.keep import Keep, KeepCallback, Keeper, KeepOptions
from corda_vlm.training.train import attach_lora, fine_tune
from corda_vlm.training.within import alpha_within

__all__ = [
    "CordaConfig",
    "DriftCallback",
    "Keep",
    "KeepCallback",
    "KeepOptions",
    "Keeper",
    "OpenClipPairs",
    "ZeroShotClassifier",
    "alpha_within",
    "attach",
    "attach_lora",
    "collect_context",
    "context_kl",
    "export",
    "fine_tune",
    "fuse_attention",
    "keep_loss",
    "load",
    "merge",
    "plan_adapters",
    "plan_contexts",
    "prepare",
    "save",
    "select_layers",
    "self_context",
    "split_attention",
    "zero_shot_head",
]
