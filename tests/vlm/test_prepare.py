"""The one call on a tiny LLaVA and a tiny Llama: identical outputs, every form of samples, clear refusals, the whole path."""

import dataclasses
import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import tiny_llama, tiny_llava
from peft import PeftModel
from torch import Tensor, nn

import corda_vlm
import corda_vlm.prepare
from corda_core import attachment_of, lora_layers
from corda_core.files import weight_digest
from corda_vlm import context
from corda_vlm.data.samples import Collator

prepare_module = sys.modules["corda_vlm.prepare"]  # the name in the package is the function
ALL_PARTS = ("vision", "projector", "language")


def logits(model: nn.Module, processor: Any, items: list[Any]) -> Tensor:
    with torch.no_grad():
        return model(**Collator(processor)(items)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [None, ALL_PARTS])
@pytest.mark.parametrize("protect", ["start", "strict", "whitened", "none"])
@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_llava_is_bit_identical_and_its_base_untouched(dtype: Any, parts: Any, protect: str, processor: Any, samples: list[Any]) -> None:
    model = tiny_llava().to(dtype)
    expected = logits(model, processor, samples)
    digest = weight_digest(model.state_dict())
    adapted = corda_vlm.prepare(model, samples, processor=processor, rank=4, parts=parts, protect=protect)
    assert isinstance(adapted, PeftModel)
    assert torch.equal(logits(adapted, processor, samples), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, processor, samples), expected)
    assert weight_digest(adapted.unload().state_dict()) == digest


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_the_whole_path(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    adapted = corda_vlm.prepare(tiny_llava(), samples, processor=processor, rank=8, parts=ALL_PARTS)
    start = {name: layer.lora_B["default"].weight.clone() for name, layer in lora_layers(adapted).items()}
    losses = corda_vlm.fine_tune(adapted, samples, processor, steps=40, batch_size=6, learning_rate=2e-2, seed=0)
    assert losses[-1][1] < losses[0][1] - 0.3
    assert all(not torch.equal(layer.lora_B["default"].weight, start[name]) for name, layer in lora_layers(adapted).items())
    corda_vlm.export(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, processor, samples), logits(adapted, processor, samples), rtol=0, atol=1e-5)


def test_the_default_trains_no_protected_direction(processor: Any, samples: list[Any]) -> None:
    adapted = corda_vlm.prepare(tiny_llava(), samples, processor=processor, rank=4)
    assert attachment_of(adapted).protect == "strict"
    assert {name.split(".")[-3] for name, parameter in adapted.named_parameters() if parameter.requires_grad} == {"lora_B"}


@pytest.mark.filterwarnings("ignore:.*reach the output", "ignore:.*saw .* tokens")
def test_lora_takes_the_same_layers_and_reads_no_context(llava: Any, processor: Any, samples: list[Any]) -> None:
    expected = logits(llava, processor, samples)
    names = attachment_of(corda_vlm.prepare(tiny_llava(), samples, processor=processor, rank=4, parts=ALL_PARTS)).plan.layers
    adapted = corda_vlm.prepare(llava, samples, "lora", processor=processor, rank=4, parts=ALL_PARTS)
    assert torch.equal(logits(adapted, processor, samples), expected)
    made = attachment_of(adapted)
    assert (list(made.plan.layers), made.protect, {init.num_tokens for init in made.plan.layers.values()}) == (list(names), "none", {0})
    losses = corda_vlm.fine_tune(adapted, samples, processor, steps=20, batch_size=6, learning_rate=2e-2, seed=0)
    assert losses[-1][1] < losses[0][1]
    with pytest.raises(ValueError, match="mode is lora, which starts at random and reads no context; leave out candidates"):
        corda_vlm.prepare(tiny_llava(), samples, "lora", processor=processor, variant="corda++")


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_dead_vision_blocks_are_left_out(llava: Any, processor: Any, samples: list[Any]) -> None:
    config = corda_vlm.CordaConfig(parts=["vision"])
    with pytest.warns(UserWarning, match=r"6 layer\(s\) ran, but what they compute does not reach the output, such as .*layers.2"):
        names = corda_vlm.collect_context(llava, samples, config, processor)
    assert {name.split("layers.")[1][0] for name in names} == {"0", "1"}
    llava.config.vision_feature_layer = -1
    assert any("layers.2" in name for name in corda_vlm.collect_context(llava, samples, config, processor))


