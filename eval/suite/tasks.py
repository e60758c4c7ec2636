"""Suites: which tasks there are, and how each is measured on one model."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Subset

from corda_core.files import read_text
from corda_core.linears import base_of
from corda_eval.records import TaskResult
from corda_eval.text.facts import facts_task
from corda_eval.text.harness import evaluate_text
from corda_eval.text.perplexity import held_out_text, text_windows, window_losses
from corda_eval.vqa.answer import Asking
from corda_eval.vqa.benchmark import TASKS as BENCHMARKS
from corda_eval.vqa.benchmark import answer_benchmark
from corda_eval.vqa.example import VqaExample, VqaTask
from corda_eval.zeroshot import cifar, folders, imagenet, objectnet
from corda_eval.zeroshot.captions import karpathy
from corda_eval.zeroshot.classify import classify_images
from corda_eval.zeroshot.images import ClassifiedImages
from corda_eval.zeroshot.likelihood import classify_by_likelihood
from corda_eval.zeroshot.retrieval import retrieve
from corda_eval.zeroshot.transplant import transplanted
from corda_vlm.context import collator_for, progress_bar
from corda_vlm.data.conversation import tokenizer_of
from corda_vlm.data.pairs import PairCollator
from corda_vlm.options import Count, Options, Place, plain_file_name
from corda_vlm.towers import has_two_towers
from corda_vlm.training.models import load_base
from corda_vlm.training.recipe import ModelConfig
from corda_vlm.yaml import from_mapping, read_yaml

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

ASKING = ("max_new_tokens", "system", "pad_images")
"""Options of a suite, and of its tasks, that say how questions about images are asked."""

WINDOW = 256


class Role(StrEnum):
    """What a task is measured for."""

    TARGET = "target"
    """It was trained."""
    KEPT = "kept"
    """It should not suffer."""


@dataclass(frozen=True)
class SuiteTask(Options):
    """One task of a suite."""

    task: str
    """"digits", "facts", "perplexity"; a benchmark of ``corda_eval.vqa.benchmark``; one of ``IMAGE_SETS``; "retrieval"; a task of lm_eval,
    or a YAML file that defines one: a program, whose templates and ``!function`` run."""

    role: Role = Role.KEPT

    data: Place | None = None
    """Folder or file of its data, where it has any of its own; of a benchmark also an id of the datasets hub."""

    images: Place | None = None
    """For "retrieval": folder that the images' names in ``data`` start from; None takes that of ``data``."""

    split: str | None = None
    """Which part of the data; None takes the one that is reported."""

    limit: Count | None = None
    """Only the first examples."""

    tower_in: Place | None = None
    """For ``IMAGE_SETS`` and "retrieval", of a LLaVA-type model: folder or id of the CLIP or SigLIP that its vision tower came from. It is
    measured with the model's tower in it."""

    max_new_tokens: Count | None = None
    """Of a benchmark of questions about images: where an answer is cut; None takes the suite's, or else the benchmark's, limit."""

    system: str | None = None
    """Of such a benchmark: what the chat template's system turn says; None takes the suite's, "" leaves it to the template."""

    pad_images: bool | None = None
    """Of such a benchmark: whether images are padded to squares; None takes the suite's."""

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
        super().__post_init__()
        try:
            plain_file_name(self.title)
        except ValueError as error:
            raise ValueError(f"{self.task}: its name is {self.title!r}, which files are called by; expected {error}.") from error
        if self.images is not None and self.task != RETRIEVAL:
            raise ValueError(f"{self.task}: images is {self.images!r}, which {RETRIEVAL} alone reads; leave it out.")
        if self.tower_in is not None and self.task not in (RETRIEVAL, *IMAGE_SETS):
            raise ValueError(f"{self.task}: tower_in is {self.tower_in!r}, but this is no task for two towers; leave it out.")
        given = [option for option in ASKING if getattr(self, option) is not None]
        if given and self.task not in BENCHMARKS:
            raise ValueError(
                f"{self.task}: {given[0]} is for benchmarks of questions about images ({', '.join(BENCHMARKS)}); leave it out."
            )


@dataclass(frozen=True)
class Suite(Options):
    """What is measured."""

    tasks: Sequence[SuiteTask] = field(default_factory=list)
    batch_size: Count = 1
    """Examples at once; 1 is the reference, as padding may change answers."""

    max_new_tokens: Count | None = None
    """Where answers to benchmarks of questions about images are cut; None takes each benchmark's limit, which is LLaVA-1.5's."""

    system: str | None = None
    """What the chat template's system turn says in those benchmarks; None leaves that to the template."""

    pad_images: bool = False
    """Pad images to squares in those benchmarks, as LLaVA-1.5 does, instead of what the processor does."""

    def __post_init__(self) -> None:
        """Give each benchmark of questions about images how it is asked, where it does not say so itself.

        Raises:
            ValueError: If an option has an impossible value.
        """
        super().__post_init__()
        given = [option for option in ASKING if getattr(self, option)]
        if given and not any(task.task in BENCHMARKS for task in self.tasks):
            raise ValueError(
                f"{given[0]} is for benchmarks of questions about images ({', '.join(BENCHMARKS)}), and none is named; leave it out."
            )
        object.__setattr__(self, "tasks", [self._asked(task) for task in self.tasks])

    def _asked(self, task: SuiteTask) -> SuiteTask:
        if task.task not in BENCHMARKS:
            return task
        open_options = {option: getattr(self, option) for option in ASKING if getattr(task, option) is None}
        return dataclasses.replace(task, **open_options)


