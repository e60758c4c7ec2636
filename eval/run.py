"""Measure a base and what was tuned from it on a suite of tasks, and write what was gained and forgotten.

    corda-vlm eval --base my-llava --adapter runs/first --suite configs/suite_lab.yaml --output runs/first-eval

    output/base/easy_vqa.json, output/first/easy_vqa.json, …   each task's figures and predictions, as soon as it is done
    output/summary.json, report.md, report.html               the comparison

A task that is done is not run again, unless what is asked, who answers or a library's version has changed: then another output is wanted.
Under ``accelerate launch`` the tasks are shared out over the processes.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from torch.utils.data import Subset

from corda_core import lora_layers, weight_change
from corda_core.adapter import base_of
from corda_core.checkpoint import ATTACHMENT, WEIGHTS
from corda_core.distributed import num_processes, process_rank
from corda_core.files import write_whole
from corda_eval.comparison import averages, compare
from corda_eval.comparison_page import html, markdown, sentences, summary
from corda_eval.describe import library_versions
from corda_eval.task import TaskResult
from corda_eval.text.facts import facts_task
from corda_eval.text.harness import evaluate_text
from corda_eval.text.perplexity import held_out_text, text_windows, window_losses
from corda_eval.vqa import digits
from corda_eval.vqa import run as vqa
from corda_eval.vqa.example import VqaExample, VqaTask
from corda_eval.vqa.generate import BatchCheck, check_batch_invariance
from corda_eval.zeroshot import cifar, classify, folders, imagenet, likelihood, objectnet, retrieval
from corda_eval.zeroshot.captions import karpathy
from corda_eval.zeroshot.images import ClassifiedImages
from corda_eval.zeroshot.transplant import transplanted
from corda_vlm.adapted import load
from corda_vlm.config import from_mapping
from corda_vlm.context import collator_for, progress_bar
from corda_vlm.data import tokenizer_of
from corda_vlm.models import load_base
from corda_vlm.pairs import PairCollator
from corda_vlm.processes import processes
from corda_vlm.recipe import ModelConfig
from corda_vlm.towers import has_two_towers

IMAGE_SETS: dict[str, Callable[..., ClassifiedImages]] = {
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "imagenet1k": imagenet.imagenet1k,
    "imagenet_v2": imagenet.imagenet_v2,
    "imagenet-r": imagenet.imagenet_r,
    "imagenet-a": imagenet.imagenet_a,
    "imagenet_sketch": imagenet.imagenet_sketch,
    "objectnet": objectnet.objectnet,
    "image_folder": folders.image_folder,
}
"""Zero-shot classification: of models with two towers by similarity, of those that answer by the likelihood of the class's name."""

RETRIEVAL = "retrieval"
"""Images by captions and captions by images, of models with two towers."""

BENCHMARKS: dict[str, VqaTask] = {**vqa.TASKS, "digits": digits.TASK}
"""Questions about images."""