def test_parts_and_targets(llava: Any) -> None:
    assert all(name.startswith("model.language_model") for name in corda_vlm.select_layers(llava))
    assert len(corda_vlm.select_layers(llava, parts=["projector"])) == 2
    # Bare "q_proj" also stands in the vision tower: `parts` keeps it where it belongs.
    assert len(corda_vlm.select_layers(llava, targets=["q_proj"])) == 2
    with pytest.raises(ValueError, match=r"\['audio'\] is not what Llava"):
        corda_vlm.select_layers(llava, parts=["audio"])
    with pytest.raises(ValueError, match="none of them in parts"):
        corda_vlm.select_layers(llava, targets=["linear_1"], parts=["language"])


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_every_form_of_samples_gives_the_same_plan(processor: Any, samples: list[Any]) -> None:
    def rows() -> Iterator[Any]:
        yield from samples

    batches = [Collator(processor)(samples[start : start + 5]) for start in range(0, len(samples), 5)]
    table = datasets.Dataset.from_list(samples)
    config = corda_vlm.CordaConfig(rank=4, batch_size=5)
    reference = corda_vlm.collect_context(tiny_llava(), samples, config, processor)
    for form in (rows(), table, batches, iter(batches)):
        covariances = corda_vlm.collect_context(tiny_llava(), form, config, processor)
        for name, covariance in reference.items():
            torch.testing.assert_close(covariances[name].matrix, covariance.matrix, rtol=1e-5, atol=1e-6)


def test_batch_size_does_not_change_the_covariances(processor: Any, samples: list[Any]) -> None:
    mixed = [*samples, (None, "a red circle"), {"question": "what shape is this ?", "answer": "a circle"}]
    by_one, at_once = (
        corda_vlm.collect_context(tiny_llava(), mixed, corda_vlm.CordaConfig(batch_size=size, parts=ALL_PARTS), processor)
        for size in (1, 14)
    )
    for name, covariance in by_one.items():
        assert at_once[name].num_tokens == covariance.num_tokens
        torch.testing.assert_close(at_once[name].matrix, covariance.matrix, rtol=1e-4, atol=1e-5)


def test_a_language_model_takes_its_tokenizer(tokenizer: Any) -> None:
    texts = [(None, "a red circle in this shape is blue"), {"text": "the color is green"}] * 20
    model = tiny_llama()
    expected = logits(model, tokenizer, texts[:2])
    adapted = corda_vlm.prepare(model, texts, "ipm", processor=tokenizer, rank=4)
    assert torch.equal(logits(adapted, tokenizer, texts[:2]), expected)
    assert len(lora_layers(adapted)) == 14


