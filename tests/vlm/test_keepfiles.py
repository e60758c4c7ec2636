"""Keep files as contexts: covariances that were collected once stand for the samples that they were made of."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama, tiny_llava
from torch import nn

from corda_core import attachment_of, save_covariances
from corda_core.covariance import together
from corda_core.store import read_covariances
from corda_vlm import CordaConfig, collect_context, plan_contexts, prepare, select_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min", "ignore:.*never ran"
)
EVERYWHERE = CordaConfig(rank=4, parts=["vision", "projector", "language"])
TEXTS = [{"text": "the shape in this is a circle"}, {"text": "what is one two ?"}]


def keep(samples: list[Any], path: Path, processor: Any, config: CordaConfig = EVERYWHERE, model: nn.Module | None = None) -> Path:
    """Write a keep file of these samples."""
    model = model or tiny_llava()
    covariances = collect_context(model, samples, config, processor)
    unreached = set(select_layers(model, parts=config.parts)) - covariances.keys()
    save_covariances(covariances, path, model=model, data="", options={}, unreached=unreached)
    return path


def planned(context: Any, processor: Any, config: CordaConfig = EVERYWHERE) -> dict[str, torch.Tensor]:
    plan = plan_contexts(tiny_llava(), [context], config, processor)
    return {name: init.B0 @ init.A0 for name, init in plan.layers.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0) -> None:
    assert list(found) == list(expected)
    for name, change in found.items():
        torch.testing.assert_close(change, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("max_memory", [None, 20_000])
def test_a_file_gives_the_plan_of_its_samples(max_memory: int | None, processor: Any, samples: list[Any], tmp_path: Path) -> None:
    path = keep(samples, tmp_path / "general.safetensors", processor)
    config = CordaConfig(rank=4, parts=EVERYWHERE.parts, max_memory=max_memory)
    with pytest.warns(UserWarning, match=rf"6 of 34 layers get no adapter.*{path.name}"):  # LLaVA's dead ones
        found = planned(path, None, config)
    assert_same(found, planned(samples, processor))
    adapted = prepare(tiny_llava(), str(path), rank=4)
    assert all("language_model" in name for name in attachment_of(adapted).plan.layers)


def test_files_and_samples_count_as_if_collected_at_once(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    """Also where a file saw texts alone, which reach no layer of the vision tower."""
    model = tiny_llava()
    texts = keep(TEXTS, tmp_path / "texts.safetensors", processor)
    first, rest = keep(samples[:5], tmp_path / "first.safetensors", processor), samples[5:]
    expected = collect_context(model, [*samples, *TEXTS], EVERYWHERE, processor)
    for context in ([texts, first, *rest], [str(first), *rest, *TEXTS], [texts, *samples]):
        found = collect_context(model, context, EVERYWHERE, processor)
        assert found.keys() == expected.keys()
        for name, covariance in found.items():
            torch.testing.assert_close(covariance.matrix, expected[name].matrix, rtol=1e-5, atol=1e-6)
            assert (covariance.num_tokens, covariance.weight) == (expected[name].num_tokens, expected[name].weight)
    q, k = (found[f"model.language_model.layers.0.self_attn.{key}_proj"] for key in "qk")
    assert q is k


def test_token_weights_count_in_the_sum(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    config = CordaConfig(rank=4, tokens={"image": 0.25, "text": 1})
    model = tiny_llava()
    parts = [collect_context(model, part, config, processor) for part in (samples[:3], TEXTS)]
    whole = collect_context(model, [*samples[:3], *TEXTS], config, processor)
    for name, covariance in together(parts).items():
        torch.testing.assert_close(covariance.matrix, whole[name].matrix, rtol=1e-5, atol=1e-6)
        assert covariance.weight == pytest.approx(whole[name].weight)
        assert covariance.weight < covariance.num_tokens
    save_covariances(whole, tmp_path / "weighted.safetensors", model=model, data="", options={"tokens": {"image": 0.25, "text": 1.0}})
    assert read_covariances(tmp_path / "weighted.safetensors").covariances([name])[name].weight == whole[name].weight
    plan_contexts(model, [tmp_path / "weighted.safetensors"], config)
    with pytest.raises(ValueError, match=r"weighted\.safetensors was made with other options: {'tokens'.*but here is {}"):
        plan_contexts(model, [tmp_path / "weighted.safetensors"], CordaConfig(rank=4))


def test_a_file_may_be_a_further_context(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    path = keep(samples, tmp_path / "general.safetensors", processor)
    adapted = prepare(tiny_llava(), 8 * TEXTS, processor=processor, further_contexts=[path], rank=4)
    expected = prepare(tiny_llava(), 8 * TEXTS, processor=processor, further_contexts=[samples], rank=4)
    for name, init in attachment_of(adapted).plan.layers.items():
        assert torch.equal(init.A0, attachment_of(expected).plan.layers[name].A0)
    assert len(attachment_of(adapted).plan.layers) == 14


def test_a_budget_is_spread_from_a_file(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    path = keep(samples, tmp_path / "general.safetensors", processor)
    for config in (CordaConfig(rank=4, budget="rank"), CordaConfig(rank=4, budget="rank", max_memory=20_000)):
        found, expected = (plan_contexts(tiny_llava(), [context], config, processor) for context in (path, samples))
        assert {name: init.rank for name, init in found.layers.items()} == {name: init.rank for name, init in expected.layers.items()}


def test_what_a_file_cannot_be_is_said(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    language = keep(samples, tmp_path / "language.safetensors", processor, CordaConfig(rank=4))
    with pytest.raises(ValueError, match=r"language\.safetensors holds no samples of which 5 candidates could be drawn; set candidates=1"):
        prepare(tiny_llava(), language, variant="corda++", rank=4)
    with pytest.raises(ValueError, match=r"language\.safetensors holds nothing of the .* layers that are to be adapted"):
        prepare(tiny_llava(), language, parts=["vision"], rank=4)
    with pytest.warns(UserWarning, match=r"20 of 34 layers get no adapter, such as model\.vision_tower.*language\.safetensors"):
        prepare(tiny_llava(), language, parts=EVERYWHERE.parts, rank=4)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        prepare(tiny_llava(), "none.safetensors", rank=4)
    with pytest.raises(ValueError, match=r"images_texts names 'kept\.json'; expected samples, or keep files, whose names end in"):
        prepare(tiny_llava(), "kept.json", rank=4)
    with pytest.raises(ValueError, match=r"language\.safetensors was made for another model"):
        prepare(tiny_llama(), language, rank=4)
    other = tiny_llava()
    other.model.language_model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(
        ValueError, match=r"language\.safetensors was made with other base weights: \w+…, but here is .*nor was this model merged"
    ):
        prepare(other, language, rank=4)
    whole = language.read_bytes()
    language.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=re.escape(f"{language} is damaged")):
        prepare(tiny_llava(), language, rank=4)
