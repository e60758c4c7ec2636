"""The divergence from the base: against float64, bit for bit the base's, and refused where the base is not there."""

from typing import Any

import pytest
import torch
from families import build
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import corda_vlm
from corda_core.linears import base_of
from corda_vlm.data.samples import Collator
from corda_vlm.training import divergence
from corda_vlm.training.divergence import base_outputs, context_kl, keep_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min")


def moved(model: nn.Module, amount: float = 0.3) -> nn.Module:
    """Return the model with all that trains moved by noise."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(model: nn.Module, samples: Any, processor: Any, **options: Any) -> Any:
    return corda_vlm.prepare(model, samples, processor=processor, rank=4, parts=["language"], **options)


def reference(base: Tensor, new: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over the counted positions of KL(base ‖ new), densely in float64."""
    log_p, log_q = base.double().log_softmax(-1), new.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)[counts].mean()


@pytest.mark.parametrize("protect", ["strict", "start", "whitened"])
def test_loss_and_gradient_are_those_of_a_dense_float64_reference(
    protect: str, llava: Any, processor: Any, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CHUNK", 60)  # several chunks
    batch = Collator(processor)([*samples[:2], {"text": "one two three circle is"}])
    with torch.no_grad():
        before = llava(**batch).logits
    model = adapted(llava, samples, processor, protect=protect, train_fully=["projector"])
    assert context_kl(model, [batch]) == 0
    assert keep_loss(model, batch).item() == 0
    moved(model)
    counts = (batch["attention_mask"] > 0) & (batch["input_ids"] != llava.config.image_token_id)
    counts[:, 1:] &= batch["attention_mask"][:, :-1] > 0
    counts[:, 0] = False
    expected = reference(before, model(**batch).logits, counts.roll(-1, 1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(expected, trained)
    value = keep_loss(model, batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert context_kl(model, [batch]) == pytest.approx(expected.item(), rel=1e-4)
    for gradient, other in zip(torch.autograd.grad(value, trained), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_adapter_a_model_is_its_base_bit_for_bit(dtype: torch.dtype, llava: Any, processor: Any, samples: Any) -> None:
    batch = Collator(processor)(samples[:3])
    llava.to(dtype)
    with torch.no_grad():
        expected = llava(**batch).logits
    model = moved(adapted(llava, samples, processor, protect="start", train_fully=["projector"])).train()
    takes_gradients = [parameter.requires_grad for parameter in model.parameters()]
    with base_outputs(model):
        assert torch.equal(model(**batch).logits, expected)
        assert takes_gradients == [parameter.requires_grad for parameter in model.parameters()]
    assert model.training
    assert not torch.equal(model(**batch).logits, expected)


def test_batches_padding_and_labels_do_not_change_it(llama: Any, tokenizer: Any) -> None:
    items = [{"text": "one two three"}, {"text": "the circle is in this shape"}, {"question": "what is one two ?", "answer": "three"}]
    model = moved(adapted(llama, items * 8, tokenizer))
    collate = Collator(tokenizer)
    whole = context_kl(model, [collate(items)])
    alone = [(context_kl(model, [batch]), divergence.num_kept(model, batch, divergence.Kind.DISTILL)) for batch in map(collate, zip(items))]
    assert whole == pytest.approx(sum(kl * count for kl, count in alone) / sum(count for _, count in alone), rel=1e-4)
    assert context_kl(model, [collate([item]) for item in items]) == pytest.approx(whole, rel=1e-4)
    trained = Collator(tokenizer, with_labels=True, trim_logits=True)(items[2:])
    assert context_kl(model, [trained]) == pytest.approx(alone[2][0], rel=1e-4)


def test_replay_is_the_loss_of_responses_or_of_all_text(llama: Any, tokenizer: Any) -> None:
    items = [{"question": "what is one two ?", "answer": "three"}]
    model = moved(adapted(llama, items * 8, tokenizer))
    batch = Collator(tokenizer, with_labels=True)(items)
    assert keep_loss(model, batch, kind="replay").item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    text = Collator(tokenizer)([{"text": "the circle is in this shape"}])
    expected = model(**text, labels=text["input_ids"]).loss.item()
    assert keep_loss(model, text, kind="replay").item() == pytest.approx(expected, rel=1e-6)
    labelled = Collator(tokenizer, with_labels=True, whole_texts=True)([{"text": "the circle is in this shape"}])
    assert keep_loss(model, labelled, kind="replay").item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_two_towers_keep_similarities_and_features(family: str) -> None:
    base, batch = build(family)
    with torch.no_grad():
        before = base(**batch)
    model = corda_vlm.prepare(base, [batch], rank=2, num_samples=1)
    assert keep_loss(model, batch).item() == pytest.approx(0, abs=1e-9)
    moved(model, 1.0)
    after = model(**batch)
    scale = base_of(model).logit_scale.exp().double()
    bias = getattr(base_of(model), "logit_bias", None)
    old, new = (scale * out.image_embeds.double() @ out.text_embeds.double().T for out in (before, after))
    if bias is None:
        both = [(old.log_softmax(dim), new.log_softmax(dim)) for dim in (0, 1)]
        kl = sum((p.exp() * (p - q)).sum() for p, q in both) / (2 * len(old))
    else:
        p, q = (old + bias.double()).sigmoid(), (new + bias.double()).sigmoid()
        kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / len(old)
    distance = (
        scale / 4 * sum((getattr(after, key) - getattr(before, key)).square().sum(1).mean() for key in ("image_embeds", "text_embeds"))
    )
    assert context_kl(model, [batch]) == pytest.approx(float(kl), rel=1e-3, abs=1e-7)
    assert keep_loss(model, batch).item() == pytest.approx(float(kl + distance), rel=1e-3)
    keep_loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_base_that_is_not_there_is_told(llama: Any, tokenizer: Any) -> None:
    items = [{"text": "the circle is in this shape"}] * 8
    batch = Collator(tokenizer)(items[:1])
    with pytest.raises(ValueError, match="carries no adapter"):
        keep_loss(llama, batch)
    subtracted = adapted(llama, items, tokenizer, protect="start", residual="subtract")
    with pytest.raises(ValueError, match='residual="subtract"'):
        keep_loss(subtracted, batch)


def test_a_start_of_pefts_that_writes_the_base_is_told(llama: Any, tokenizer: Any) -> None:
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="pissa"):
        keep_loss(model, Collator(tokenizer)([{"text": "the circle is in this shape"}]))


def test_text_without_anything_predicted_is_told(llama: Any, tokenizer: Any) -> None:
    model = adapted(llama, [{"text": "the circle is in this shape"}] * 8, tokenizer)
    with pytest.raises(ValueError, match="no samples to keep with a text token"):
        keep_loss(model, {"input_ids": torch.tensor([[5]])})
    with pytest.raises(ValueError, match="no samples"):
        context_kl(model, [])
    moved(model)
    batch = Collator(tokenizer)([{"text": "the circle is in this shape"}])
    assert context_kl(model, [{"input_ids": torch.tensor([[5]])}, batch]) == context_kl(model, [batch])  # beside others it counts nothing
    for kind in divergence.Kind:
        total, _ = divergence.kept_sum(model, {"input_ids": torch.tensor([[5]])}, kind, 0)
        total.backward()
        assert total.item() == 0