WINDOW = 256
BASE = "base"


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite."""

    task: str
    """"digits", "facts", "perplexity"; a benchmark of ``corda_eval.vqa.run``; one of ``IMAGE_SETS``; "retrieval"; a task of lm_eval, or a
    YAML file that defines one."""

    role: str = "kept"
    """"target": it was trained; "kept": it should not suffer."""

    data: str | None = None
    """Folder or file of its data, where it has any of its own; of a benchmark also an id of the datasets hub."""

    images: str | None = None
    """For "retrieval": folder that the images' names in ``data`` start from; None takes that of ``data``."""

    split: str | None = None
    """Which part of the data; None takes the one that is reported."""

    limit: int | None = None
    """Only the first examples."""

    tower_in: str | None = None
    """For ``IMAGE_SETS`` and "retrieval", of a LLaVA-type model: folder or id of the CLIP or SigLIP that its vision tower came from. It is
    measured with the model's tower in it."""

    name: str | None = None
    """What it is reported as; None takes the task's, or the file's, name."""

    @property
    def title(self) -> str:
        """What it is reported as."""
        return self.name or Path(self.task).stem

    def __post_init__(self) -> None:
        """Refuse values that cannot be right.

        Raises:
            ValueError: If an option has an impossible value.
        """
        if self.role not in ("target", "kept"):
            raise ValueError(f"{self.task}: role is {self.role!r}; expected target or kept.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"{self.task}: limit is {self.limit}; expected at least 1, or none for all.")
        if self.images is not None and self.task != RETRIEVAL:
            raise ValueError(f"{self.task}: images is {self.images!r}, which {RETRIEVAL} alone reads; leave it out.")
        if self.tower_in is not None and self.task not in (RETRIEVAL, *IMAGE_SETS):
            raise ValueError(f"{self.task}: tower_in is {self.tower_in!r}, but this is no task for two towers; leave it out.")


@dataclass(frozen=True)
class Suite:
    """What is measured."""

    tasks: Sequence[SuiteTask] = field(default_factory=list)
    batch_size: int = 1
    """Examples at once; 1 is the reference, as padding may change answers."""


def read_suite(path: Path) -> Suite:
    """Return the suite in a YAML file: ``tasks``, a list of task, role, data, split, limit; ``batch_size``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not of this form.
    """
    if not path.exists():
        raise FileNotFoundError(f"The suite {path} does not exist; expected a YAML file with a list of tasks.")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict) or not isinstance(values.get("tasks"), list) or not values["tasks"]:
        raise ValueError(f"{path} has no list of tasks; expected tasks: [{{task: easy_vqa, role: kept}}, …].")
    tasks = [from_mapping(one if isinstance(one, dict) else {"task": one}, SuiteTask, f"{path}, tasks") for one in values["tasks"]]
    names = [task.title for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"{path} names {next(name for name in names if names.count(name) > 1)!r} twice; give one of them another name.")
    return from_mapping(values | {"tasks": tasks}, Suite, str(path))


def batch_checks(base: ModelConfig, suite: Suite, count: int) -> dict[str, BatchCheck]:
    """Return for each benchmark of questions about images how many of its first answers depend on the suite's batch size.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If data are broken.
    """
    model, processor = load_base(base)
    found = {}
    for task in suite.tasks:
        benchmark = BENCHMARKS.get(task.task)
        if benchmark is not None:
            examples = _examples(task, benchmark, base.download)[:count]
            found[task.title] = check_batch_invariance(
                examples, model, processor, batch_size=suite.batch_size, max_new_tokens=benchmark.max_new_tokens
            )
    return found


def evaluate(base: ModelConfig, adapters: Mapping[str, Path], suite: Suite, output: Path, command: str = "") -> dict[str, Any]:
    """Measure base and adapters, write the comparison, and return its summary.

    Args:
        base: The untouched model.
        adapters: Folders by the names they are reported under: of ``corda-vlm train``, or of an ordinary LoRA.
        suite: The tasks.
        output: Folder; tasks that are done there are not run again.
        command: What was typed, for the record.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If data, adapter or output are not right.
    """
    start = time.time()
    processes()  # joins the others, if there are any
    results, changes = {}, {}
    digests = {name: _digest(folder) for name, folder in adapters.items()}
    for name in (BASE, *adapters):
        # Whether the base was fetched then or is here by now makes no difference.
        who = {"base": dataclasses.asdict(dataclasses.replace(base, download=False)), "adapter": digests.get(name)}
        done, change = _measured(output / name, who, base, adapters.get(name), suite)
        results[name] = done
        if change is not None:
            changes[name] = change
    if process_rank() != 0:
        return {}
    roles = {task.title: task.role for task in suite.tasks}
    rows = {name: compare(results[BASE], results[name], roles) for name in adapters}
    means = {name: averages(its) for name, its in rows.items()}
    facts = {
        "base": base.path,
        **{name: str(folder) for name, folder in adapters.items()},
        **{
            f"size of the change, {name}": f"{change:.2%} of the weights (mean of ‖ΔW‖/‖W‖ over layers)" for name, change in changes.items()
        },
        "precision": base.dtype,
        "batch size": str(suite.batch_size),
        **library_versions(),
        "command": command,
    }
    found = {
        "models": summary(results),
        "comparison": {
            name: {"rows": [dataclasses.asdict(row) | {"drop": row.drop, "retention": row.retention} for row in its]}
            | {"averages": dataclasses.asdict(means[name]), "change": changes.get(name)}
            for name, its in rows.items()
        },
        "facts": facts,
        "seconds": round(time.time() - start, 1),
    }
    write_whole(output / "summary.json", json.dumps(found, indent=1).encode())
    write_whole(output / "report.md", markdown(rows, means).encode())
    write_whole(output / "report.html", html("What was gained, what was forgotten", facts, rows, means).encode())
    return found | {"sentences": {name: sentences(its) for name, its in means.items()}}


