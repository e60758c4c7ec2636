"""The contrastive loss, alone and over processes; fine-tuning of two towers; the classifier that starts from text."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from PIL import Image
from safetensors.torch import load_file, save_file
from test_attention import batch, clip, features
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainingArguments

import corda_vlm
from corda_vlm.training.contrastive import Features, contrastive_loss, features_of

open_clip = pytest.importorskip("open_clip")
pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:rank .* is larger", "ignore:.*never ran")
COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}


def pair_of(batch_size: int) -> tuple[Tensor, Tensor]:
    return F.normalize(torch.randn(batch_size, 8), dim=-1), F.normalize(torch.randn(batch_size, 8), dim=-1)


def test_losses_are_those_of_open_clip() -> None:
    image, text = pair_of(6)
    scale, bias = torch.tensor(12.0), torch.tensor(-3.0)
    expected = open_clip.ClipLoss()(image, text, scale)
    torch.testing.assert_close(contrastive_loss(Features(image, text, scale, None)), expected)
    expected = open_clip.loss.SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(contrastive_loss(Features(image, text, scale, bias)), expected)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_features_of_transformers_give_their_own_loss(family: str) -> None:
    model, inputs = build(family)
    expected = model(**inputs, return_loss=True).loss
    torch.testing.assert_close(contrastive_loss(features_of(model, inputs)), expected)


WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{tests!r}, {vlm!r}]
from safetensors.torch import load_file, save_file
from test_attention import clip
from corda_vlm.training.contrastive import contrastive_loss, features_of, over_processes
dist.init_process_group("gloo")
rank = dist.get_rank()
model = torch.nn.parallel.DistributedDataParallel(clip())
whole = load_file({folder!r} + "/batch.safetensors")
share = {{key: value[2 * rank : 2 * rank + 2] for key, value in whole.items()}}
contrastive_loss(over_processes(features_of(model, share))).backward()
gradients = {{name: parameter.grad for name, parameter in model.module.named_parameters()}}
save_file(gradients, {folder!r} + f"/gradients{{rank}}.safetensors")
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    whole = {key: torch.cat([batch(0)[key], batch(1)[key]])[:4].contiguous() for key in batch()}
    save_file(whole, tmp_path / "batch.safetensors")
    model = clip()
    contrastive_loss(features_of(model, whole)).backward()
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[2]), vlm=str(Path(__file__).parents[1]), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in (0, 1):
        gradients = load_file(tmp_path / f"gradients{rank}.safetensors")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def preprocess(image: Image.Image) -> Tensor:
    return torch.tensor(list(image.resize((16, 16)).tobytes()), dtype=torch.float32).reshape(16, 16, 3).permute(2, 0, 1) / 127.5 - 1


def tokenizer(captions: list[str]) -> Tensor:
    rows = [[49406, *[ord(letter) for letter in caption[:10]], 49407] for caption in captions]
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


def pictures() -> list[tuple[Image.Image, str]]:
    return [(Image.new("RGB", (16, 16), colour), name) for name, colour in COLOURS.items()]


def test_fine_tuning_teaches_pairs_and_the_checkpoint_is_open_clips() -> None:
    model = clip()
    keys = list(model.state_dict())
    adapted = corda_vlm.prepare(model, pictures(), "ipm", rank=8, processor=corda_vlm.OpenClipPairs(preprocess, tokenizer))
    pairs = corda_vlm.OpenClipPairs(preprocess, tokenizer)
    losses = corda_vlm.fine_tune(adapted, pictures(), pairs, steps=60, batch_size=4, learning_rate=3e-3, seed=0)
    assert losses[-1][1] < 0.3 * losses[0][1]
    merged = corda_vlm.merge(adapted)
    assert list(merged.state_dict()) == keys
    both = features(merged, pairs(pictures()))
    assert (both[:4] @ both[4:].T).argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["open_clip", "clip"])
def test_the_classifier_starts_as_zero_shot_and_learns(family: str) -> None:
    if family == "clip":
        model, _ = build("clip")

        def tokenize(prompts: list[str]) -> dict[str, Tensor]:
            ids = torch.tensor([[1, *[3 + ord(letter) % 50 for letter in f"{prompt:>6}"[-6:]], 2] for prompt in prompts])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    else:
        model, tokenize = clip(), tokenizer  # type: ignore[assignment]
    images, labels = torch.stack([preprocess(image) for image, _ in pictures()]), torch.arange(4)
    head = corda_vlm.zero_shot_head(model, tokenize, list(COLOURS), ["a {}", lambda name: f"the {name}"])
    if family == "open_clip":
        templates = [lambda name: f"a {name}", lambda name: f"the {name}"]
        expected = open_clip.build_zero_shot_classifier(model, tokenizer, list(COLOURS), templates, num_classes_per_batch=2)
        torch.testing.assert_close(head, expected.T, rtol=0, atol=1e-6)
    ready = [{"image": images, "text": tokenizer(list(COLOURS))}] if family == "open_clip" else [{**build("clip")[1]}]
    adapted = corda_vlm.prepare(model, ready, rank=4, parts=["vision"])
    classifier = corda_vlm.ZeroShotClassifier(adapted, head)
    before = classifier(images)["logits"]
    own = model.encode_image(images) if family == "open_clip" else model.get_image_features(pixel_values=images).pooler_output
    torch.testing.assert_close(before, model.logit_scale.exp() * F.normalize(own, dim=-1) @ head.T)
    optimizer = torch.optim.Adam([parameter for parameter in classifier.parameters() if parameter.requires_grad], 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        output = classifier(images, labels)
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(classifier.head.weight, head)
    with pytest.raises(ValueError, match="0 class"):
        corda_vlm.zero_shot_head(model, tokenize, [], ["a {}"])


def test_bad_pairs_are_named(samples: list[Any]) -> None:
    pairs = corda_vlm.OpenClipPairs(preprocess, tokenizer)
    with pytest.raises(ValueError, match=r"0 image\(s\) and the caption 'red'"):
        pairs([(None, "red")])
    with pytest.raises(ValueError, match="the caption None"):
        pairs([{"image": Image.new("RGB", (4, 4))}])
    with pytest.raises(ValueError, match=r"pass processor=corda_vlm\.OpenClipPairs"):
        corda_vlm.prepare(clip(), pictures(), rank=2)
    with pytest.raises(TypeError, match=r"no option 'preprocess': give processor=corda_vlm\.OpenClipPairs"):
        corda_vlm.prepare(clip(), pictures(), rank=2, preprocess=preprocess)


def pairs_to_learn(count: int) -> list[tuple[Image.Image, str]]:
    return [(Image.new("RGB", (16, 16), (9 * number, 99, 200 - 9 * number)), f"shade {number}") for number in range(count)]


def test_smaller_batches_at_the_end_are_left_out_wherever_pairs_are_learned(tmp_path: Path) -> None:
    adapted = corda_vlm.prepare(clip(), pairs_to_learn(9), "ipm", rank=4, processor=corda_vlm.OpenClipPairs(preprocess, tokenizer))
    pairs = corda_vlm.OpenClipPairs(preprocess, tokenizer)
    losses = corda_vlm.fine_tune(adapted, pairs_to_learn(9), pairs, steps=4, batch_size=4, learning_rate=1e-4, seed=0)
    assert all(loss > 0.5 for _, loss in losses)  # of one pair it is 0
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, report_to=[], remove_unused_columns=False, use_cpu=True)
    trainer = corda_vlm.training.train.trainer_for(adapted, pairs_to_learn(9), pairs, arguments, evaluation=pairs_to_learn(9))
    whole = corda_vlm.training.train.trainer_for(adapted, pairs_to_learn(9), pairs, arguments, evaluation=pairs_to_learn(8))
    assert trainer.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    assert not arguments.dataloader_drop_last


@pytest.mark.parametrize(("learned", "held_out", "name"), [(3, 8, "items has 3"), (8, 3, "evaluation has 3")])
def test_fewer_pairs_than_one_batch_are_refused(learned: int, held_out: int, name: str, tmp_path: Path) -> None:
    pairs = corda_vlm.OpenClipPairs(preprocess, tokenizer)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=4, report_to=[], remove_unused_columns=False, use_cpu=True
    )
    with pytest.raises(ValueError, match=rf"{name} pair\(s\), but a batch has 4, and only whole ones count"):
        corda_vlm.training.train.trainer_for(clip(), pairs_to_learn(learned), pairs, arguments, evaluation=pairs_to_learn(held_out))


@pytest.mark.parametrize(("steps", "rate"), [(2, 1e38), (3, 1e38), (6, 1e38), (6, 1e30)])
def test_training_that_leaves_the_numbers_is_refused(steps: int, rate: float) -> None:
    adapted = corda_vlm.prepare(clip(), pictures(), "ipm", rank=4, processor=corda_vlm.OpenClipPairs(preprocess, tokenizer))
    pairs = corda_vlm.OpenClipPairs(preprocess, tokenizer)
    for expected in (FloatingPointError, ValueError):
        with pytest.raises(expected, match=r"(loss|grad_norm) is (nan|inf) at step|has weights that are not finite at step"):
            corda_vlm.fine_tune(adapted, pictures(), pairs, steps=steps, batch_size=4, learning_rate=rate, seed=0)


def test_training_leaves_batch_statistics_of_the_base_alone(tmp_path: Path) -> None:
    """A ResNet tower that does not train: what moved in it would be in no file of the adapter."""
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=4, layers=2)

    def build_model() -> Any:
        torch.manual_seed(0)
        return open_clip.model.CLIP(32, vision, text).eval()

    pairs = [(Image.new("RGB", (32, 32), colour), name) for name, colour in COLOURS.items()]
    words = {name: number for number, name in enumerate(COLOURS, 5)}
    pairs_reader = corda_vlm.OpenClipPairs(
        lambda image: torch.tensor(list(image.resize((32, 32)).tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255.0,
        lambda texts: torch.tensor([[1, words[text], 63, 0, 0, 0, 0, 0] for text in texts]),
    )
    model = build_model()
    adapted = corda_vlm.prepare(model, pairs, rank=2, parts=["language"], processor=pairs_reader)
    corda_vlm.fine_tune(adapted, pairs, pairs_reader, steps=3, batch_size=4, learning_rate=1e-2, seed=0)
    assert any("running_mean" in name for name, _ in model.named_buffers())
    again = corda_vlm.load(build_model(), corda_vlm.save(adapted, tmp_path))
    assert torch.equal(features(again, pairs_reader(pairs)), features(adapted, pairs_reader(pairs)))
