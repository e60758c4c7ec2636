"""``prepare`` on a tiny model of every family, with ready batches: start, gradients, export, merge."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, VISION, build
from PIL import Image
from torch import Tensor, nn

import corda_vlm
from corda_core import lora_layers
from corda_vlm.probe import RESULTS
from corda_vlm.towers import PARTS, family_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*saw .* tokens", "ignore:.*never ran", "ignore:.*ran, but what", "ignore:rank .* is larger"
)


def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    return next(output[key] for key in RESULTS if key in output)


def all_parts(model: nn.Module) -> list[str]:
    return [part for part in PARTS if family_of(model).prefixes(part)]


def test_every_layer_has_its_part() -> None:
    for family in FAMILIES:
        model, _ = build(family)
        names = corda_vlm.select_layers(model, parts=all_parts(model))
        assert {family_of(model).part_of(name) for name in names} == set(all_parts(model)), family


@pytest.mark.parametrize("family", FAMILIES)
def test_every_planned_layer_starts_at_the_base_and_learns(family: str) -> None:
    model, batch = build(family)
    model.requires_grad_(False)  # as PEFT will: torch's fused attention (SigLIP's head) then takes another path
    expected = outputs(model, batch)
    adapted = corda_vlm.prepare(model, [batch, batch], rank=3, protect="start", parts=all_parts(model))
    assert torch.equal(outputs(adapted, batch), expected)
    output = adapted(**batch)
    next(output[key] for key in RESULTS if key in output).square().sum().backward()
    layers = lora_layers(adapted)
    assert {family_of(model).part_of(name) for name in layers} == set(all_parts(model))
    for name, layer in layers.items():
        assert layer.lora_A["default"].weight.grad is not None, name
        assert float(layer.lora_B["default"].weight.grad.abs().max()) > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_default_parts(family: str) -> None:
    model, batch = build(family)
    adapted = corda_vlm.prepare(model, [batch], "ipm", rank=2)
    assert {family_of(model).part_of(name) for name in lora_layers(adapted)} == set(family_of(model).default)


def trained(family: str) -> tuple[Any, dict[str, Any], Tensor]:
    """Return an adapted model that has learned something, its batch and its outputs."""
    model, batch = build(family)
    adapted = corda_vlm.prepare(model, [batch, batch], rank=3, protect="start", parts=all_parts(model))
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(adapted).values():
        weight = layer.lora_B["default"].weight
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return adapted, batch, outputs(adapted, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_gives_a_plain_model_with_the_same_outputs(family: str) -> None:
    keys = build(family)[0].state_dict().keys()
    adapted, batch, expected = trained(family)
    assert float((expected - outputs(build(family)[0], batch)).abs().max()) > 1e-5
    merged = corda_vlm.merge(adapted)
    assert merged.state_dict().keys() == keys
    torch.testing.assert_close(outputs(merged, batch), expected, rtol=1e-5, atol=1e-5)


RELOAD = """
import sys, torch
sys.path[:0] = [{tests!r}]
from peft import PeftModel
from families import build
from corda_vlm.probe import RESULTS
for family in {families!r}:
    model, batch = build(family)
    model = PeftModel.from_pretrained(model, f"{folder}/{{family}}").eval()
    with torch.no_grad():
        output = model(**batch)
    torch.save(next(output[key] for key in RESULTS if key in output), f"{folder}/{{family}}.pt")