def run_task(
    task: SuiteTask, model: nn.Module, processor: Any, *, batch_size: int = 1, predictions: Path | None = None, download: bool = False
) -> TaskResult:
    """Return one task's result.

    Args:
        task: What is asked.
        model: Adapted or not.
        processor: A processor, a tokenizer for text alone, or ``OpenClipPairs``.
        batch_size: Examples at once.
        predictions: For questions about images, a file that a killed run goes on from.
        download: Whether what is named by an id of the hub may be fetched.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If data are broken, or the task is not one for this model.
    """
    name, bar = task.task, partial(progress_bar, title=task.task)
    if name in (RETRIEVAL, *IMAGE_SETS):
        if task.tower_in is not None:
            model, processor = _in_original(task.tower_in, model, download)
        measure = _retrieval if name == RETRIEVAL else _zero_shot
        return measure(task, model, processor, batch_size, bar)
    benchmark = BENCHMARKS.get(name)
    if benchmark is not None:
        examples = _examples(task, benchmark, download)
        return vqa.evaluate(benchmark, examples, model, processor, predictions=predictions, batch_size=batch_size, progress=bar)
    if name == "perplexity":
        return _perplexity(task, model, tokenizer_of(processor), batch_size, bar)
    if name == "facts":
        return facts_task(model, tokenizer_of(processor), batch_size=batch_size, limit=task.limit)
    return evaluate_text(model, tokenizer_of(processor), [name], batch_size=batch_size, limit=task.limit)[0]


def _measured(
    output: Path, who: Mapping[str, Any], base: ModelConfig, folder: Path | None, suite: Suite
) -> tuple[list[TaskResult], float | None]:
    """Return a model's results, and by what part its weights changed; it is loaded only if a task is not done yet."""
    paths = {task: output / f"{task.title}.json" for task in suite.tasks}
    common = {"batch_size": suite.batch_size, **who, **library_versions()}
    asked = {task: json.loads(json.dumps({"task": dataclasses.asdict(task), **common})) for task in suite.tasks}
    open_tasks = [task for task in suite.tasks if not _is_done(paths[task], asked[task])]
    mine = open_tasks[process_rank() :: num_processes()]
    if mine:
        model, processor = load_base(base)
        if base.quantize is None:
            model.to(processes().device)
        if folder is not None:
            model = _adapted(model, folder)
        for task in mine:
            predictions = paths[task].with_suffix(".jsonl")
            result = run_task(task, model, processor, batch_size=suite.batch_size, predictions=predictions, download=base.download)
            change = weight_change(model) if lora_layers(model) else {}
            mean = sum(change.values()) / len(change) if change else None
            held = {"asked": asked[task], "change": mean, "result": dataclasses.asdict(result) | {"task": task.title}}
            write_whole(paths[task], json.dumps(held).encode())
            score = f"{result.headline} {result.metrics[result.headline]:.4g}"
            print(
                f"{output.name}: {task.title}: {score}, {result.num_examples} examples, {result.examples_per_second:.3g} a second",
                flush=True,
            )
    processes().wait_for_everyone()
    kept = [json.loads(paths[task].read_text()) for task in suite.tasks]
    return [TaskResult(**one["result"]) for one in kept], kept[0]["change"]


def _is_done(path: Path, asked: Mapping[str, Any]) -> bool:
    """Return whether a task's file is there.

    Raises:
        ValueError: If it answers another question, is of another model or was made with other versions.
    """
    if not path.exists():
        return False
    found = json.loads(path.read_text())["asked"]
    different = [key for key in asked if found.get(key) != asked[key]]
    if different:
        key = different[0]
        raise ValueError(f"{path} was made with another {key} ({found.get(key, 'not recorded')}); name another output, or remove it.")
    return True


