"""Pretrain the lab's vision tower and projector on the training split of easy-VQA; the language model stays frozen.

    python -m corda_eval.lab.pretrain --output eval/lab/weights

1. Without the language model: the projected image tokens are drawn to its input embeddings of the words that name the
   image, the even tokens to the colour, the odd ones to the shape (words read off the training questions).
2. Under the frozen language model: answer the training questions.

Writes ``vision_projector.safetensors`` (bfloat16), ``pretrain_log.jsonl`` and ``scores.json`` (whole test split).
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, TrainingArguments, set_seed

from corda_core.files import replacing_in
from corda_eval.lab.base import assemble_lab, vision_state
from corda_eval.lab.score import score_easy_vqa
from corda_eval.lab.shapes import COLOURS, SHAPES, named_images
from corda_eval.records import timed_log, write_json
from corda_eval.vqa.easy_vqa import load_easy_vqa
from corda_eval.vqa.example import VqaExample
from corda_vlm.data.samples import Collator

SHARPNESS = 20.0
"""Scale of the cosines in the naming loss: 11 words can be told apart with certainty, yet gradients do not vanish early."""


def pretrain(
    output: Annotated[Path, typer.Option(help="Folder for weights, log and scores.")],
    epochs: Annotated[int, typer.Option(help="Passes over the 4,000 images without the language model.")] = 35,
    steps: Annotated[int, typer.Option(help="Steps under the language model.")] = 560,
    batch_size: Annotated[int, typer.Option(help="Questions a step.")] = 32,
    naming_rate: Annotated[float, typer.Option(help="Peak learning rate of the first stage (AdamW).")] = 1e-3,
    answering_rate: Annotated[float, typer.Option(help="Peak learning rate of the second stage (AdamW).")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and flips.")] = 0,
) -> None:
    """Train tower and projector, score them on the test split and write the weights."""
    start = time.time()
    set_seed(seed)
    record = timed_log(output / "pretrain_log.jsonl")
    model, processor = assemble_lab(None)
    model.set_attn_implementation("eager")  # on a CPU faster than the fused kernel at 40 tokens
    model.requires_grad_(False)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(True).float()  # optimised in float32, rounded once at the end
    examples = load_easy_vqa("train")
    learn_names(model, processor, examples, epochs=epochs, learning_rate=naming_rate, record=record)
    learn_to_answer(model, processor, examples, steps=steps, batch_size=batch_size, learning_rate=answering_rate, seed=seed, record=record)
    with replacing_in(output) as fresh:
        save_file(vision_state(model), fresh / "vision_projector.safetensors")
    model.to(torch.bfloat16)
    scores = score_easy_vqa(model, processor) | {"minutes": round((time.time() - start) / 60, 1), "seed": seed}
    write_json(output / "scores.json", scores)
    print(scores)


def learn_names(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: list[VqaExample],
    *,
    epochs: int,
    learning_rate: float,
    record: Callable[..., None],
) -> None:
    """Draw the image tokens to the embeddings of the words that name the image; the language model does not run."""
    pixels, names = _named_images(processor, examples)
    tokens = [processor.tokenizer(f" {word}")["input_ids"] for word in (*COLOURS, *SHAPES)]
    embeddings = model.get_input_embeddings().weight.detach().float()
    words = torch.stack([embeddings[ids].mean(0) for ids in tokens])
    parameters = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    batches = len(pixels) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=epochs * batches, pct_start=0.1)
    for epoch in tqdm(range(epochs), desc="names"):
        total = torch.zeros(3)
        for chosen in torch.randperm(len(pixels))[: batches * 64].view(batches, 64):
            features = model.model.vision_tower(_moved(pixels[chosen])).last_hidden_state[:, 1:]
            projected = model.model.multi_modal_projector(features)
            loss, right = _naming_loss(projected, names[chosen], words)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            total += torch.stack([loss.detach(), *right]) / batches
        record(
            stage="names", epoch=epoch, loss=round(total[0].item(), 4), colour=round(total[1].item(), 4), shape=round(total[2].item(), 4)
        )


def _naming_loss(projected: Tensor, names: Tensor, words: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the share of right colours and shapes.

    Cross-entropy of the cosines between the mean token and the words, and the squared distance of each token to its word,
    relative to the words' mean square.

    Args:
        projected: (batch, tokens, hidden).
        names: (batch, 2) numbers of the colour and the shape among ``words``.
        words: (11, hidden) embeddings, colours first.
    """
    losses, right = [], []
    for kind, (first, last) in enumerate(((0, len(COLOURS)), (len(COLOURS), len(words)))):
        tokens, target = projected[:, kind::2], words[names[:, kind]]
        cosines = F.normalize(tokens.mean(1), dim=-1) @ F.normalize(words[first:last], dim=-1).T
        distance = (tokens - target[:, None]).square().mean() / words.square().mean()
        losses.append(F.cross_entropy(SHARPNESS * cosines, names[:, kind] - first) + 0.1 * distance)
        right.append((cosines.argmax(-1) == names[:, kind] - first).float().mean())
    return torch.stack(losses).sum(), right


def learn_to_answer(
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
    )
    items = [example.as_item() for example in _balanced(examples, seed)]
    trainer = Trainer(model, arguments, train_dataset=items, data_collator=Collator(processor, with_labels=True, trim_logits=True))
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            record(stage="answers", step=entry["step"], loss=round(entry["loss"], 4))


def _balanced(examples: list[VqaExample], seed: int) -> list[VqaExample]:
    """Return all questions that ask for a name, and the same number that ask for yes or no, drawn at random.

    Three in four questions are of the second kind, and most of what they teach is the base rate of "no".
    """
    naming = [example for example in examples if example.answer in (*COLOURS, *SHAPES)]
    deciding = [example for example in examples if example.answer not in (*COLOURS, *SHAPES)]
    return naming + random.Random(seed).sample(deciding, len(naming))


def _named_images(processor: LlavaProcessor, examples: list[VqaExample]) -> tuple[Tensor, Tensor]:
    """Return the pixels (images, 3, 64, 64) whose colour and shape the questions tell, and their numbers (images, 2)."""
    named = named_images(examples)
    pixels = processor.image_processor([image for image, _, _ in named], return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([[COLOURS.index(colour), len(COLOURS) + SHAPES.index(shape)] for _, colour, shape in named])


def _moved(pixels: Tensor) -> Tensor:
    """Return the batch mirrored and shifted by up to 8 pixels at random: colour and shape stay what they are.

    Not turned: every triangle points up, and telling all turns apart took three times as long.
    """
    mirrored = pixels.flip(-1) if torch.rand(()) < 0.5 else pixels
    top, left = torch.randint(17, (2,)).tolist()
    size = pixels.shape[-1]
    return F.pad(mirrored, (8, 8, 8, 8), mode="replicate")[..., top : top + size, left : left + size].contiguous()


if __name__ == "__main__":
    typer.run(pretrain)
