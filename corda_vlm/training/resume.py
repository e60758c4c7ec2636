"""A run's output folder: whose it is, and which of its checkpoints are whole, so that a run can resume from them."""

import logging
import shutil
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from corda_core import attachment_of
from corda_core.files import flush, read_json
from corda_core.layers import from_first_process, process_rank
from corda_core.store import ATTACHMENT, check_saved_together, put_weights_, read_adapter, read_attachment, save_attachment
from corda_vlm.outputs import clear_partial, processes
from corda_vlm.training.recipe import RECIPE, Recipe, values_of, write_recipe
from corda_vlm.yaml import read_yaml

logger = logging.getLogger(__name__)

FREE = {
    *("output", "data.on_broken", "context.on_broken", "evaluation.on_broken", "keep.samples.on_broken", "model.download"),
    *("training.workers", "training.log_to", "training.micro_batch_size"),
    *("training.keep_checkpoints", "training.save_every", "training.gradient_checkpointing"),
    *("corda.solver", "corda.normalize"),  # options of corda-vlm 0.1.0: the plan that they made is read, not made again
}
"""Options that may change when a run is resumed: the losses stay the same, except for what is skipped, or up to rounding."""
STATE = "trainer_state.json"
DAMAGED = "damaged-"
"""Prefix of checkpoints that were whole once, and are set aside."""


def claim(recipe: Recipe, output: Path, resume: bool) -> None:
    """Write the recipe into a free output, or check that the run there is of this recipe, and remove what is half written.

    Raises:
        FileExistsError: If there is another run, or what another program wrote.
        ValueError: If the run to resume has another recipe.
    """
    has_begun = from_first_process((output / ATTACHMENT).exists() and (output / RECIPE).exists())
    foreign = from_first_process(
        sorted(file.name for file in output.glob("*") if file.name.startswith(("checkpoint-", "adapter_", "corda.")))
    )
    if has_begun and not resume:
        raise FileExistsError(f"{output} holds a run already; resume it (--resume), or name another output.")
    if has_begun:
        _check_same_recipe(output / RECIPE, values_of(recipe))
    elif foreign:
        raise FileExistsError(f"{output} holds {foreign[0]}, which no run of a recipe left there; name another output.")
    elif resume:
        logger.warning("%s holds no run to resume: starting one.", output)
    processes().wait_for_everyone()
    if process_rank() == 0:
        write_recipe(recipe, output / RECIPE)
        for checkpoint in list(output.glob("checkpoint-*")):
            clear_partial(checkpoint)
            _put_away_if_not_whole(checkpoint)
    processes().wait_for_everyone()


def last_whole(output: Path) -> Path | None:
    """Return the newest checkpoint that is as it was written; of several processes, ask the first."""
    numbered = {int(number): folder for folder in output.glob("checkpoint-*") if (number := folder.name.rpartition("-")[2]).isdecimal()}
    return next((numbered[number] for number in sorted(numbered, reverse=True) if not _what_is_wrong(numbered[number])), None)


def has_ended(checkpoint: Path) -> bool:
    """Return whether a checkpoint is that of the last step."""
    state = TrainerState.load_from_json(str(checkpoint / STATE))
    return state.global_step >= state.max_steps


def restore_(trainer: Trainer, checkpoint: Path) -> None:
    """Give a Trainer that has no step left the weights and losses of a checkpoint; resuming would take one step more."""
    _, weights = read_adapter(checkpoint)
    put_weights_(trainer.model, weights)
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))


class WholeCheckpoints(TrainerCallback):
    """Marks checkpoints as whole by the last file that goes into them."""

    def __init__(self, model: PeftModel) -> None:
        self.attachment = attachment_of(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what ``load`` needs beside the Trainer's files, when all processes have written theirs and they are on the disk."""
        processes().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for path in (*checkpoint.rglob("*"), checkpoint):
                flush(path)
            save_attachment(self.attachment, checkpoint / ATTACHMENT, saved_with=checkpoint)


def _put_away_if_not_whole(checkpoint: Path) -> None:
    """Remove a checkpoint that a process left half written or half removed; set aside one whose content has changed."""
    wrong = _what_is_wrong(checkpoint)
    if isinstance(wrong, FileNotFoundError):
        shutil.rmtree(checkpoint, ignore_errors=True)
    elif wrong is not None:
        aside = checkpoint.with_name(DAMAGED + checkpoint.name)
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        logger.warning("%s is damaged (%s): it is kept as %s, and an earlier checkpoint is taken.", checkpoint, wrong, aside.name)


def _what_is_wrong(checkpoint: Path) -> Exception | None:
    """Return why a checkpoint cannot be resumed from; None if it is as it was written."""
    try:
        _, beside = read_attachment(checkpoint / ATTACHMENT)
        if beside is None:
            _check_unsealed(checkpoint)
        else:
            check_saved_together(checkpoint, beside)
    except (OSError, ValueError) as error:
        return error
    return None


def _check_unsealed(checkpoint: Path) -> None:
    """Check what can be of a checkpoint of corda-vlm 0.1.0, which has no digests but those of torch's zip files."""
    read_adapter(checkpoint)
    if not isinstance(read_json(checkpoint / STATE), dict):
        raise ValueError(f"{checkpoint / STATE} holds no state.")
    for file in {checkpoint / "scheduler.pt", *checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")}:
        try:
            with ZipFile(file) as archive:
                broken = archive.testzip()
        except BadZipFile as error:
            raise ValueError(f"{file} is not whole ({error}).") from error
        if broken is not None:
            raise ValueError(f"{file} is damaged in {broken}.")


def _check_same_recipe(path: Path, wanted: dict[str, Any]) -> None:
    """Refuse to resume with other options than a run began with, where losses depend on them."""
    cure = "name another output, or put that run's recipe there again"
    recorded = read_yaml(path, cure)
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} holds no options; {cure}.")
    difference = _first_difference(recorded, wanted)
    if difference:
        raise ValueError(
            f"{path} has another {difference}, on which plan or losses depend; resume with the recipe that was started, or name another "
            "output."
        )


def _first_difference(recorded: Any, wanted: Any, option: str = "") -> str:
    """Return the name of the first option in which two recipes differ, with both values; or nothing."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        names = ((key, f"{option}.{key}" if option else key) for key in {**wanted, **recorded})
        return next(filter(None, (_first_difference(recorded.get(key), wanted.get(key), name) for key, name in names)), "")
    return "" if recorded == wanted or option in FREE else f"{option} ({recorded!r}, asked for is {wanted!r})"
