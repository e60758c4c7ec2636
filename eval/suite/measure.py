"""Measure a base and what was tuned from it on a suite of tasks.

    corda-vlm eval --base my-llava --adapter runs/first --suite configs/suite_lab.yaml --output runs/first-eval

    output/base/easy_vqa.json, output/first/easy_vqa.json, …   each task's figures and predictions, as soon as it is done
    output/summary.json, report.md, report.html               the comparison, by ``corda_eval.suite.page``

A task that is done is not run again, unless what is asked, who answers or a library's version has changed: then another output is wanted.
Under ``accelerate launch`` the tasks are shared out over the processes.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from corda_core import lora_layers, weight_change
from corda_core.export import check_lora
from corda_core.files import file_digest
from corda_core.layers import num_processes, process_rank
from corda_core.store import ATTACHMENT, WEIGHTS, read_adapter
from corda_eval.records import TaskResult, library_versions, read_sealed, write_sealed
from corda_eval.suite.comparison import Measured, compare
from corda_eval.suite.tasks import BENCHMARKS, Suite, asking_of, examples_of, run_task
from corda_eval.vqa.generate import BatchCheck, check_batch_invariance
from corda_vlm.adapted import check_lora_config, load, load_lora
from corda_vlm.outputs import clear_partial, processes
from corda_vlm.training.models import load_base, network_only_if
from corda_vlm.training.recipe import ModelConfig

BASE = "base"


def batch_checks(base: ModelConfig, suite: Suite, count: int) -> dict[str, BatchCheck]:
    """Return for each benchmark of questions about images how many of its first answers depend on the suite's batch size.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If data are broken.
    """
    model, processor = load_base(base)
    checks = {}
    for task in suite.tasks:
        benchmark = BENCHMARKS.get(task.task)
        if benchmark is not None:
            examples, asking = examples_of(task, benchmark, base.download)[:count], asking_of(task, benchmark)
            checks[task.title] = check_batch_invariance(examples, model, processor, asking, batch_size=suite.batch_size)
    return checks


def measure(base: ModelConfig, adapters: Mapping[str, Path], suite: Suite, output: Path) -> Measured | None:
    """Return what base and adapters come to; None in all processes but the first.

    Args:
        base: The untouched model.
        adapters: Folders by the names they are reported under: of ``corda-vlm train``, or of an ordinary LoRA.
        suite: The tasks.
        output: Folder, this run's alone (``corda_vlm.outputs.alone_in``); tasks that are done there are not run again.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If data, adapter or output are not right.
    """
    start = time.time()
    results, changes = {}, {}
    if process_rank() == 0:
        for name in (BASE, *adapters):
            clear_partial(output / name)
    digests = {name: _digest(folder) for name, folder in adapters.items()}
    for name in (BASE, *adapters):
        # Whether the base was fetched then or is here by now makes no difference.
        model_id = {"base": dataclasses.asdict(dataclasses.replace(base, download=False)), "adapter": digests.get(name)}
        results[name], change = _results(output / name, model_id, base, adapters.get(name), suite)
        if change is not None:
            changes[name] = change
    if process_rank() != 0:
        return None
    roles = {task.title: task.role for task in suite.tasks}
    rows = {name: compare(results[BASE], results[name], roles) for name in adapters}
    sizes = {f"size of the change, {name}": f"{size:.2%} of the weights (mean of ‖ΔW‖/‖W‖ over layers)" for name, size in changes.items()}
    facts = {
        "base": base.path,
        **{name: str(folder) for name, folder in adapters.items()},
        **sizes,
        "precision": base.dtype,
        "batch size": str(suite.batch_size),
        **library_versions(),
    }
    return Measured(results, rows, changes, facts, round(time.time() - start, 1))


def _results(
    output: Path, model_id: Mapping[str, Any], base: ModelConfig, folder: Path | None, suite: Suite
) -> tuple[list[TaskResult], float | None]:
    """Return a model's results, and by what fraction its weights changed; it is loaded only if a task is not done yet."""
    paths = {task: output / f"{task.title}.json" for task in suite.tasks}
    common = {"batch_size": suite.batch_size, **model_id, **library_versions()}
    asked = {task: json.loads(json.dumps({"task": dataclasses.asdict(task), **common})) for task in suite.tasks}
    open_tasks = [task for task in suite.tasks if not _is_done(paths[task], asked[task])]
    own_tasks = open_tasks[process_rank() :: num_processes()]
    if own_tasks:
        model, processor = load_base(base)
        if base.quantize is None:
            model.to(processes().device)
        if folder is not None:
            model = _adapted(model, folder)
        change = weight_change(model) if lora_layers(model) else {}
        mean = sum(change.values()) / len(change) if change else None
        for task in own_tasks:
            predictions = paths[task].with_suffix(".jsonl")
            with network_only_if(base.download):  # lm_eval's data would be fetched without asking
                result = run_task(task, model, processor, batch_size=suite.batch_size, predictions=predictions, download=base.download)
            stored = {"asked": asked[task], "change": mean, "result": dataclasses.asdict(result) | {"task": task.title}}
            write_sealed(paths[task], stored)
            score, rate = f"{result.headline} {result.metrics[result.headline]:.4g}", f"{result.examples_per_second:.3g} a second"
            print(f"{output.name}: {task.title}: {score}, {result.num_examples} examples, {rate}", flush=True)
    processes().wait_for_everyone()
    done = [_done(paths[task]) for task in suite.tasks]
    return [TaskResult(**stored["result"]) for stored in done], done[0]["change"]


def _is_done(path: Path, asked: Mapping[str, Any]) -> bool:
    """Return whether a task's file is there.

    Raises:
        ValueError: If it answers another question, is of another model or was made with other versions.
    """
    if not path.exists():
        return False
    stored = _done(path)["asked"]
    different = [key for key in asked if stored.get(key) != asked[key]]
    if different:
        key = different[0]
        raise ValueError(f"{path} was made with another {key} ({stored.get(key, 'not recorded')}); name another output, or remove it.")
    return True


def _done(path: Path) -> dict[str, Any]:
    """Return what a task's file holds: what was asked, of whom, and the result.

    Raises:
        ValueError: If it is damaged or holds something else.
    """
    cure = "remove it: the task is measured again"
    stored = read_sealed(path, cure)
    fields = {field.name for field in dataclasses.fields(TaskResult)}
    if not {"asked", "change", "result"} <= set(stored) or not isinstance(stored["asked"], dict) or set(stored["result"]) != fields:
        raise ValueError(f"{path} holds no result of a task; {cure}.")
    return stored


def _adapted(model: nn.Module, folder: Path) -> nn.Module:
    """Return the base with an adapter of ours on it, or an ordinary LoRA."""
    return load(model, folder) if (folder / ATTACHMENT).exists() else load_lora(model, folder)


def _digest(folder: Path) -> str:
    """Return what identifies an adapter's weights, once they are known to be whole: told here, not after hours.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are damaged.
    """
    weights = folder / WEIGHTS
    if not weights.exists():
        raise FileNotFoundError(f"{weights} does not exist; expected a folder that `corda-vlm train` or `export` wrote.")
    if (folder / ATTACHMENT).exists():
        read_adapter(folder)
    else:
        check_lora(folder)
        check_lora_config(folder)
    return file_digest(weights)