def test_the_processor_is_found_beside_the_model(tokenizer: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = type(tiny_llama()).from_pretrained(tmp_path)
    assert corda_vlm.prepare(model, [(None, "a red circle")] * 40, rank=2)


def test_more_samples_than_wanted_are_drawn_by_seed(tokenizer: Any) -> None:
    texts = [(None, word) for word in ["red", "blue", "green", "circle", "a", "one", "two", "shape"] * 4]
    drawn = [
        corda_vlm.collect_context(tiny_llama(), texts, corda_vlm.CordaConfig(num_samples=5, seed=seed), tokenizer) for seed in (0, 0, 1)
    ]
    name = next(iter(drawn[0]))
    assert drawn[0][name].num_tokens == 5
    assert torch.equal(drawn[0][name].matrix, drawn[1][name].matrix)
    assert not torch.equal(drawn[0][name].matrix, drawn[2][name].matrix)


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_a_memory_budget_changes_nothing(processor: Any, samples: list[Any]) -> None:
    whole, frugal = (
        corda_vlm.prepare(tiny_llava(), samples, processor=processor, rank=4, parts=ALL_PARTS, max_memory=budget)
        for budget in (None, "9KB")
    )
    expected = lora_layers(whole)
    for name, layer in lora_layers(frugal).items():
        assert torch.equal(layer.lora_A["default"].weight, expected[name].lora_A["default"].weight)
    names = corda_vlm.select_layers(tiny_llava(), parts=ALL_PARTS)
    assert sum(4 * tiny_llava().get_submodule(name).weight.shape[1] ** 2 for name in names) > 3 * 9000  # so several passes are needed
    batches = (Collator(processor)(samples[start : start + 3]) for start in (0, 3))
    with pytest.raises(ValueError, match=r"max_memory is 9000 bytes.*give a list or a DataLoader"):
        corda_vlm.prepare(tiny_llava(), batches, processor=processor, rank=4, max_memory="9KB")


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_a_gpu_that_is_too_small_gets_the_covariances_in_parts(
    processor: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="corda_vlm")
    whole = corda_vlm.prepare(tiny_llava(), samples, processor=processor, rank=4)
    assert "half of what is free" not in caplog.text, "CPUs have no limit"
    monkeypatch.setattr(prepare_module, "_room", lambda model: 9_000)
    batches = [Collator(processor)(samples[start : start + 3]) for start in (0, 3)]
    corda_vlm.prepare(tiny_llava(), batches, further_contexts=[iter(batches)], processor=processor, rank=4)
    assert "half of what is free" not in caplog.text, "batches that can be iterated once are"
    frugal = corda_vlm.prepare(tiny_llava(), samples, processor=processor, rank=4)
    assert caplog.text.count("half of what is free") == 1
    expected = lora_layers(whole)
    for name, layer in lora_layers(frugal).items():
        assert torch.equal(layer.lora_A["default"].weight, expected[name].lora_A["default"].weight)


@pytest.mark.parametrize("parts", [None, ALL_PARTS])
@pytest.mark.parametrize(("mode", "protect"), [("kpm", "start"), ("kpm", "strict"), ("kpm", "whitened"), ("ipm", "start")])
def test_corda_plus_plus(parts: Any, mode: str, protect: str, processor: Any, samples: list[Any]) -> None:
    many = [samples[place % len(samples)] for place in range(60)]
    model = tiny_llava()
    expected = logits(model, processor, samples)
    adapted = corda_vlm.prepare(model, many, mode, processor=processor, rank=4, parts=parts, protect=protect, variant="corda++")
    shapes = [layer.get_base_layer().weight.shape for layer in lora_layers(adapted).values()]
    cost = sum((m + n) * min(4, m, n) for m, n in shapes)
    assert torch.equal(logits(adapted, processor, samples), expected)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(adapted).items()}
    spent = sum(
        r * sum(layer.get_base_layer().weight.shape) for r, layer in zip(ranks.values(), lora_layers(adapted).values(), strict=True)
    )
    largest = max(sum(layer.get_base_layer().weight.shape) for layer in lora_layers(adapted).values())
    assert cost - largest < spent <= cost
    assert len(set(ranks.values())) > 1
    assert {name: layer.scaling["default"] for name, layer in lora_layers(adapted).items()} == dict.fromkeys(ranks, 1.0)


