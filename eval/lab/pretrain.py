"""Pretrain the lab's vision tower and projector on the training split of easy-VQA; the language model stays frozen.

    python -m corda_eval.lab.pretrain --output eval/lab/weights

1. Tower alone: name shape and colour of each image (labels read off the training questions), a few minutes.
2. Tower and projector under the frozen language model: answer the training questions.

Writes ``vision_projector.safetensors`` (bfloat16), ``pretrain_log.jsonl`` and ``scores.json`` (whole test split).
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, TrainingArguments, set_seed

from corda_eval.lab.base import assemble_lab, vision_state
from corda_eval.vqa.answer import answer_questions, exact_match
from corda_eval.vqa.easy_vqa import VqaExample, load_easy_vqa
from corda_vlm.data import Collator

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def pretrain(
    output: Annotated[Path, typer.Option(help="Folder for weights, log and scores.")],
    tower_epochs: Annotated[int, typer.Option(help="Passes over the 4,000 images, tower alone.")] = 15,
    steps: Annotated[int, typer.Option(help="Steps under the language model.")] = 600,
    batch_size: Annotated[int, typer.Option(help="Questions a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of both stages (AdamW, cosine).")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and flips.")] = 0,
) -> None:
    """Train tower and projector, score them on the test split and write the weights."""
    start = time.time()
    set_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    log = output / "pretrain_log.jsonl"
    log.write_text("")

    def record(**entry: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps({"seconds": round(time.time() - start), **entry}) + "\n")

    model, processor = assemble_lab(None)
    model.set_attn_implementation("eager")  # on a CPU faster than the fused kernel at 40 tokens
    model.requires_grad_(False)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(True).float()  # optimised in float32, rounded once at the end
    examples = load_easy_vqa("train")
    train_tower(model, processor, examples, epochs=tower_epochs, learning_rate=learning_rate, record=record)
    train_under_language(
        model, processor, examples, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed, record=record
    )
    weights = output / "vision_projector.safetensors"
    save_file(vision_state(model), weights.with_suffix(".part"))
    weights.with_suffix(".part").rename(weights)
    model.to(torch.bfloat16)
    scores = score(model, processor) | {"minutes": round((time.time() - start) / 60, 1), "seed": seed}
    (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(scores)


def train_tower(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: list[VqaExample],
    *,
    epochs: int,
    learning_rate: float,
    record: Callable[..., None],
) -> None:
    """Train the tower to name shape and colour through linear heads, which are then dropped."""
    pixels, labels = _named_images(processor, examples)
    tower = model.model.vision_tower
    width = tower.config.hidden_size
    heads = nn.ModuleList([nn.Linear(width, len(SHAPES)), nn.Linear(width, len(COLOURS))])
    optimiser = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=learning_rate, weight_decay=0.01)
    batches = len(pixels) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=epochs * batches, pct_start=0.1)
    for epoch in tqdm(range(epochs), desc="tower"):
        total = torch.zeros(3)
        for chosen in torch.randperm(len(pixels))[: batches * 64].view(batches, 64):
            features = tower(_turned(pixels[chosen])).last_hidden_state[:, 1:].mean(1)
            logits = [head(features) for head in heads]
            losses = [F.cross_entropy(one, labels[chosen, i], ignore_index=-1) for i, one in enumerate(logits)]
            loss = torch.stack(losses).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            right = [(one.argmax(-1) == labels[chosen, i]).float().mean() for i, one in enumerate(logits)]
            total += torch.stack([loss.detach(), *right]) / batches
        record(
            stage="tower", epoch=epoch, loss=round(total[0].item(), 4), shape=round(total[1].item(), 4), colour=round(total[2].item(), 4)
        )


def train_under_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: list[VqaExample],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    record: Callable[..., None],
) -> None:
    """Train tower and projector to make the frozen language model answer."""
    arguments = TrainingArguments(
        output_dir="unused",
        save_strategy="no",
        report_to=[],
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=10,
        remove_unused_columns=False,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    items = [example.as_item() for example in examples]
    trainer = Trainer(model, arguments, train_dataset=items, data_collator=Collator(processor, with_labels=True, trim_logits=True))
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            record(stage="language", step=entry["step"], loss=round(entry["loss"], 4))


def score(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> dict[str, float]:
    """Return the accuracy on the whole test split of easy-VQA, in percent, in all and by kind of answer."""
    examples = load_easy_vqa("test")
    answers = answer_questions(model, processor, examples, batch_size=64, progress=lambda x: tqdm(x, desc="test split"))
    kinds = {"yes/no": ("yes", "no"), "shape": SHAPES, "colour": COLOURS}
    right = [exact_match(answer, example.answer) for answer, example in zip(answers, examples, strict=True)]
    by_kind = {
        kind: [hit for hit, example in zip(right, examples, strict=True) if example.answer in names] for kind, names in kinds.items()
    }
    return {"questions": len(examples)} | {name: round(100 * sum(hits) / len(hits), 2) for name, hits in ({"all": right} | by_kind).items()}


def _named_images(processor: LlavaProcessor, examples: list[VqaExample]) -> tuple[Tensor, Tensor]:
    """Return (images, 3, 64, 64) pixels and (images, 2) shape and colour numbers, -1 where no question tells."""
    order: dict[int, int] = {}
    images: list[Image.Image] = []
    labels: list[list[int]] = []
    for example in examples:
        if id(example.image) not in order:
            order[id(example.image)] = len(images)
            images.append(example.image)
            labels.append([-1, -1])
        for kind, names in enumerate((SHAPES, COLOURS)):
            if example.answer in names:
                labels[order[id(example.image)]][kind] = names.index(example.answer)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor(labels)


def _turned(pixels: Tensor) -> Tensor:
    """Return the batch flipped or turned at random: shape and colour stay what they are."""
    return torch.rot90(pixels.flip(-1) if torch.rand(()) < 0.5 else pixels, int(torch.randint(4, ())), (-2, -1))


if __name__ == "__main__":
    typer.run(pretrain)
