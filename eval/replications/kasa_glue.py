"""KaSA's GLUE recipe beside LoRA, on sentences with labels.

    python -m corda_eval.replications.kasa_glue --model roberta-base --data SST-2 --output runs/kasa_sst2.json

``--model`` is a folder with an encoder and its tokenizer. ``--data`` is a folder with ``train`` and ``dev`` in GLUE's layout for SST-2
(``.tsv`` with the header ``sentence<TAB>label``), or as ``.csv`` or ``.jsonl`` with those columns.
The defaults are those of the reference's ``runs/roberta_base_sst2.sh`` (juyongjiang/KaSA @ 73e4551): r = 8, alpha = 16, β = 1e-4, γ = 1e-3,
rate 5e-4 for adapters and head, batches of 128, 100 epochs, up to 512 tokens, no weight decay; and of its ``main.py``: AdamW, linear after
6 % of warm-up, gradients not clipped, query and value projections, the regulariser with outer products and averaged over the layers (see
``corda_eval.study.methods.kasa``). Its other tasks with RoBERTa-base take rates of 3e-4 to 4e-4.
LoRA has the same layers, rank, alpha, batches and rate, the untouched base and no regulariser. Both train the classification head.

Note:
    The reference reports the best accuracy on the dev set over its epochs (``main.py``), which favours long and noisy runs; here the
    last is shown beside it. Query and value projections are square, where the reference's truncation is PEFT's.
"""

import csv
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from corda_eval.records import read_lines, table, write_json
from corda_eval.study.methods.kasa import kasa_penalty

METHODS = ("lora", "kasa")
COLUMNS = ("sentence", "label")
Row = dict[str, str]


@dataclass(frozen=True)
class GlueRecipe:
    """What both methods are trained with."""

    rank: int = 8
    alpha: int = 16
    beta: float = 1e-4
    gamma: float = 1e-3
    rate: float = 5e-4
    batch_size: int = 128
    epochs: float = 100
    max_length: int = 512
    warmup: float = 0.06
    """Part of the steps."""

    seed: int = 0


@dataclass(frozen=True)
class Result:
    """How one method did on the dev set."""

    method: str
    trainable_parameters: int
    """With the classification head."""

    steps: int
    accuracies: list[float]
    """In percent, after each epoch and at the end."""

    training_loss: float
    """Mean over all steps, the regulariser included."""


def main(
    model: Annotated[Path, typer.Option(help="Folder of the encoder and its tokenizer.")],
    data: Annotated[Path, typer.Option(help="Folder with train and dev: .tsv, .csv or .jsonl with the columns sentence and label.")],
    output: Annotated[Path | None, typer.Option(help="JSON file for recipe and results.")] = None,
    rank: int = GlueRecipe.rank,
    alpha: int = GlueRecipe.alpha,
    rate: float = GlueRecipe.rate,
    batch_size: int = GlueRecipe.batch_size,
    epochs: float = GlueRecipe.epochs,
    max_length: int = GlueRecipe.max_length,
    seed: int = GlueRecipe.seed,
) -> None:
    """Train LoRA and KaSA and print their accuracy on the dev set."""
    recipe = GlueRecipe(rank, alpha, rate=rate, batch_size=batch_size, epochs=epochs, max_length=max_length, seed=seed)
    try:
        results = compare(model, data, recipe)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
    print(comparison(results))
    if output is not None:
        write_json(output, {"recipe": dataclasses.asdict(recipe), "results": [dataclasses.asdict(result) for result in results]})


