"""Models and samples for the benchmarks: the same, bit for bit, in every process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from corda_core import select_linears
from corda_eval.lab.smollm2 import smollm2_model
from corda_eval.text.perplexity import held_out_text, text_windows


@dataclass(frozen=True)
class Case:
    """What is prepared: a model, the layers to adapt, samples one by one, and the batch size that ours runs them in."""

    model: nn.Module
    names: tuple[str, ...]
    samples: list[dict[str, torch.Tensor]]
    batch_size: int
    rank: int
    options: Mapping[str, Any]
    """What ``corda_vlm.prepare`` adds to each batch."""


def smollm2() -> Case:
    """SmolLM2-135M-Instruct in float32, all linears but the output layer, 32 windows of 512 tokens of technical English."""
    model, names, tokenizer = smollm2_model()
    windows = text_windows(held_out_text()[0], tokenizer, 512, 32)
    trimmed = {"use_cache": False, "logits_to_keep": torch.tensor([-1])}
    return Case(model, names, [{"input_ids": window[None]} for window in windows], batch_size=1, rank=32, options=trimmed)


def llama_block(width: int = 4096, hidden: int = 11008, tokens: int = 512) -> Case:
    """One decoder block of LLaMA-2-7B's shape, random weights and activations with heavy tails, 8 × 512 tokens."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
    )
    generator = torch.Generator().manual_seed(0)
    model = LlamaModel(config).eval()
    for name in select_linears(model):
        weight = model.get_submodule(name).weight.data
        weight.copy_(heavy_tailed(weight.shape, generator) / weight.shape[1] ** 0.5)
    samples = [{"inputs_embeds": heavy_tailed((1, tokens, width), generator)} for _ in range(8)]
    return Case(model, select_linears(model), samples, batch_size=8, rank=128, options={"use_cache": False})


def clip_tower(blocks: int = 6) -> Case:
    """A vision tower of CLIP ViT-L/14's shape with random weights, 64 crops of scikit-learn's photographs.

    Six of its 24 equal blocks: PEFT takes a quarter of an hour for all.
    """
    # Imported here: it belongs to the extra `demo`.
    from sklearn.datasets import load_sample_images

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=blocks, num_attention_heads=16, image_size=224, patch_size=14
    )
    model = CLIPVisionModel(config).eval()
    photographs = load_sample_images().images
    draw = np.random.default_rng(0)
    crops = []
    for number in range(64):
        photograph = photographs[number % len(photographs)]
        top, left = draw.integers(0, photograph.shape[0] - 300), draw.integers(0, photograph.shape[1] - 300)
        crops.append(Image.fromarray(photograph[top : top + 300, left : left + 300]))
    pixels = CLIPImageProcessor()(crops, return_tensors="pt")["pixel_values"]
    return Case(model, select_linears(model), [{"pixel_values": image[None]} for image in pixels], batch_size=8, rank=32, options={})


CASES: dict[str, Callable[[], Case]] = {"smollm2": smollm2, "llama_block": llama_block, "clip_tower": clip_tower}


def batched(case: Case) -> list[dict[str, torch.Tensor]]:
    """Return the samples in batches of the case's size."""
    groups = [case.samples[start : start + case.batch_size] for start in range(0, len(case.samples), case.batch_size)]
    return [{key: torch.cat([sample[key] for sample in group]) for key in group[0]} for group in groups]


def heavy_tailed(shape: Any, generator: torch.Generator) -> torch.Tensor:
    """Return random numbers (… , n) whose last axis has scales over three orders of magnitude (log-normal), as activations have."""
    scales = torch.exp(1.2 * torch.randn(shape[-1], generator=generator))
    return torch.randn(*shape, generator=generator) * scales