def _zero_shot(task: SuiteTask, model: nn.Module, processor: Any, batch_size: int, bar: Any) -> TaskResult:
    data = IMAGE_SETS[task.task](_data_of(task))
    if task.limit is not None:
        data = dataclasses.replace(data, items=Subset(data.items, range(min(task.limit, len(data.items)))))
    if has_two_towers(base_of(model)):
        return classify.evaluate(model, data, _pairs(model, processor), batch_size=batch_size, progress=bar)
    return likelihood.evaluate(model, data, processor, batch_size=batch_size, progress=bar)


def _retrieval(task: SuiteTask, model: nn.Module, processor: Any, batch_size: int, bar: Any) -> TaskResult:
    if not has_two_towers(base_of(model)):
        raise ValueError(
            f"{task.title}: {type(base_of(model)).__name__} has no text tower to compare images with; expected CLIP or its like; name in "
            "tower_in what the vision tower came from, or leave the task out."
        )
    data = Path(_data_of(task)).expanduser()
    captioned = karpathy(data, task.images or data.parent, split=task.split or "test", limit=task.limit)
    return retrieval.evaluate(model, captioned, _pairs(model, processor), batch_size=batch_size, progress=bar)


def _pairs(model: nn.Module, processor: Any) -> PairCollator:
    pairs = collator_for(base_of(model), processor)
    assert isinstance(pairs, PairCollator), "two towers have such"
    return pairs


def _in_original(original: str, model: nn.Module, download: bool) -> tuple[nn.Module, Any]:
    """Return the model that a vision tower came from with this model's tower in it, in the same precision and place, and its processor."""
    weight = next(base_of(model).parameters())
    config = ModelConfig(original, dtype=str(weight.dtype).removeprefix("torch."), download=download)
    two_towers, processor = load_base(config)
    return transplanted(two_towers, model).to(weight.device), processor


def _perplexity(task: SuiteTask, model: nn.Module, tokenizer: Any, batch_size: int, bar: Any) -> TaskResult:
    """Return the perplexity of windows of 256 tokens: of a text file, or of Python's manual (see ``corda_eval.text.perplexity``)."""
    text = held_out_text()[1] if task.data is None else Path(task.data).read_text(encoding="utf-8")
    windows = text_windows(text, tokenizer, WINDOW, task.limit or 50)
    start = time.perf_counter()
    losses = window_losses(model, windows, batch_size=batch_size, progress=lambda steps: bar(list(steps)))
    value = math.exp(sum(losses) / len(losses))
    records = [{"id": str(place), "loss": loss} for place, loss in enumerate(losses)]
    return TaskResult("perplexity", {"perplexity": value}, "perplexity", losses, records, len(losses) / (time.perf_counter() - start))


def _examples(task: SuiteTask, benchmark: VqaTask, download: bool) -> list[VqaExample]:
    """Return a benchmark's examples; digits and easy-VQA come with their packages."""
    options = {} if task.split is None else {"split": task.split}
    if task.task in ("digits", "easy_vqa"):
        return benchmark.load(limit=task.limit, **options)
    return benchmark.load(_data_of(task), limit=task.limit, download=download, **options)


def _data_of(task: SuiteTask) -> str:
    if task.data is None:
        raise ValueError(f"{task.task} has no data; name its folder or file: {{task: {task.task}, data: …}}.")
    return task.data


def _adapted(model: nn.Module, folder: Path) -> nn.Module:
    """Return the base with an adapter of ours on it, or an ordinary LoRA."""
    if (folder / ATTACHMENT).exists():
        return load(model, folder)
    return PeftModel.from_pretrained(model, folder).eval()


def _digest(folder: Path) -> str:
    """Return what identifies an adapter's weights.

    Raises:
        FileNotFoundError: If there are none.
    """
    weights = folder / WEIGHTS
    if not weights.exists():
        raise FileNotFoundError(f"{weights} does not exist; expected a folder that `corda-vlm train` or `export` wrote.")
    with safe_open(weights, "pt") as file:
        file.keys()  # damaged files are told here, not after hours
    with weights.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()
