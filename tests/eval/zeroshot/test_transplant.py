"""A LLaVA's tower back in the CLIP that it came from."""

from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_llama
from two_towers import TEXT, VISION, coloured, hugging_clip, hugging_siglip

import corda_vlm
from corda_eval.zeroshot.transplant import transplanted, vision_tower

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:rank .* is larger", "ignore:.*never ran")


def llava_of(original: Any, **vision: Any) -> Any:
    """Return a LLaVA that starts from this model's vision tower, as far as the weights' names agree."""
    siglip = isinstance(original, transformers.SiglipModel)
    tower = transformers.SiglipVisionConfig(**{**VISION, "vision_use_head": False, **vision}) if siglip else None
    config = transformers.LlavaConfig(
        vision_config=tower or transformers.CLIPVisionConfig(**{**VISION, "projection_dim": 16, **vision}),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=5,
        image_seq_length=4,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    if not vision:
        own = {name.removeprefix("vision_model."): weight for name, weight in original.vision_model.state_dict().items()}
        names = model.model.vision_tower.state_dict()
        model.model.vision_tower.load_state_dict({name: own[name.removeprefix("vision_model.")] for name in names})
    return model


def outputs(model: Any, pairs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**pairs.batch([coloured(1), coloured(2)], ["red", "blue"])).logits_per_image


@pytest.mark.parametrize("make", [hugging_clip, hugging_siglip])
def test_an_untouched_tower_gives_the_original(make: Any) -> None:
    original, pairs = make()
    before = outputs(original, pairs)
    copied = transplanted(original, llava_of(original))
    assert torch.equal(outputs(copied, pairs), before)
    assert copied is not original


def test_a_tuned_tower_is_the_copys_alone() -> None:
    original, pairs = hugging_clip()
    before = outputs(original, pairs)
    llava = llava_of(original)
    weight = vision_tower(llava).get_submodule("encoder.layers.0.mlp.fc1").weight
    with torch.no_grad():
        weight.mul_(3)
    changed = transplanted(original, llava.to(torch.float64))
    result = changed.vision_model.get_submodule("encoder.layers.0.mlp.fc1").weight
    assert torch.equal(result, weight.float())
    assert result.data_ptr() != original.vision_model.get_submodule("encoder.layers.0.mlp.fc1").weight.data_ptr()
    assert not torch.allclose(outputs(changed, pairs), before)
    assert torch.equal(outputs(original, pairs), before)


def test_towers_of_other_models_are_refused() -> None:
    original, _ = hugging_clip()
    with pytest.raises(ValueError, match=r"fc1.weight of the vision tower is \(48, 24\), the original's \(40, 24\)"):
        transplanted(original, llava_of(original, intermediate_size=48))
    with pytest.raises(ValueError, match=r"lacks the original's \['encoder.layers.1"):
        transplanted(original, llava_of(original, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"has \['encoder.layers.2"):
        transplanted(original, llava_of(original, num_hidden_layers=3))
    with pytest.raises(ValueError, match="LlamaForCausalLM has the vision towers"):
        transplanted(original, tiny_llama())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no vision_model"):
        transplanted(tiny_llama(), llava_of(original))


@pytest.mark.parametrize("options", [{}, {"residual": "subtract"}, {"parts": ["language"], "train_fully": ["vision"]}])
def test_an_adapted_tower_is_as_if_merged(options: Any) -> None:
    original, pairs = hugging_clip()
    llava = llava_of(original)
    ids = torch.tensor([[2, *[5] * 4, 9, 10]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pairs.read([coloured(1)])}
    adapted = corda_vlm.prepare(llava, [batch], rank=2, **{"parts": ["vision", "language"], **options})
    before = outputs(original, pairs)
    torch.testing.assert_close(outputs(transplanted(original, adapted), pairs), before)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "vision_tower" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    state = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    tuned = outputs(transplanted(original, adapted), pairs)
    assert all(torch.equal(weight, state[name]) for name, weight in adapted.state_dict().items())
    if not options:
        with adapted.disable_adapter():
            torch.testing.assert_close(outputs(transplanted(original, adapted), pairs), before)
    torch.testing.assert_close(tuned, outputs(transplanted(original, corda_vlm.merge(adapted)), pairs))
    assert not torch.allclose(tuned, before)