"""


def test_exported_adapters_reload_on_fresh_bases_in_a_new_process(tmp_path: Path) -> None:
    expected = {}
    for family in FAMILIES:
        adapted, _, expected[family] = trained(family)
        corda_vlm.export(adapted, tmp_path / family)
    script = RELOAD.format(tests=str(Path(__file__).parent), families=list(FAMILIES), folder=str(tmp_path))
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    for family, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{family}.pt"), logits, rtol=1e-5, atol=1e-5, msg=family)


def test_attention_and_mlp_are_words_for_layers() -> None:
    for family in FAMILIES:
        model, _ = build(family)
        parts = all_parts(model)
        attention, mlp = (set(corda_vlm.select_layers(model, parts=parts, targets=kind)) for kind in ("attention", "mlp"))
        assert attention, family
        assert mlp, family
        assert not attention & mlp, family
        rest = (
            {name for name in corda_vlm.select_layers(model, parts=parts) if family_of(model).part_of(name) != "projector"}
            - attention
            - mlp
        )
        assert all(name.rpartition(".")[2] in ("visual_projection", "text_projection", "head") for name in rest), (family, rest)
        assert set(corda_vlm.select_layers(model, parts=parts, exclude="mlp")) & mlp == set()


def test_an_unknown_family_takes_what_can_learn_and_says_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.idle = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    model = Net()
    batch = {"x": torch.randn(20, 6)}
    expected = model(**batch)
    with (
        pytest.warns(UserWarning, match=r"Net is of no family .* took all 2 linear layers .*first, second"),
        pytest.warns(UserWarning, match="1 layer.* never ran, such as idle"),
    ):
        adapted = corda_vlm.prepare(model, [batch], rank=2)
    assert torch.equal(adapted(**batch), expected)


def test_a_vision_language_model_that_nobody_listed_has_its_parts_and_masks() -> None:
    """Its vision tower sees patches, which the attention mask says nothing about."""
    model, batch = build("llava")
    model.config.model_type = "unheard_of"
    batch["attention_mask"][0, :3] = 0
    covariances = corda_vlm.collect_context(model, [batch], corda_vlm.CordaConfig(parts=PARTS))
    assert {family_of(model).part_of(name) for name in covariances} == set(PARTS)
    tokens = {name.split(".")[1]: covariance.num_tokens for name, covariance in covariances.items()}
    assert tokens == {"vision_tower": 2 * 5, "multi_modal_projector": 2 * 4, "language_model": int(batch["attention_mask"].sum())}


def test_models_that_flatten_their_tokens() -> None:
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    model = transformers.OPTForCausalLM(config).eval()
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    covariances = corda_vlm.collect_context(model, [{"input_ids": ids, "attention_mask": mask}], corda_vlm.CordaConfig())
    assert {covariance.num_tokens for covariance in covariances.values()} == {int(mask.sum())}


def test_a_lone_vision_tower_reads_images() -> None:
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).eval()
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    pictures = [Image.new("RGB", (16, 16), (30 * i, 0, 99)) for i in range(6)]
    adapted = corda_vlm.prepare(model, pictures, rank=2, processor=processor)
    assert len(lora_layers(adapted)) == 3 * 6
    with pytest.raises(ValueError, match="no image, which is all that a vision tower reads"):
        corda_vlm.prepare(adapted.unload(), [(None, "text")], rank=2, processor=processor)


def test_several_contexts_and_lists_that_begin_with_text() -> None:
    model, batch = build("llava")
    text = {"input_ids": torch.randint(10, 60, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    parts = ["vision", "language"]
    adapted = corda_vlm.prepare(model, [text] * 3 + [batch], rank=2, parts=parts)
    assert {family_of(model).part_of(name) for name in lora_layers(adapted)} == set(parts)
    with pytest.raises(ValueError, match="Context 1 of several, each of which must reach all layers: .*vision_tower.* never ran"):
        corda_vlm.prepare(build("llava")[0], [text], rank=2, parts=parts, further_contexts=[[batch]])


def test_a_vision_tower_needs_images() -> None:
    model, batch = build("llava")
    text = {"input_ids": torch.randint(10, 60, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"None of the .* layers can learn .*never ran .*images for a vision tower"):
        corda_vlm.prepare(model, [text], rank=2, parts=["vision"])
    # One batch with images among those without is enough to find the layers.
    adapted = corda_vlm.prepare(model, [text, batch], rank=2, parts=["vision"])
    assert len(lora_layers(adapted)) == 12  # two of three blocks: the last is not read


@pytest.mark.parametrize("family", ["siglip2", "smolvlm"])
def test_patches_that_fill_up_do_not_count(family: str) -> None:
    model, batch = build(family)
    config = corda_vlm.CordaConfig(parts=["vision"], targets=["q_proj"], rank=2)
    name = corda_vlm.select_layers(model, parts=["vision"], targets=["q_proj"])[0]
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    covariance = corda_vlm.collect_context(model, [batch], config)[name]
    handle.remove()
    counts = {"siglip2": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), "smolvlm": torch.ones(3, 4, 4)}[family].bool()
    if family == "smolvlm":
        counts[1, :, 3] = False
    rows = seen[-1][counts.flatten(1)].double()
    assert covariance.num_tokens == len(rows) == int(counts.sum())
    torch.testing.assert_close(covariance.matrix.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)
