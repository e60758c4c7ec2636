"""LLaVA-1.5-7B's shape with random weights made on the device, its samples, and the operations it takes by count."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from corda_eval.bench.gpu.measure import heavy_tailed

BLOCKS, RANK = 32, 128
IMAGE, IMAGE_TOKENS, TEXT_TOKENS = 32000, 576, 64
VOCABULARY = 32064


def llava_7b(device: torch.device, small: bool, blocks: int = BLOCKS, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return LLaVA-1.5-7B's shape in evaluation mode; its linears of the language model have columns over three orders of magnitude.

    Args:
        device: Where the weights are made.
        small: Whether two blocks of hidden size 128 do, on the CPU; images are of 4 × 4 patches then.
        blocks: How many of the language model's 32 blocks.
        dtype: Of the weights.
    """
    width, hidden, heads, blocks = (128, 320, 2, 2) if small else (4096, 11008, 32, blocks)
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336}
    if small:
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, patch_size=14),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
        ),
        image_token_id=IMAGE,
        image_seq_length=16 if small else IMAGE_TOKENS,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name in language_linears(model):
            weight: Any = model.get_submodule(name).weight
            weight.copy_(heavy_tailed(tuple(weight.shape), generator, dtype) / weight.shape[1] ** 0.5)
    return model


def language_linears(model: nn.Module) -> tuple[str, ...]:
    """Return the linear layers of the language model but the output layer."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".language_model." in name)


def llava_batches(model: Any, count: int, batch_size: int, *, text: int = TEXT_TOKENS, train: bool = False) -> list[dict[str, Any]]:
    """Return batches of an image and text tokens a sample, made on the model's device.

    Args:
        model: As ``llava_7b`` makes it.
        count: Samples.
        batch_size: Samples a batch.
        text: Text tokens a sample, after one that opens it.
        train: Whether labels go with them; else only the last logits are wanted.
    """
    config, device, dtype = model.config, model.device, model.dtype
    image_tokens, pixels = config.image_seq_length, config.vision_config.image_size
    generator = torch.Generator(device).manual_seed(1)
    batches = []
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        ids = torch.randint(5, IMAGE - 1, (size, image_tokens + text), generator=generator, device=device)
        ids[:, 1 : 1 + image_tokens] = IMAGE
        images = torch.randn(size, 3, pixels, pixels, generator=generator, device=device).to(dtype)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images, "use_cache": False}
        batches.append(batch | ({"labels": ids.masked_fill(ids == IMAGE, -100)} if train else {"logits_to_keep": 1}))
    return batches


def num_tokens(batches: Sequence[dict[str, Any]]) -> int:
    """Return how many tokens the batches have."""
    return sum(batch["input_ids"].numel() for batch in batches)


def forward_flops(model: Any, batches: Sequence[dict[str, Any]]) -> float:
    """Return the operations of forward passes: products with weights, and of the language model's causal attention."""
    language = sum(model.get_submodule(name).weight.numel() for name in language_linears(model))
    config = model.config.text_config
    flops = 0.0
    for batch in batches:
        samples, length = batch["input_ids"].shape
        attention = 2 * config.num_hidden_layers * config.hidden_size * length  # half of all pairs, QKᵀ and with V
        flops += samples * length * (2 * language + attention)
        if "pixel_values" in batch:
            vision = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
            flops += 2 * samples * vision * (config_patches(model) + 1)
    return flops


def config_patches(model: Any) -> int:
    """Return how many patches an image has."""
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def gram_flops(model: nn.Module, names: Sequence[str], tokens: int) -> float:
    """Return the least products of collecting: half of ``XᵀX`` of each input that these layers have, shared ones once."""
    return tokens * sum(n * n for n in distinct_inputs(model, names))


def distinct_inputs(model: nn.Module, names: Sequence[str]) -> list[int]:
    """Return the sizes n of the inputs of a Llama's layers: q, k and v read the same, and so do gate and up."""
    firsts = [name for name in names if name.rpartition(".")[2] in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    return [int(model.get_submodule(name).weight.shape[1]) for name in firsts]  # type: ignore[index]


def least_seconds(weights: Sequence[Tensor], rank: int, mode: str, float32: float, float64: float, *, with_energy: bool = True) -> float:
    """Return what decomposing these weights takes at least, at these speeds of matrix products.

    KPM: half of the Gram matrix and Cholesky factors in float64, and four applications to r + 8 vectors. IPM: three applications of
    ``W C C Wᵀ`` to r + 8 vectors in float32. Both, as a plan holds it, ``‖W C^(1/2)‖²`` in float32 (``corda_core.plan.Energy``).
    """
    seconds, columns = 0.0, rank + 8
    for weight in weights:
        m, n = weight.shape
        if mode == "ipm":
            seconds += 3 * (4 * m * n + 4 * n * n) * columns / float32
        elif m >= n:
            seconds += (m * n * n + 2 * n**3 / 3 + 4 * 4 * n * n * columns) / float64
        else:
            seconds += (2 * m * n * n + m * m * n + m**3 / 3 + 4 * 2 * m * m * columns) / float64
        seconds += 2 * m * n * n / float32 if with_energy else 0
    return seconds
