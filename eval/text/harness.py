"""Text benchmarks by lm-evaluation-harness, on a language model in memory or the language part of a vision-language model.

Tasks by their usual names (nq_open, triviaqa, webqs, arc_easy, hellaswag, mmlu, wikitext, gsm8k, …), whose data come from the cache of
``datasets``; or your own YAML files, whose data may be local: then nothing is fetched. What is drawn by chance (examples in a prompt,
the order of choices) is drawn as by ``lm_eval.simple_evaluate`` with its default seeds, the same for every model that is measured. Figures
are those of that function too, except in half precision, where log-likelihoods come from a softmax in float32.
"""

import copy
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from corda_core.linears import evaluating
from corda_eval.records import TaskResult

logger = logging.getLogger(__name__)

FEWSHOT_SEED = 1234
"""What ``lm_eval.simple_evaluate`` draws the examples of prompts with."""


def evaluate_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[TaskResult]:
    """Return the results of tasks, in their order; a group such as mmlu is one task, with all its examples.

    The headline is the metric that the task's own definition names first, with its first filter: ``exact_match,remove_whitespace`` for
    nq_open, ``acc,none`` for arc_easy.

    Args:
        model: A transformers model that predicts text from ``input_ids`` alone, adapted or not; a LLaVA answers without an image.
        tokenizer: The tokenizer of its language model.
        tasks: Names of lm_eval, or paths of YAML files that define a task.
        batch_size: Requests at once. In half precision padding moves log-likelihoods: 1 is the reference.
        limit: Only the first examples of each task (of a group: of each of its tasks); None for all.
        num_fewshot: Examples in the prompt; None takes the task's own number. A task that says 0 itself stays without, as in lm_eval.

    Raises:
        ModuleNotFoundError: If lm_eval is not installed.
        ValueError: If a task is unknown, or its data are not on this disk.
    """
    require_harness()
    with _default_seeds():  # some tasks shuffle their choices while they are loaded
        loaded = _load(tasks)
        start = time.perf_counter()
        report = run_tasks(model, tokenizer, loaded, batch_size=batch_size, limit=limit, num_fewshot=num_fewshot)
    count = sum(len({sample["doc_id"] for sample in samples}) for samples in report["samples"].values())
    rate = count / (time.perf_counter() - start)
    names = [_name_of(task) for task in tasks]
    return [result_of(name, report, rate) for name in names]


def require_harness() -> None:
    """Check for lm_eval.

    Raises:
        ModuleNotFoundError: If it is not installed; names the command that installs it.
    """
    if find_spec("lm_eval") is None:
        raise ModuleNotFoundError("lm_eval is not installed; run: pip install 'corda-vlm[eval]'")


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Mapping[str, Any]] | Mapping[str, Any],
    *,
    batch_size: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Return the harness's report on tasks that are loaded, or defined by these configs; with all samples.

    Raises:
        ModuleNotFoundError: If lm_eval is not installed.
    """
    require_harness()
    # Imported here: it takes seconds, and most users of this package never need it.
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _errors_only("lm_eval"), evaluating(model):
        loaded = tasks if isinstance(tasks, Mapping) else TaskManager(include_defaults=False).load(list(tasks))
        for name, task in loaded["tasks"].items():
            _set_fewshot(name, task, num_fewshot)
        # Backend: LLaVA's class is not among those lm_eval knows as causal. Softmax: in bfloat16 the choices would often tie.
        # Copy: lm_eval gives a tokenizer without a padding token one.
        language = HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size, softmax_dtype=torch.float32
        )
        # Not simple_evaluate: it reseeds the caller's random generators and runs pip and git to describe the machine.
        report: dict[str, Any] = evaluate(lm=language, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return report


def _set_fewshot(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set how many examples a task's prompts get, and the seed that they are drawn with, as ``lm_eval.simple_evaluate`` does."""
    own = task.get_config("num_fewshot")
    if num_fewshot and own == 0:
        logger.warning(
            "%s asks for no examples in its prompts itself; as in lm_eval, num_fewshot=%d does not change that.", name, num_fewshot
        )
    keeps_its_own = num_fewshot is None or own == 0
    task.set_config(key="num_fewshot", value=own or 0 if keeps_its_own else num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)


def _load(tasks: Sequence[str]) -> Mapping[str, Any]:
    """Return lm_eval's tasks; its own are looked through (some twenty seconds) only if one of them is asked for."""
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for path in files:
        if not path.exists():
            raise ValueError(f"The task {path} does not exist; expected a YAML file that defines a task of lm_eval.")
    with _errors_only("lm_eval"):
        manager = TaskManager(include_path=sorted({path.parent for path in files}) or None, include_defaults=len(files) < len(tasks))
        names = [_name_of(task) for task in tasks]
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise ValueError(
                f"lm_eval has no task {unknown[0]!r}; give one of its names (lm_eval ls tasks), or a YAML file that defines it."
            )
        try:
            loaded: Mapping[str, Any] = manager.load(names)
        except (ConnectionError, FileNotFoundError, OSError, ValueError) as error:
            raise ValueError(
                f"The data of {', '.join(names)} could not be read ({' '.join(str(error).split())[:200]}): fetch them once (eval "
                "--download, or HF_HUB_OFFLINE unset), or name local files in a task of your own."
            ) from error
    return loaded


def _name_of(task: str) -> str:
    return str(yaml.load(Path(task).read_text(), _AnyTag)["task"]) if task.endswith((".yaml", ".yml")) else task


class _AnyTag(yaml.SafeLoader):
    """Reads lm_eval's YAML, whose tags ("!function") stand for code, without running any."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix}")


def result_of(name: str, report: Mapping[str, Any], rate: float) -> TaskResult:
    """Return one task's result from the harness's report.

    Args:
        name: The task, or a group of tasks.
        report: As from ``run_tasks``.
        rate: Examples a second.
    """
    tasks = [name] if name in report["samples"] else _leaves(name, report)
    figures = report["results"][name] if name in report["results"] else report["groups"][name]
    metrics = {
        key: float(value) for key, value in figures.items() if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
    headline = next(iter(metrics))
    metric, _, chosen_filter = headline.partition(",")
    scores, records = [], []
    for task in tasks:
        samples = [sample for sample in report["samples"][task] if sample.get("filter", chosen_filter) == chosen_filter]
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            score = _score(sample[metric])
            scores.append(score)
            answers = [list(answer) if isinstance(answer, tuple) else answer for answer in sample["filtered_resps"]]
            records.append({"id": f"{task}/{sample['doc_id']}", "prediction": answers, "answer": str(sample["target"]), "score": score})
    return TaskResult(name, metrics, headline, scores, records, rate)


def _score(value: Any) -> float:
    """Return an example's score as a number: of a text's (log-likelihood, words) the nats a word."""
    return -value[0] / value[1] if isinstance(value, tuple) else float(value)


def _leaves(group: str, report: Mapping[str, Any]) -> list[str]:
    """Return the tasks of a group, subgroups' included."""
    leaves: list[str] = []
    for name in report["group_subtasks"][group]:
        leaves += [name] if name in report["samples"] else _leaves(name, report)
    return leaves


@contextmanager
def _errors_only(logger: str) -> Iterator[None]:
    """Silence the warnings and the progress reports of a logger and restore its level afterwards."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _default_seeds() -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators as ``lm_eval.simple_evaluate`` does, and give the caller's states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