def test_candidates_and_budget_apart(tokenizer: Any) -> None:
    words = ["what", "color", "is", "the", "shape", "in", "this", "?", "red", "blue", "green", "circle", "a", "one", "two"]
    texts = [(None, " ".join(words[(place * step) % len(words)] for step in range(1, 9 + place // 15))) for place in range(60)]
    config = corda_vlm.CordaConfig(rank=4, candidates=3, num_samples=20)
    contexts = context.draw_contexts(texts, config)
    drawn = [set(context.indices) for context in contexts]
    assert [len(indices) for indices in drawn] == [20, 20, 20]
    assert not (drawn[0] & drawn[1])
    assert not (drawn[0] & drawn[2])
    assert not (drawn[1] & drawn[2])
    model = tiny_llama()
    adapter_plan = corda_vlm.plan_contexts(model, contexts, config, tokenizer)
    assert {init.rank for init in adapter_plan.layers.values()} == {4}
    assert {len(init.choice.candidates) for init in adapter_plan.layers.values()} == {3}
    assert {init.choice.index for init in adapter_plan.layers.values()} <= {0, 1, 2}
    spread = corda_vlm.plan_contexts(model, [texts], corda_vlm.CordaConfig(budget=5000, min_rank=2, max_rank=9), tokenizer)
    assert {len(init.choice.candidates) for init in spread.layers.values()} == {1}
    assert min(init.rank for init in spread.layers.values()) >= 2
    assert max(init.rank for init in spread.layers.values()) <= 9
    assert spread.num_parameters <= spread.provenance["budget"] == 5000
    within = corda_vlm.plan_contexts(
        model, [texts], corda_vlm.CordaConfig(budget=5000, min_rank=2, max_rank=9, max_memory="9KB"), tokenizer
    )
    assert {name: init.rank for name, init in within.layers.items()} == {name: init.rank for name, init in spread.layers.items()}
    several = corda_vlm.prepare(tiny_llama(), texts[:30], processor=tokenizer, rank=4, further_contexts=[texts[30:]])
    assert {layer.r["default"] for layer in lora_layers(several).values()} == {4}


def test_candidates_within_a_memory_limit(processor: Any, samples: list[Any]) -> None:
    """The same choice in several parts, though the contexts begin with different kinds of samples; and the limit holds for the sums."""
    texts = [{"text": "what color is the shape in this ?"}, {"text": "red blue green circle a one two"}] * 6
    contexts = [texts + samples * 4, samples * 4 + texts]
    config = corda_vlm.CordaConfig(rank=4, parts=ALL_PARTS, budget="rank", batch_size=4)
    free = corda_vlm.plan_contexts(tiny_llava(), contexts, config, processor)
    alive: list[weakref.ref[Any]] = []
    most = 0
    collect = prepare_module.collect

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        covariances = collect(*args, **kwargs)
        alive.extend(weakref.ref(C) for C in {id(C): C for C in covariances.values()}.values())
        gc.collect()
        most = max(most, sum(C().packed.num_bytes(C().packed.n, torch.float32) for C in alive if C() is not None))
        return covariances

    limit = 30_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "collect", watched)
        within = corda_vlm.plan_contexts(tiny_llava(), contexts, dataclasses.replace(config, max_memory=limit), processor)
    assert len(alive) > 2 * len({id(C) for C in alive if C() is not None})
    assert most <= limit
    for name, init in free.layers.items():
        assert (within.layers[name].rank, within.layers[name].choice.index) == (init.rank, init.choice.index)


def test_a_context_that_is_run_twice_must_be_a_list(tokenizer: Any) -> None:
    texts = [(None, "what color is the shape in this ? red blue green circle")] * 12
    with pytest.raises(ValueError, match="can be iterated only once"):
        corda_vlm.prepare(tiny_llama(), iter(texts), processor=tokenizer, rank=4, budget="rank", max_memory="9KB")


def test_mistakes_with_candidates_and_budgets(tokenizer: Any) -> None:
    texts = [(None, "what color is the shape in this ? red blue green circle")] * 12
    for options, words in (
        ({"budget": 100}, "budget of 100 parameters is below"),
        ({"budget": 5e6}, "budget is 5000000.0"),
        ({"budget": "rank", "damping": 0}, "damping is 0"),
        ({"protect": "whitened", "damping": 0}, "damping is 0"),
        ({"max_rank": 4}, "no budget to spread"),
        ({"budget": "all"}, "budget is 'all'"),
        ({"candidates": 0}, "candidates is 0"),
        ({"candidates": 13}, r"12 sample\(s\) for 13 candidates"),
        ({"candidates": 12}, "candidate 0 saw .* tokens for 32 inputs"),
        ({"variant": "corda+"}, "variant is 'corda\\+'"),
        ({"budget": "rank", "min_rank": 5, "max_rank": 4}, "min_rank <= max_rank"),
    ):
        with pytest.raises(ValueError, match=words):
            corda_vlm.prepare(tiny_llama(), texts, processor=tokenizer, rank=4, **options)


def test_tokens_weigh_images_and_text(processor: Any, samples: list[Any]) -> None:
    counts, matrices = {}, {}
    for tokens in ("all", "image", "text", {"image": 0.25, "text": 1.0}):
        config = corda_vlm.CordaConfig(tokens=tokens, parts=ALL_PARTS)
        covariances = corda_vlm.collect_context(tiny_llava(), samples, config, processor)
        for part in ("language_model.layers.0.self_attn.q_proj", "vision_tower.encoder.layers.0.self_attn.q_proj"):
            covariance = next(C for name, C in covariances.items() if name.endswith(part.rsplit("tower.", 1)[-1]))
            counts[part[:6], str(tokens)], matrices[part[:6], str(tokens)] = covariance.num_tokens, covariance.matrix
    images, words = counts["langua", "image"], counts["langua", "text"]
    assert images == 4 * len(samples)
    assert counts["langua", "all"] == images + words
    weighted = (0.25 * images * matrices["langua", "image"] + words * matrices["langua", "text"]) / (0.25 * images + words)
    torch.testing.assert_close(matrices["langua", "{'image': 0.25, 'text': 1.0}"], weighted, rtol=1e-4, atol=1e-5)
    assert torch.equal(matrices["vision", "image"], matrices["vision", "all"])


def test_the_output_embedding_may_be_adapted(tokenizer: Any) -> None:
    texts = [(None, "a red circle in this shape is blue")] * 5
    covariances = corda_vlm.collect_context(tiny_llama(), texts, corda_vlm.CordaConfig(targets=["lm_head"]), tokenizer)
    assert covariances["lm_head"].num_tokens == 5 * 8


@pytest.mark.parametrize(("samples", "processes", "batch_size"), [(256, 3, 1), (256, 3, 8), (11, 2, 3), (7, 7, 4), (5, 1, 2)])
def test_processes_have_equally_many_batches_and_all_samples(
    samples: int, processes: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "num_processes", lambda: processes)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(context, "process_rank", lambda rank=rank: rank)
        shares.append(context.share_out(samples, batch_size))
    assert len({len(share) for share in shares}) == 1
    assert all(group for share in shares for group in share)
    assert sorted(place for share in shares for group in share for place in group) == list(range(samples))
    with pytest.raises(ValueError, match="at least one for each"):
        context.share_out(processes - 1, batch_size)


def test_mistakes_get_one_clear_sentence(processor: Any, samples: list[Any], tokenizer: Any) -> None:
    for empty in ([], iter([])):
        with pytest.raises(ValueError, match="images_texts is empty"):
            corda_vlm.prepare(tiny_llava(), empty, processor=processor)
    with pytest.raises(ValueError, match='LlamaForCausalLM has no image among its text; leave tokens at "all"'):
        corda_vlm.prepare(tiny_llama(), [(None, "a red circle")], processor=tokenizer, tokens="text")
    with pytest.raises(ValueError, match="'q_prj' matches no linear layer; closest: .*q_proj"):
        corda_vlm.prepare(tiny_llava(), samples, processor=processor, targets=["q_prj"])
    with pytest.raises(ValueError, match="No processor was found"):
        corda_vlm.prepare(tiny_llava(), samples)
    with pytest.raises(ValueError, match=r"(?s)None of the 18 layers can learn .* .images for a vision tower"):
        corda_vlm.prepare(tiny_llava(), [(None, "a red circle")], processor=processor, parts=["vision"])
    with pytest.raises(ValueError, match="mode is 'both'"):
        corda_vlm.prepare(tiny_llava(), samples, "both", processor=processor)
    with pytest.warns(UserWarning, match="saw 3 tokens"), pytest.warns(UserWarning, match=r"rank 40 is larger than min\(m, n\)"):
        corda_vlm.prepare(tiny_llama(), [(None, "a red circle")], processor=tokenizer, rank=40)


def test_a_model_that_carries_an_adapter_is_refused(processor: Any, samples: list[Any]) -> None:
    adapted = corda_vlm.prepare(tiny_llava(), samples, rank=4, processor=processor)
    for again in (
        lambda: corda_vlm.prepare(adapted, samples, rank=4, processor=processor),
        lambda: corda_vlm.collect_context(adapted, samples, corda_vlm.CordaConfig(rank=4), processor),
    ):
        with pytest.raises(ValueError, match="carries the adapter 'default' already.*collect them before"):
            again()


def test_options_are_the_fields_of_the_config(samples: list[Any], processor: Any) -> None:
    config = corda_vlm.CordaConfig(mode="ipm", rank=3, parts=ALL_PARTS)
    whole = corda_vlm.prepare(tiny_llava(), samples, processor=processor, config=config)
    apart = corda_vlm.prepare(tiny_llava(), samples, "ipm", processor=processor, rank=3, parts=ALL_PARTS)
    for (name, layer), other in zip(lora_layers(whole).items(), lora_layers(apart).values(), strict=True):
        assert torch.equal(layer.lora_A["default"].weight, other.lora_A["default"].weight), name
    for options, words in (
        ({"rnak": 3}, "no option 'rnak': did you mean 'rank'"),
        ({"solver": "exact"}, "no option 'solver': leave it out"),
        ({"normalize": None}, "no option 'normalize': leave it out; corda_core.collect"),
        ({"candidates": [samples]}, "further_contexts"),
        ({"config": config, "rank": 3}, "both config and .*rank"),
        ({"config": config, "mode": "kpm", "alpha": 1.0}, "both config and .*alpha"),
    ):
        with pytest.raises(TypeError, match=words):
            corda_vlm.prepare(tiny_llava(), samples, processor=processor, **options)
    with pytest.raises(ValueError, match="leave one out"):
        corda_vlm.prepare(tiny_llava(), samples, processor=processor, candidates=2, further_contexts=[samples])
