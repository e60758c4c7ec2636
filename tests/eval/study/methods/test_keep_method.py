"""Keeping a context beside an adapter, and bounding its drift, on a small random Llama."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import tiny_llama, tiny_llava
from torch import nn

from corda_core import select_linears
from corda_core.drift import context_drift
from corda_eval.study.change import kl_from_base, linear_copies
from corda_eval.study.methods.bounded import Bounded
from corda_eval.study.methods.keep import Keep, joined, samples_of
from corda_eval.study.settings.shared import self_written
from corda_eval.study.task import TARGET, Batch, Score, Task
from corda_eval.study.train import train
from corda_vlm.attention import split_attention
from corda_vlm.towers import select_layers
from corda_vlm.training.divergence import context_kl

LORA = {"method": "lora", "rank": 4}


def text_task(cache: Path, steps: int = 12) -> Task:
    """Learn one text by heart; others are to be kept."""
    model = tiny_llama().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    size = model.config.vocab_size

    def texts(count: int, length: int) -> Batch:
        return {"input_ids": torch.randint(size, (count, length), generator=generator)}

    def loss(adapted: nn.Module, batch: Batch) -> torch.Tensor:
        return adapted(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    learned = texts(2, 10)
    return Task(
        model=model,
        layers=select_linears(model),
        loss=loss,
        batches=[learned] * steps,
        contexts={"first": [texts(8, 8), texts(4, 8)], "second": [texts(8, 6)], TARGET: [learned]},
        validate=lambda adapted: float(loss(adapted, learned).detach()),
        measure=lambda _: {TARGET: Score(None)},
        cache=cache,
        seed=0,
        held_out={"first": [texts(4, 8)]},
    )


def trained(task: Task, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    adapted = Keep(LORA, **options).adapt(task)
    return adapted.model, train(adapted, task, 3e-2)


def test_samples_come_apart_and_together_again() -> None:
    batch = {"input_ids": torch.arange(6).view(2, 3), "pixel_values": torch.rand(2, 3, 4, 4)}
    samples = samples_of(batch)
    assert [len(sample["input_ids"]) for sample in samples] == [1, 1]
    assert all(torch.equal(value, batch[name]) for name, value in joined(samples).items())
    with pytest.raises(ValueError, match=r"differ in how many samples they have: \[1, 2\]"):
        samples_of({"input_ids": torch.zeros(2, 3), "pixel_values": torch.zeros(1, 3)})


def test_samples_of_several_lengths_are_padded_on_the_left() -> None:
    model = tiny_llama()
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10, 11, 12]])
    together = joined([{"input_ids": short}, {"input_ids": long, "pixel_values": torch.ones(1, 3)}])
    assert together["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert len(together.pop("pixel_values")) == 1
    with torch.no_grad():
        torch.testing.assert_close(model(**together).logits[0, 2:], model(input_ids=short).logits[0], rtol=1e-4, atol=1e-5)


def test_what_is_kept_moves_less(tmp_path: Path) -> None:
    moved = {}
    for weight in (1e-6, 3.0):
        task = text_task(tmp_path)
        model, run = trained(task, weight=weight)
        assert run.validation_losses[-1][1] < run.validation_losses[0][1]
        moved[weight] = run.finish["kl"]
        assert run.finish["alpha"] == 1
        measured = context_kl(model, [{"input_ids": torch.cat([batch["input_ids"] for batch in task.contexts["first"]])}])
        assert 0 < measured < 3 * moved[weight]
    assert moved[3.0] < 0.7 * moved[1e-6]


def test_nothing_at_the_start_and_every_third_step_three_times(tmp_path: Path) -> None:
    task = text_task(tmp_path)
    adapted = Keep(LORA, every=3).adapt(task)
    assert adapted.penalty is not None
    first = adapted.penalty()
    assert first is not None
    assert abs(first.item()) < 1e-6
    assert [adapted.penalty() is None for _ in range(5)] == [True, True, False, True, True]


def test_no_more_than_the_budget(tmp_path: Path) -> None:
    task = text_task(tmp_path, steps=20)
    model, run = trained(task, budget=0.01)
    assert run.finish["kl"] <= 0.01
    assert run.finish["are_held_out"] == 1
    model, run = trained(text_task(tmp_path), budget=0.0)
    assert run.finish["kl"] == run.finish["alpha"] == 0


def test_what_the_base_wrote_is_kept_and_written_once(tmp_path: Path, processor: Any, samples: list[dict[str, object]]) -> None:
    task = text_task(tmp_path)
    calls = []

    def written() -> Any:
        calls.append(self_written(tiny_llava(), processor, samples, count=8, seed=3, cache=tmp_path))
        return calls[-1]

    first = written()
    assert sum(len(batch["input_ids"]) for batch in first) == 8
    assert all("attention_mask" not in batch for batch in first)
    assert any(len(batch.get("pixel_values", [])) == len(batch["input_ids"]) for batch in first)
    (file,) = tmp_path.glob("self-*-3.jsonl")
    before = file.stat().st_mtime_ns
    texts = [{"input_ids": batch["input_ids"] % task.model.config.vocab_size} for batch in first]
    again = written()
    assert file.stat().st_mtime_ns == before
    assert all(torch.equal(new["input_ids"], old["input_ids"]) for new, old in zip(again, first, strict=True))
    task = replace(task, written=lambda model: texts)
    assert task.covariances("self").keys() == set(task.layers)
    _, run = trained(task, context=["self"])
    assert run.finish["num_samples"] == 2
    assert TARGET not in task.default_context("kpm")
    assert "self" not in task.default_context("kpm")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter": {"method": "full"}}, "'full' is unknown; expected method: one of corda, lora"),
        ({"adapter": LORA, "context": ["third"]}, "third is not one of this setting's: first, second, target"),
        ({"adapter": LORA, "context": ["self"]}, "self is not one of this setting's"),
        ({"adapter": LORA, "loss": "replay", "budget": 0.1}, "leave one of the two out"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        Keep(**options).adapt(text_task(tmp_path))


def test_the_divergence_from_copies_of_the_base_is_that_from_the_base(tmp_path: Path) -> None:
    task = text_task(tmp_path)
    originals = linear_copies(task.model, task.layers)
    model, _ = trained(task)
    batches = task.held_out["first"]
    assert kl_from_base(model, originals, batches) == pytest.approx(context_kl(model, batches), rel=1e-4)
    ids = batches[0]["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits.double().log_softmax(-1)[:, -4:-1]]
        with model.disable_adapter():  # type: ignore[operator]
            logits.insert(0, model(input_ids=ids).logits.double().log_softmax(-1)[:, -4:-1])
    expected = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()
    assert kl_from_base(model, originals, [{"input_ids": ids, "labels": labels}]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"adapter": {"method": "corda", "rank": 4, "protect": "strict"}}, {"adapter": LORA, "context": ["first"]}],
)
def test_the_drift_is_held_at_the_bound(options: dict[str, Any], tmp_path: Path) -> None:
    task = text_task(tmp_path)
    covariances = task.covariances(*options.get("context", task.default_context("kpm")))
    adapted = Bounded(**options, max_drift=0.03).adapt(task)
    run = train(adapted, task, 1e-1)
    assert run.validation_losses[-1][1] < run.validation_losses[0][1]
    drift = context_drift(adapted.model, covariances)
    assert fmean(value**2 for value in drift.values()) ** 0.5 == pytest.approx(0.03, rel=0.02)
    assert run.finish["drift"] == pytest.approx(0.03, rel=1e-3)


def test_a_bound_on_plain_lora_is_on_all_that_is_kept(tmp_path: Path) -> None:
    task = text_task(tmp_path)
    covariances = task.covariances("first", "second")
    adapted = Bounded(LORA, 0.02).adapt(task)
    train(adapted, task, 1e-1)
    drift = context_drift(adapted.model, covariances)
    assert fmean(value**2 for value in drift.values()) ** 0.5 == pytest.approx(0.02, rel=0.02)


def test_a_model_with_two_towers_is_kept_to_its_pairs(tmp_path: Path) -> None:
    """By as many as are trained on, where half as many texts are."""
    open_clip = pytest.importorskip("open_clip")
    towers = {"layers": 2, "width": 32, "heads": 2}
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    model = open_clip.CLIP(16, vision, {"context_length": 8, "vocab_size": 64, **towers}).requires_grad_(False).eval()
    images, texts = torch.randn(24, 3, 16, 16), torch.randint(1, 64, (24, 8))
    split_attention(model)
    layers = select_layers(model, parts=("vision",))

    def loss(adapted: nn.Module, batch: Batch) -> torch.Tensor:
        return adapted(image=batch["image"])[0].square().mean()

    task = Task(
        model=model,
        layers=layers,
        loss=loss,
        batches=[{"image": images[:6], "labels": torch.zeros(6)}] * 8,
        contexts={"pictures": [{"image": images}], TARGET: [{"image": images[:6]}]},
        validate=lambda adapted: float(loss(adapted, {"image": images[:6]}).detach()),
        measure=lambda _: {TARGET: Score(None)},
        cache=tmp_path,
        seed=0,
        pairs={"pictures": [{"image": images, "text": texts}]},
    )
    assert task.samples("pictures")[0].keys() == {"image", "text"}
    assert task.samples(TARGET)[0].keys() == {"image"}
    adapted = Keep(LORA).adapt(task)
    run = train(adapted, task, 1e-2)
    assert not run.diverged
    assert 0 < run.finish["kl"] < 1
    assert run.finish["num_samples"] == 6
