"""A run's output folder: whose it is, and which of its checkpoints are whole and can be gone on from."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import yaml
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from corda_core import attachment_of
from corda_core.checkpoint import ATTACHMENT, WEIGHTS, save_attachment
from corda_core.distributed import from_first_process, process_rank
from corda_core.files import PARTIAL, write_whole
from corda_vlm.processes import processes
from corda_vlm.recipe import RECIPE, Recipe

logger = logging.getLogger(__name__)

FREE = {
    *("output", "data.on_broken", "context.on_broken", "evaluation.on_broken", "model.download", "training.workers", "training.log_to"),
    *("training.micro_batch_size", "training.keep_checkpoints", "training.save_every", "training.gradient_checkpointing"),
}
"""Options that may be others when a run is gone on with: the losses stay the same, but for what is skipped, or up to rounding."""


def claim(recipe: Recipe, output: Path, resume: bool) -> None:
    """Write the recipe into an output of its own; or check that what is there is a run of this recipe, and drop what is half written.

    Raises:
        FileExistsError: If there is another run, or what another program wrote.
        ValueError: If the run that is to be gone on with has another recipe.
    """
    asked = yaml.safe_load(yaml.safe_dump(_plain(recipe)))
    has_begun = from_first_process((output / ATTACHMENT).exists() and (output / RECIPE).exists())
    foreign = from_first_process(
        sorted(file.name for file in output.glob("*") if file.name.startswith(("checkpoint-", "adapter_", "corda.")))
    )
    if not has_begun:
        if foreign:
            raise FileExistsError(f"{output} holds {foreign[0]}, which no run of a recipe left there; name another output.")
        if resume:
            logger.warning("%s holds no run to go on with: starting one.", output)
    elif not resume:
        raise FileExistsError(f"{output} holds a run already; go on with it (--resume), or name another output.")
    else:
        found = yaml.safe_load((output / RECIPE).read_text())
        different = _first_difference(found, asked)
        if different:
            raise ValueError(
                f"{output / RECIPE} has another {different}, on which plan or losses depend; resume with the recipe that was started, or "
                "name another output."
            )
    processes().wait_for_everyone()
    if process_rank() == 0:
        write_whole(output / RECIPE, yaml.safe_dump(asked, sort_keys=False).encode())
        partial = [*output.glob(f"{PARTIAL}*"), *output.glob(f"checkpoint-*/{PARTIAL}*")]
        half = [checkpoint for checkpoint in output.glob("checkpoint-*") if not _is_whole(checkpoint)]
        for left in (*partial, *half):  # by a process that died while it wrote or removed them
            shutil.rmtree(left, ignore_errors=True)
    processes().wait_for_everyone()


def last_whole(output: Path) -> str | None:
    """Return the newest checkpoint that was written to its end; under several processes the first one's answer counts."""
    whole = [folder for folder in output.glob("checkpoint-*") if _is_whole(folder)]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None


class WholeCheckpoints(TrainerCallback):
    """Stops at a loss that is not finite, and marks checkpoints as whole by the last file that goes into them."""

    def __init__(self, model: PeftModel) -> None:
        self.attachment = attachment_of(model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Refuse to go on from NaN; checkpoints come after the log, so none holds such weights."""
        logs = logs or {}
        for key in ("loss", "eval_loss", "grad_norm"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise FloatingPointError(
                    f"{key} is {logs[key]} at step {state.global_step}, learning rate {logs.get('learning_rate')}: lower the rate, or look "
                    f"at the samples of that step; the last whole checkpoint is {last_whole(Path(str(args.output_dir))) or 'none yet'}."
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the loss before the last checkpoint too, which the Trainer writes whatever the step."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what ``load`` needs beside the Trainer's files, when all processes have written theirs."""
        processes().wait_for_everyone()
        if state.is_world_process_zero:
            save_attachment(self.attachment, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / ATTACHMENT)


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end, and none of it removed since."""
    names = (ATTACHMENT, "trainer_state.json", "scheduler.pt", WEIGHTS)
    # What torch saves is a zip file, whose end tells that it is whole.
    return all((checkpoint / name).exists() for name in names) and all(map(is_zipfile, checkpoint.glob("*.pt")))


def _plain(value: Any) -> Any:
    """Return a recipe as what YAML holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _first_difference(found: Any, asked: Any, at: str = "") -> str:
    """Return the name of the first option in which two recipes differ, or nothing."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in {**asked, **found}:
            name = _first_difference(found.get(key), asked.get(key), f"{at}.{key}" if at else key)
            if name:
                return name
        return ""
    return "" if found == asked or at in FREE else f"{at} ({found!r}, asked for is {asked!r})"
