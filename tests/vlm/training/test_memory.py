"""What a recipe takes of memory: the verdict, the device, and 4 bits."""

from dataclasses import replace
from pathlib import Path

import torch
from conftest import tiny_llava

from corda_core.linears import weight_shape
from corda_vlm import select_layers
from corda_vlm.training.memory import PACKED_BITS, USABLE, Card, Memory, memory_of
from corda_vlm.training.recipe import read_recipe

CONFIGS = Path(__file__).parents[3] / "configs"
MEMORY = Memory(weights=14, covariances=8, decomposition=3, context_activations=1, training=4, activations=5)


def test_peaks_are_of_what_is_there_at_once() -> None:
    assert MEMORY.while_preparing == 14 + 8 + 3
    assert MEMORY.while_training == 14 + 4 + 5


def test_the_verdict_names_the_part_that_does_not_fit_and_the_cure() -> None:
    card = Card("a card", 0, 1e12, 1e12)
    assert MEMORY.verdict(replace(card, memory=int(25 / USABLE) + 1)).startswith("it fits")
    for room, named, other in ((24, "max_memory", "micro_batch_size"), (22, "micro_batch_size", "never")):
        verdict = MEMORY.verdict(replace(card, memory=int(room / USABLE) + 1))
        assert verdict.startswith("it does not fit")
        assert named in verdict
        assert other not in verdict


def test_a_gpu_takes_covariances_in_parts_of_half_of_what_is_free() -> None:
    gpu = Card("a card", 24, 1e12, 1e12, is_gpu=True)
    assert MEMORY.split_for(gpu).covariances == (24 - 14) // 2
    assert MEMORY.split_for(replace(gpu, memory=80)) == MEMORY
    assert MEMORY.split_for(replace(gpu, is_gpu=False)) == MEMORY


def test_the_machine_is_known() -> None:
    card = Card.here()
    assert card.memory > 1e9
    assert min(card.half, card.double) > 1e8
    if not torch.cuda.is_available():
        assert "CPU" in str(card)


def test_memory_follows_from_shapes() -> None:
    recipe = read_recipe(CONFIGS / "llava_24gb.yaml")
    model = tiny_llava()
    shapes = {name: weight_shape(model, name) for name in select_layers(model)}
    counts = {"covariances": 10, "training": 20, "tokens": 8, "context_tokens": 8}
    plain = memory_of(model, recipe, shapes, **counts)
    assert plain.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    kept = replace(recipe, training=replace(recipe.training, gradient_checkpointing=False))
    assert memory_of(model, kept, shapes, **counts).activations > plain.activations
    packed = memory_of(model, replace(recipe, model=replace(recipe.model, quantize="nf4")), shapes, **counts)
    linears = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not model.lm_head]
    saved = sum(weight.numel() for weight in linears) * (2 - PACKED_BITS / 8)
    assert abs(plain.weights - packed.weights - saved) <= 1