def read_suite(path: Path) -> Suite:
    """Return the suite in a YAML file: ``tasks``, a list of ``SuiteTask``'s options, and ``Suite``'s others.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not of this form.
    """
    values = read_yaml(path)
    if not isinstance(values, dict) or not isinstance(values.get("tasks"), list) or not values["tasks"]:
        raise ValueError(f"{path} has no list of tasks; expected tasks: [{{task: easy_vqa, role: kept}}, …].")
    given = [task if isinstance(task, dict) else {"task": task} for task in values["tasks"]]
    tasks = [from_mapping(options, SuiteTask, f"{path}, tasks") for options in given]
    names = [task.title for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"{path} names {next(name for name in names if names.count(name) > 1)!r} twice; give one of them another name.")
    return from_mapping(values | {"tasks": tasks}, Suite, str(path))


def run_task(
    task: SuiteTask, model: nn.Module, processor: Any, *, batch_size: int = 1, predictions: Path | None = None, download: bool = False
) -> TaskResult:
    """Return one task's result.

    Args:
        task: What is asked.
        model: Adapted or not.
        processor: A processor, a tokenizer for text alone, or ``OpenClipPairs``.
        batch_size: Examples at once.
        predictions: For questions about images, a file that a killed run is resumed from.
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
        examples, asking = examples_of(task, benchmark, download), asking_of(task, benchmark)
        return answer_benchmark(benchmark, examples, model, processor, asking, predictions=predictions, batch_size=batch_size, progress=bar)
    if name == "perplexity":
        return _perplexity(task, model, tokenizer_of(processor), batch_size, bar)
    if name == "facts":
        return facts_task(model, tokenizer_of(processor), batch_size=batch_size, limit=task.limit)
    return evaluate_text(model, tokenizer_of(processor), [name], batch_size=batch_size, limit=task.limit)[0]


def _zero_shot(task: SuiteTask, model: nn.Module, processor: Any, batch_size: int, bar: Any) -> TaskResult:
    data = IMAGE_SETS[task.task](_data_of(task))
    if task.limit is not None:
        data = dataclasses.replace(data, items=Subset(data.items, range(min(task.limit, len(data.items)))))
    if has_two_towers(base_of(model)):
        return classify_images(model, data, _pairs(model, processor), batch_size=batch_size, progress=bar)
    return classify_by_likelihood(model, data, processor, batch_size=batch_size, progress=bar)


def _retrieval(task: SuiteTask, model: nn.Module, processor: Any, batch_size: int, bar: Any) -> TaskResult:
    if not has_two_towers(base_of(model)):
        raise ValueError(
            f"{task.title}: {type(base_of(model)).__name__} has no text tower to compare images with; expected CLIP or its like; name in "
            "tower_in what the vision tower came from, or leave the task out."
        )
    data = Path(_data_of(task)).expanduser()
    captioned = karpathy(data, task.images or data.parent, split=task.split or "test", limit=task.limit)
    return retrieve(model, captioned, _pairs(model, processor), batch_size=batch_size, progress=bar)


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
    text = held_out_text()[1] if task.data is None else read_text(Path(task.data))
    try:
        windows = text_windows(text, tokenizer, WINDOW, task.limit or 50)
    except ValueError as error:
        raise ValueError(f"{task.title}: {task.data or 'the shipped text'}: {error} Its `limit` says how many.") from error
    start = time.perf_counter()
    losses = window_losses(model, windows, batch_size=batch_size, progress=lambda steps: bar(list(steps)))
    value = math.exp(sum(losses) / len(losses))
    records = [{"id": str(place), "loss": loss} for place, loss in enumerate(losses)]
    return TaskResult("perplexity", {"perplexity": value}, "perplexity", losses, records, len(losses) / (time.perf_counter() - start))


def examples_of(task: SuiteTask, benchmark: VqaTask, download: bool) -> list[VqaExample]:
    """Return a benchmark's examples; digits and easy-VQA come with their packages."""
    options = {} if task.split is None else {"split": task.split}
    if task.task in ("digits", "easy_vqa"):
        return benchmark.load(limit=task.limit, **options)
    return benchmark.load(_data_of(task), limit=task.limit, download=download, **options)


def asking_of(task: SuiteTask, benchmark: VqaTask) -> Asking:
    """Return how a benchmark's questions are asked."""
    return Asking(task.max_new_tokens or benchmark.max_new_tokens, task.system, bool(task.pad_images))


def _data_of(task: SuiteTask) -> str:
    if task.data is None:
        raise ValueError(f"{task.task} has no data; name its folder or file: {{task: {task.task}, data: …}}.")
    return task.data