def compare(model: Path, data: Path, recipe: GlueRecipe) -> list[Result]:
    """Return the results of LoRA and KaSA on a folder's task.

    Raises:
        FileNotFoundError: If the model's folder or a file of the data is missing.
        ValueError: If a file lacks the columns or has no rows, or the dev set has labels that the training set lacks.
    """
    rows = {split: read_rows(data, split) for split in ("train", "dev")}
    labels = sorted({row["label"] for row in rows["train"]})
    unknown = {row["label"] for row in rows["dev"]} - set(labels)
    if unknown:
        raise ValueError(f"The dev set has the label {min(unknown)!r}, the training set in {data} has only: {', '.join(labels)}.")
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"{model} holds no config.json; expected the folder of a transformers model.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = {split: encode(of_split, labels, tokenizer, recipe.max_length) for split, of_split in rows.items()}
    results = []
    for method in METHODS:
        set_seed(recipe.seed)
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(labels))
        results.append(_train(adapter(method, base, recipe), method, tokenizer, encoded, recipe))
    return results


def read_rows(folder: Path, split: str) -> list[Row]:
    """Return the sentences and labels of ``split.tsv`` (no quoting, as in GLUE), ``split.csv`` or ``split.jsonl``.

    Raises:
        FileNotFoundError: If none of the three is there.
        ValueError: If there are no rows, or one lacks a column.
    """
    path = next((path for suffix in (".tsv", ".csv", ".jsonl") if (path := folder / f"{split}{suffix}").is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no {split}.tsv, {split}.csv or {split}.jsonl; expected GLUE's layout for SST-2.")
    layout: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = read_lines(path) if path.suffix == ".jsonl" else list(csv.DictReader(file, **layout))
    if not rows:
        raise ValueError(f"{path} holds no rows; expected some with the columns sentence and label.")
    for number, row in enumerate(rows, 1):
        missing = [column for column in COLUMNS if row.get(column) is None]
        if missing:
            present = ", ".join(str(key) for key, value in row.items() if value is not None)
            raise ValueError(f"{path}: row {number} has no {missing[0]!r}, only {present}; expected the columns sentence and label.")
    return [{column: str(row[column]) for column in COLUMNS} for row in rows]


def encode(rows: Sequence[Row], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Return the rows as a model's inputs, unpadded, the labels by their place."""
    tokens = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=max_length)
    return [{**{key: value[i] for key, value in tokens.items()}, "labels": labels.index(row["label"])} for i, row in enumerate(rows)]


class KasaTrainer(Trainer):
    """transformers' Trainer with KaSA's regulariser added to the loss in training."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the loss of a batch, and the outputs where they are asked for."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            loss = loss + kasa_penalty(self.accelerator.unwrap_model(model), outer=True)()
        return (loss, outputs) if return_outputs else loss


def adapter(method: str, base: Any, recipe: GlueRecipe) -> PeftModel:
    """Return the classifier with LoRA or KaSA on the layers that PEFT has for its kind: query and value of BERT and RoBERTa."""
    kasa = KasaConfig(beta=recipe.beta, gamma=recipe.gamma) if method == "kasa" else None
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=recipe.rank, lora_alpha=recipe.alpha, kasa_config=kasa))


def _train(model: PeftModel, method: str, tokenizer: Any, data: Mapping[str, list[dict[str, Any]]], recipe: GlueRecipe) -> Result:
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # the Trainer wants a folder even if it saves nothing
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup,
        weight_decay=0.0,
        max_grad_norm=0.0,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=recipe.seed,
    )
    kind = KasaTrainer if method == "kasa" else Trainer
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trained = trainer.train()
    return Result(
        method=method,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=trained.global_step,
        accuracies=[round(entry["eval_accuracy"], 2) for entry in trainer.state.log_history if "eval_accuracy" in entry],
        training_loss=round(trained.training_loss, 5),
    )


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the percentage of right labels."""
    return {"accuracy": 100 * float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def comparison(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    rows = [
        [
            result.method,
            f"{result.trainable_parameters:,}",
            str(result.steps),
            f"{result.training_loss:.4f}",
            f"{result.accuracies[-1]:.2f} %",
            f"{max(result.accuracies):.2f} %",
        ]
        for result in results
    ]
    return "\n".join(table(["method", "parameters", "steps", "mean loss", "dev accuracy, last", "best"], rows))


if __name__ == "__main__":
    typer.run(main)
