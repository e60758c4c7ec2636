"""Training that is held to its base: in the Trainer, in loops of one's own, to a budget, resumed, and refused with a sentence."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, tiny_llama, tiny_llava
from families import build
from peft import LoraConfig, get_peft_model
from PIL import Image
from recipes import write_recipe
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import corda_vlm
from corda_core.lora import squared_change, trained_tensors
from corda_vlm import Keep, KeepCallback, context_kl, keep_loss
from corda_vlm.data.samples import Collator
from corda_vlm.training import keep as keeping
from corda_vlm.training.divergence import base_outputs
from corda_vlm.training.keep import Keeper, KeepOptions
from corda_vlm.training.recipe import read_recipe
from corda_vlm.training.run import RunSummary, run_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min")

TEXTS = ("the shape in this is a circle", "what is one two ?", "assistant is in the circle", "two three is a")
KEPT = [{"text": text} for text in TEXTS] * 3
LEARNED = [{"question": "what color is the shape ?", "answer": answer} for answer in ("red", "blue", "green", "circle")] * 3


def prepared(tokenizer: Any, protect: str = "start") -> Any:
    return corda_vlm.prepare(tiny_llama(), KEPT, processor=tokenizer, rank=4, protect=protect)


def tuned(model: nn.Module, tokenizer: Any, keep: Keep | None, **options: Any) -> KeepCallback | None:
    callbacks = [] if keep is None else [KeepCallback(keep, tokenizer)]
    wanted = {"steps": 16, "batch_size": 4, "learning_rate": 2e-2, "seed": 0} | options
    corda_vlm.fine_tune(model, LEARNED, tokenizer, callbacks=callbacks, **wanted)
    return callbacks[0] if callbacks else None


def kept_kl(model: nn.Module, tokenizer: Any) -> float:
    return context_kl(model, [Collator(tokenizer)(KEPT)])


def measured_kl(callback: KeepCallback, model: nn.Module, tokenizer: Any) -> float:
    """Return the divergence on the samples that the callback measures."""
    assert callback.keeper is not None
    return context_kl(model, [Collator(tokenizer)([callback.keeper.samples[place] for place in callback.keeper.measured])])


def test_a_model_that_is_held_forgets_less(tokenizer: Any) -> None:
    alone, held, seldom, replayed = (prepared(tokenizer) for _ in range(4))
    tuned(alone, tokenizer, None)
    callback = tuned(held, tokenizer, Keep(KEPT, weight=20.0))
    tuned(seldom, tokenizer, Keep(KEPT, weight=20.0, every=4))
    tuned(replayed, tokenizer, Keep(KEPT, kind="replay"))
    forgotten = [kept_kl(model, tokenizer) for model in (alone, held, seldom)]
    assert forgotten[1] < 0.3 * forgotten[0]
    assert forgotten[2] < 0.6 * forgotten[0]
    assert callback is not None
    assert callback.kept is not None
    assert callback.kept.kl == pytest.approx(measured_kl(callback, held, tokenizer), rel=1e-3)
    assert (callback.kept.alpha, callback.kept.are_held_out) == (1.0, False)
    text = Collator(tokenizer)(KEPT)
    losses = [model(**text, labels=text["input_ids"]).loss.item() for model in (alone, replayed)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("protect", ["strict", "start", "whitened"])
@pytest.mark.parametrize("rate", [2e-3, 2e-2, 2e-1])
def test_a_budget_is_never_exceeded(protect: str, rate: float, tokenizer: Any) -> None:
    model = prepared(tokenizer, protect)
    callback = tuned(model, tokenizer, Keep(KEPT, budget=0.02), learning_rate=rate, steps=12)
    assert callback is not None
    assert callback.kept is not None
    assert callback.keeper is not None
    assert callback.kept.are_held_out
    assert callback.kept.kl <= 0.02
    assert measured_kl(callback, model, tokenizer) == pytest.approx(callback.kept.kl, rel=1e-3)
    if callback.kept.alpha < 1:
        assert callback.kept.kl >= 0.95 * 0.02


def test_a_budget_holds_within_one_autocast_context(tokenizer: Any) -> None:
    """Where weights cast to bfloat16 are kept until its end: those of before are not to be measured again."""
    model = prepared(tokenizer, "none")
    for trained, _ in trained_tensors(model):
        nn.init.normal_(trained, std=20.0)
    keeper = Keeper(model, KEPT, Collator(tokenizer), KeepOptions(budget=0.003), batch_size=2, num_steps=4)
    batches = [Collator(tokenizer)([KEPT[place]]) for place in keeper.measured]
    with torch.autocast("cpu", torch.bfloat16):
        assert context_kl(model, batches) > 2 * 0.003
        kept = keeper.finish_()
    assert kept is not None
    assert 0.9 * 0.003 <= kept.kl <= 0.003
    with torch.autocast("cpu", torch.bfloat16):
        assert context_kl(model, batches) == pytest.approx(kept.kl, rel=1e-2)


@pytest.mark.parametrize("protect", ["strict", "start", "whitened"])
def test_a_budget_of_nothing_gives_the_base_back(protect: str, tokenizer: Any) -> None:
    model, batch = prepared(tokenizer, protect), Collator(tokenizer)(LEARNED)
    callback = tuned(model, tokenizer, Keep(KEPT, budget=0.0), steps=5)
    assert callback is not None
    assert callback.kept is not None
    assert callback.kept.alpha == 0
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, tiny_llama()(**batch).logits)


def test_what_is_trained_whole_goes_back_too(processor: Any, samples: Any) -> None:
    model = corda_vlm.prepare(tiny_llava(), samples, processor=processor, rank=4, train_fully=["projector"])
    callback = KeepCallback(Keep(samples, budget=0.0), processor)
    corda_vlm.fine_tune(model, samples, processor, steps=3, batch_size=2, learning_rate=1e-2, seed=0, callbacks=[callback])
    batch = Collator(processor)(samples)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, tiny_llava()(**batch).logits)


def test_the_weight_follows_the_divergence_and_what_is_too_much_is_taken_back(tokenizer: Any) -> None:
    options = KeepOptions(budget=0.01, weight=2.0, every=2)
    keeper = Keeper(prepared(tokenizer, "strict"), KEPT, Collator(tokenizer), options, batch_size=2, num_steps=100, micro_batch_size=1)
    trained = [tensor for tensor, _ in trained_tensors(keeper.model)]
    aim = 0.01 * keeping.AIM
    for smoothed, weight in ((aim, 2.0), (aim / 2, 1.0), (aim / 1e6, 0.2), (aim * 1.2, 2.4), (aim * 1e6, 60.0)):
        keeper.smoothed = smoothed
        next(keeper.losses(0))  # the first of two parts: nothing is measured yet
        assert keeper.weight == pytest.approx(weight)
    for tensor in trained:
        nn.init.normal_(tensor, std=20.0)
    keeper.hold_()  # nothing has been measured: nothing is known
    assert list(keeper.losses(2))
    assert keeper.last is not None
    size = squared_change(keeper.model)
    assert keeper.sums == pytest.approx([keeper.last, size])
    for smoothed, step, expected, left in (
        (aim, 0, 4 * aim, 1.0),
        (aim * 1.2, 90, 4 * aim, 1.0),
        (aim * 1.2, 1, 4 * aim, 1.0),
        (aim * 1.2, 0, 4 * aim, 1.2**-0.3),
        (aim * 1e6, 0, 4 * aim, keeping.LEAST**2),
        (aim, 90, 20 * aim, 0.5),
        (aim * 1.2, 0, 20 * aim, 0.5),
        (aim, 90, 5e6 * aim, 1e-3),
    ):
        keeper.smoothed, keeper.step = smoothed, step
        keeper.sums, before = [expected, squared_change(keeper.model)], [tensor.detach().clone() for tensor in trained]
        keeper.hold_()
        for tensor, value in zip(trained, before, strict=True):
            torch.testing.assert_close(tensor, left * value)
        assert squared_change(keeper.model) * keeper.sums[0] / keeper.sums[1] <= keeping.CEILING * aim * (1 + 1e-4)


def test_own_loops_and_parts_give_the_same_gradient(tokenizer: Any) -> None:
    model = prepared(tokenizer)
    for tensor, _ in trained_tensors(model):
        nn.init.normal_(tensor, std=0.3)
    options = KeepOptions(weight=0.5, every=3, batch_size=5)
    gradients = []
    for micro_batch_size in (None, 2, 1):
        keeper = Keeper(model, KEPT, Collator(tokenizer), options, batch_size=2, num_steps=9, micro_batch_size=micro_batch_size)
        assert keeper.loss(4) is None
        loss = keeper.loss(3)
        assert loss is not None
        assert keeper.last is not None
        assert loss.item() == pytest.approx(0.5 * 3 * keeper.last, rel=1e-5)
        gradients.append(torch.autograd.grad(loss, [tensor for tensor, _ in trained_tensors(model)]))
    for other in gradients[1:]:
        for left, right in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_a_replay_needs_no_base(tokenizer: Any) -> None:
    subtracted = corda_vlm.prepare(tiny_llama(), KEPT, processor=tokenizer, rank=4, protect="start", residual="subtract")
    callback = tuned(subtracted, tokenizer, Keep(KEPT, kind="replay"), steps=3)
    assert callback is not None
    assert callback.kept is None
    assert callback.keeper is not None
    assert callback.keeper.last is not None


def test_dropout_is_no_divergence(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=22, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    model = corda_vlm.prepare(GPT2LMHeadModel(config), KEPT, processor=tokenizer, rank=4, batch_size=1).train()
    batch = Collator(tokenizer)(KEPT[:1])
    assert keep_loss(model, batch).item() == 0
    assert all(module.training for module in model.modules())


def test_an_adapter_of_any_name_is_kept(tokenizer: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama(), config, adapter_name="mine")
    callback = tuned(model, tokenizer, Keep(KEPT, budget=0.0), steps=3)
    assert callback is not None
    batch = Collator(tokenizer)(KEPT)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, tiny_llama()(**batch).logits)


def test_what_trains_beside_adapters_is_told(tokenizer: Any) -> None:
    model = prepared(tokenizer)
    norm = model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight of the base trains itself"):
        tuned(model, tokenizer, Keep(KEPT))
    norm.requires_grad_(False)
    dora = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="lora_magnitude_vector.* trains, which a budget cannot take back"):
        tuned(dora, tokenizer, Keep(KEPT, budget=0.1))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_two_towers_are_steered_by_what_their_budget_limits(family: str) -> None:
    base, batch = build(family)
    model = corda_vlm.prepare(base, [batch], rank=2, num_samples=1)
    for tensor, _ in trained_tensors(model):
        nn.init.normal_(tensor, std=1.0)
    keeper = Keeper(model, [batch] * 2, lambda batches: dict(batches[0]), KeepOptions(budget=0.1), batch_size=1, num_steps=4)
    loss = keeper.loss(0)
    assert loss is not None
    assert keeper.last == pytest.approx(context_kl(model, [batch]), rel=1e-4)
    assert loss.item() > 1.01 * keeper.weight * context_kl(model, [batch])  # which the distance of features is added to


def test_every_sample_comes_once_in_a_round_and_held_out_ones_never(tokenizer: Any) -> None:
    keeper = Keeper(prepared(tokenizer), KEPT, Collator(tokenizer), KeepOptions(budget=0.1, batch_size=3), batch_size=2, num_steps=9)
    assert sorted(place for number in range(3) for place in keeper._places(number)) == keeper.trained
    assert sorted(keeper.trained + keeper.measured) == list(range(len(KEPT)))
    assert keeper._places(0) != keeper._places(3)


def test_accumulation_and_checkpointing_change_nothing(tokenizer: Any, tmp_path: Path) -> None:
    """In transformers' own Trainer; TRL's is one."""
    weights = []
    for size, more in ((4, {}), (2, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}})):
        model = prepared(tokenizer)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, learning_rate=1e-2,
            remove_unused_columns=False, save_strategy="no", report_to=[], use_cpu=True, logging_steps=2, **more,
        )  # fmt: skip
        callback = KeepCallback(Keep(KEPT, batch_size=2), tokenizer)
        collate = Collator(tokenizer, with_labels=True)
        trainer = Trainer(model, arguments, train_dataset=LEARNED, data_collator=collate, callbacks=[callback])
        trainer.train()
        assert all({"keep_kl", "keep_weight"} <= entry.keys() for entry in trainer.state.log_history if "loss" in entry)
        weights.append([tensor.detach().clone() for tensor, _ in trained_tensors(model)])
    for left, right in zip(*weights, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-4)


def test_a_base_in_four_bits_is_kept_as_it_is_in_four_bits(tokenizer: Any) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    base = LlamaForCausalLM(LlamaConfig(**{**llama_config().to_dict(), **sizes, "head_dim": 16})).eval()
    model = corda_vlm.prepare(base, KEPT, processor=tokenizer, rank=4, quantize="nf4")
    batch = Collator(tokenizer)(KEPT)
    with torch.no_grad():
        before = model(**batch).logits
    callback = tuned(model, tokenizer, Keep(KEPT, budget=0.001), steps=6)
    assert callback is not None
    assert callback.kept is not None
    assert callback.kept.kl <= 0.001
    with base_outputs(model):
        assert torch.equal(model(**batch).logits, before)
    assert not torch.equal(model(**batch).logits, before)


def finished(path: Path, *overrides: str, resume: bool = False) -> RunSummary:
    return run_recipe(read_recipe(path, list(overrides)), resume=resume)


def test_a_run_that_is_resumed_keeps_as_it_did(processor: Any, tmp_path: Path) -> None:
    options = {"keep": {"budget": 0.001, "every": 2}, "training": {"micro_batch_size": 2, "learning_rate": 2e-2}}
    path = write_recipe(tmp_path, processor, **options)
    whole = finished(path, f"output={tmp_path / 'whole'}")
    assert whole.kept is not None
    assert whole.kept.kl <= 0.001
    assert "held-out" in str(whole.kept)
    record = json.loads((whole.output / "training.json").read_text())
    assert record["kept"] == vars(whole.kept)
    expected = load_file(whole.output / "adapter_model.safetensors")
    for steps_gone in (8, 6):  # at its end, and before its last steps
        finished(path, f"output={tmp_path / 'output'}")
        for step in range(steps_gone, 9, 2):
            if steps_gone < 8:
                shutil.rmtree(tmp_path / "output" / f"checkpoint-{step}", ignore_errors=True)
        again = finished(path, f"output={tmp_path / 'output'}", resume=True)
        assert (again.losses, again.kept) == (whole.losses, whole.kept)
        assert all(torch.equal(value, expected[key]) for key, value in load_file(again.output / "adapter_model.safetensors").items())
        shutil.rmtree(tmp_path / "output")


def test_what_cannot_be_kept_is_told(tokenizer: Any, processor: Any, tmp_path: Path) -> None:
    picture = [{"image": Image.new("RGB", (16, 16)), "text": "a circle"}]
    for keep, text in (
        (Keep([]), "keep has 0 sample"),
        (Keep(KEPT[:1], budget=0.1), "at least 2"),
        (Keep(picture), "tokenizer"),
    ):
        with pytest.raises(ValueError, match=text):
            tuned(prepared(tokenizer), tokenizer, keep)
    for wrong, text in (({"weight": -1.0}, "weight is -1"), ({"budget": -0.1}, "budget is -0.1"), ({"every": 0}, "every is 0")):
        with pytest.raises(ValueError, match=text):
            Keep(KEPT, **wrong)
    with pytest.raises(ValueError, match="replay"):
        Keep(KEPT, kind="replay", budget=1.0)  # type: ignore[arg-type]
    subtracted = corda_vlm.prepare(tiny_llama(), KEPT, processor=tokenizer, rank=4, protect="start", residual="subtract")
    with pytest.raises(ValueError, match="subtract"):
        tuned(subtracted, tokenizer, Keep(KEPT))
    path = write_recipe(tmp_path, processor, keep={})
    for overrides, text in ((["corda.residual=subtract"], "residual: subtract"), (["corda.mode=ipm"], "keep has no samples")):
        with pytest.raises(ValueError, match=text):
            read_recipe(path, overrides)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    arguments.fp16 = True
    callback = KeepCallback(Keep(KEPT), tokenizer)
    with pytest.raises(ValueError, match="fp16"):
        callback.on_train_begin(arguments, None, None, model=prepared(tokenizer))  # type: ignore[arg-type]


def test_losses_are_finite_where_the_base_rules_tokens_out(tokenizer: Any) -> None:
    """Some models give logits of minus infinity."""
    from corda_vlm.training.divergence import _SumOfKl

    before = torch.tensor([[0.0, -math.inf, 1.0]])
    after = torch.tensor([[0.5, -math.inf, 1.0]], requires_grad=True)
    total = _SumOfKl.apply(after, before, torch.tensor([0]))
    total.backward()
    p, q = before[:, ::2].double().softmax(-1), after.detach()[:, ::2].double().softmax(-1)
    assert total.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert after.grad is not None
    assert after.grad.isfinite().all()
