"""What is read of what, by the commands and functions that users call, each reduced to a value that tells whether anything is different."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_llama
from typer.testing import CliRunner

from corda_core.store import load_covariances
from corda_core.store import read_plan as read_plan_file
from corda_eval.cli import app
from corda_vlm.data.items import load_items
from corda_vlm.data.samples import Collator
from corda_vlm.data.sources import DataConfig
from corda_vlm.training.models import load_base
from corda_vlm.training.recipe import ModelConfig, read_recipe
from drill.place import OPTIONS, STEPS, Place, content, tuned_model


class Refused(Exception):  # noqa: N818
    """A command ended with a sentence; the text is the sentence."""


@dataclass(frozen=True)
class Target:
    """Files of one kind, and what reads them."""

    name: str
    folder: str
    """Which folder of the place is copied, to be spoilt."""

    files: str
    """Which of its files: a pattern."""

    read: Callable[[Place, Path], Any]
    """Reads the copy."""

    ours: bool = True
    """Whether we wrote the file, and so can tell any change of it; of what users write another value may be a legal one."""

    share: int = 1
    """Of the damages, in parts."""


def call(*arguments: str) -> str:
    """Return what ``corda-vlm`` says.

    Raises:
        Refused: If it ends with a sentence.
        Exception: What else it ends with.
    """
    done = CliRunner().invoke(app, list(arguments))
    if done.exit_code == 0:
        return done.output
    if isinstance(done.exception, SystemExit) and done.exit_code in (1, 2):
        raise Refused(_sentence(done.stderr, f"corda-vlm {arguments[0]}:"))
    raise done.exception or AssertionError(f"ended with {done.exit_code}: {done.output}")


def _sentence(said: str, start: str) -> str:
    """Return what a command said at last: behind its name, or in the box that usage errors are put in."""
    boxed = [line.strip("│ ") for line in said.splitlines() if line.startswith("│")]
    return " ".join(boxed) or start + said.rpartition(start)[2].rstrip()


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


def read_adapter(place: Place, folder: Path) -> str:
    """All that the outputs of the loaded model depend on, and some outputs."""
    model = tuned_model(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(input_ids=torch.randint(5, 20, (2, 9))).logits
    return digest(*(value.detach().numpy().tobytes() for _, value in sorted(model.named_parameters())), logits.numpy().tobytes())


def read_covariances(place: Place, folder: Path) -> str:
    covariances = load_covariances(folder / "covariances.safetensors", model=tiny_llama(), options=OPTIONS)
    return digest(*(f"{name} {C.num_tokens}".encode() + C.matrix.numpy().tobytes() for name, C in sorted(covariances.items())))


def read_plan(place: Place, folder: Path) -> str:
    torch.set_printoptions(threshold=10**9, precision=12)
    try:
        return repr(read_plan_file(folder / "plan.safetensors")[0])
    finally:
        torch.set_printoptions(profile="default")


def export(place: Place, folder: Path) -> list[str]:
    """The LoRA that is written."""
    output = folder.with_name("exported")
    call("export", "--adapter", str(folder), "--output", str(output))
    return [content(file) for file in sorted(output.iterdir())]


def resume(place: Place, folder: Path) -> Any:
    """The run's adapter and losses after ``train --resume``."""
    call("train", "--config", str(place.recipe), "--resume", f"output={folder}")
    summary = json.loads((folder / "training.json").read_text())
    weights = [content(folder / name) for name in ("adapter_model.safetensors", "corda.safetensors")]
    return weights, summary["losses"], summary["evaluation"]


def evaluate(place: Place, suite: Path, output: Path, *adapters: Path) -> Any:
    options = ["--base", place.base, "--dtype", "float32", "--suite", str(suite), "--output", str(output)]
    call("eval", *options, *(part for adapter in adapters for part in ("--adapter", str(adapter))))
    return json.loads((output / "summary.json").read_text())["comparison"]


def evaluation(place: Place, output: Path) -> Any:
    """What is reported of tasks that are finished, or whose answers are there."""
    return evaluate(place, place.folder / "suite" / "suite.yaml", output, place.folder / "whole", place.folder / "lora")


def evaluate_adapter(place: Place, adapter: Path) -> Any:
    """What an adapter scores; the base's part is there already."""
    output = adapter.with_name("scores")
    shutil.copytree(place.folder / "out" / "base", output / "base")
    return evaluate(place, place.folder / "suite" / "suite.yaml", output, adapter)


def evaluate_suite(place: Place, folder: Path) -> Any:
    return evaluate(place, folder / "suite.yaml", folder / "scores", place.folder / "whole")


def compare(place: Place, folder: Path) -> Any:
    """The study's report."""
    output = folder.with_name("report")
    call("compare", "--config", str(folder / "study.yaml"), f"results={folder / 'results'}", "--only-report", "--output", str(output))
    return json.loads((output / "study.json").read_text())["settings"]


def read_data(place: Place, folder: Path) -> Any:
    """All samples of the file that the folder is called after, as they are trained."""
    items = load_items(DataConfig(str(folder / folder.name.replace("-", "."))))
    return [{key: value.tobytes() if key == "image" else value for key, value in item.items()} for item in items]


def read_user_recipe(place: Place, folder: Path) -> str:
    return repr(read_recipe(folder / "recipe.yaml"))


def read_base(place: Place, folder: Path) -> Any:
    """The base's answer to a question."""
    model, processor = load_base(ModelConfig(str(folder), dtype="float32"))
    batch = Collator(processor)([{"question": "what color is this ?"}])
    with torch.no_grad():
        return digest(model(**batch).logits.numpy().tobytes())


TARGETS = [
    Target("load: weights", "whole", "adapter_model.safetensors", read_adapter, share=6),
    Target("load: attachment", "whole", "corda.safetensors", read_adapter, share=6),
    Target("load: PEFT's config", "whole", "adapter_config.json", read_adapter, share=2),
    Target("load_covariances", "store", "covariances.safetensors", read_covariances, share=6),
    Target("load_plan", "store", "plan.safetensors", read_plan, share=6),
    Target("export: what it reads", "whole", "[!R]*.*", export, share=3),
    Target("resume: the newest checkpoint", "died", f"checkpoint-{STEPS}/*", resume, share=8),
    Target("resume: plan and recipe", "died", "*.*", resume, share=2),
    Target("resume: a finished run", "whole", "*.*", resume, share=2),
    Target("eval: results", "out", "*/*.json", evaluation, share=4),
    Target("eval: predictions", "asked", "*/*.jsonl", evaluation, share=2),
    Target("eval: an adapter of ours", "whole", "*.*", evaluate_adapter, share=2),
    Target("eval: a LoRA", "lora", "*.*", evaluate_adapter, share=4),
    Target("eval: a suite", "suite", "suite.yaml", evaluate_suite, ours=False, share=2),
    Target("compare: runs", "study", "results/*/*.json", compare, ours=False, share=3),
    Target("compare: the study", "study", "study.yaml", compare, ours=False),
    Target("train: the recipe", "recipe", "recipe.yaml", read_user_recipe, ours=False, share=2),
    Target("data: .json", "data-json", "data.json", read_data, ours=False, share=2),
    Target("data: .jsonl", "data-jsonl", "data.jsonl", read_data, ours=False, share=2),
    Target("data: .parquet", "data-parquet", "data.parquet", read_data, ours=False, share=2),
    Target("data: pictures", "data-jsonl", "*.png", read_data, ours=False, share=2),
    Target("the base", "base", "*", read_base, ours=False, share=3),
]
