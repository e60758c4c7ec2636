"""A training run as a value: which model, data and adapter, how it is trained, where it is written; ``configs/`` has examples."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from corda_core.files import write_whole
from corda_core.linears import FourBit
from corda_core.lora import Protect
from corda_vlm.config import CordaConfig
from corda_vlm.context import is_keep_file
from corda_vlm.data.sources import DataConfig
from corda_vlm.options import LARGEST, Count, NotNegative, Options, Place, Positive, Seed, one_of
from corda_vlm.training.keep import KeepOptions
from corda_vlm.yaml import from_mapping, read_config, read_yaml

RECIPE = "recipe.yaml"
"""Its file in a run's output."""
SELF = "self"
"""Names, where a context is to be named, what the base itself makes."""


@dataclass(frozen=True)
class ModelConfig(Options):
    """Where the base model comes from."""

    path: Place
    """A folder, or an id of the Hugging Face hub; for open_clip an architecture such as "ViT-B-32", or "local-dir:" and a folder."""

    library: Annotated[str, one_of("transformers", "open_clip")] = "transformers"
    """"transformers" or "open_clip"."""

    weights: Place | None = None
    """For open_clip: a file of weights, or one of its tags such as "openai"; None takes random ones."""

    dtype: Annotated[str, one_of("float32", "bfloat16", "float16")] = "bfloat16"
    """Precision of the base: "float32", "bfloat16" or "float16"; what is trained is kept in float32."""

    quantize: FourBit | None = None
    """"nf4" or "fp4": load the base in 4 bits (bitsandbytes), as QLoRA does; the adapter is made from the dequantised weights."""

    attention: str | None = None
    """transformers' ``attn_implementation``: "sdpa", "eager" or "flash_attention_2"; None lets it choose."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    download: bool = False
    """Whether models and data may be fetched from the hub; else all must be on this disk."""

    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    def __post_init__(self) -> None:
        """Refuse options of transformers for open_clip."""
        super().__post_init__()
        if self.library == "open_clip" and (self.quantize or self.attention or self.revision):
            raise ValueError("quantize, attention and revision are for library: transformers; leave them out for open_clip.")


@dataclass(frozen=True)
class TrainingConfig(Options):
    """How the adapter is trained."""

    steps: Count | None = None
    """Optimiser steps; None iterates over the data ``epochs`` times."""

    epochs: Annotated[float, Field(gt=0, le=LARGEST)] = 1.0
    """How often to iterate over the data where ``steps`` is None."""

    batch_size: Count = 16
    """Samples in one optimiser step, over all processes: the same samples in the same order however many there are."""

    micro_batch_size: Count | None = None
    """Samples in one forward pass of one process; None takes its whole share of the batch."""

    learning_rate: Positive = 2e-4
    """Peak rate; LLaVA's own for LoRA, which ``protect: strict`` bears and gains by raising. The papers' form (``protect: start``,
    ``split: paper``) takes their 2e-5."""

    projector_learning_rate: Positive | None = None
    """Peak rate of what trains in the projector; None takes ``learning_rate``."""

    vision_learning_rate: Positive | None = None
    """Peak rate of what trains in the vision tower; None takes ``learning_rate``."""

    weight_decay: NotNegative = 0.0
    """AdamW's; it pulls A and B to zero, not to where they started, so ``protect: start`` drifts by it."""

    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Fraction of the steps in which the rate rises."""

    schedule: Annotated[str, one_of("cosine", "linear", "constant", "constant_with_warmup")] = "cosine"
    """"cosine", "linear", "constant" or "constant_with_warmup"."""

    max_length: Count | None = None
    """Tokens that a sample may have, an image's among them; None takes the model's positions."""

    on_long: Annotated[str, one_of("stop", "skip", "cut")] = "stop"
    """What to do with longer samples: "stop" names the first and counts them; "skip" leaves them out; "cut" takes their end off, and leaves
    those out that would lose part of an image or all of their response."""

    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""

    max_drift: Positive | None = None
    """After each step an adapter that changes its layers' outputs on the context by more than this part of them, such as 0.02, is taken
    back: a rate that is too high then ruins nothing, at no cost. For ``protect: strict`` and ``whitened``; None lets it drift."""

    bf16: bool = False
    """Compute in bfloat16 (autocast), whatever precision the weights have."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them, in the language model and the vision tower."""

    save_every: Count = 200
    """Steps between checkpoints; a multiple of ``log_every``, so that the loss of every checkpoint was checked."""

    keep_checkpoints: Annotated[int, Field(ge=2, le=LARGEST)] = 2
    """How many are kept; two at least, so that one is whole whenever the process dies."""

    log_every: Count = 1
    """Steps between records of the loss, when it is also checked for NaN."""

    log_to: Annotated[str, one_of("tensorboard", "wandb", "none")] = "tensorboard"
    """"tensorboard" (in the output's ``runs/``), "wandb" or "none"; the losses are in ``training.json`` in any case."""

    evaluate_every: Count | None = None
    """Steps between losses on ``evaluation``; None takes it at the end only."""

    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that read images beside the training one."""

    def __post_init__(self) -> None:
        """Refuse checkpoints whose loss was not checked."""
        super().__post_init__()
        if self.save_every % self.log_every:
            raise ValueError(f"save_every is {self.save_every}, no multiple of log_every, {self.log_every}; make it one.")


@dataclass(frozen=True, kw_only=True)
class KeepConfig(KeepOptions):
    """What the training is held to the base on, and how: ``keep`` in a recipe."""

    samples: DataConfig | None = None
    """Samples of what is to be kept; None takes ``context``, not for ipm."""


@dataclass(frozen=True)
class Recipe(Options):
    """One training run."""

    model: ModelConfig
    """The base."""

    data: DataConfig
    """What is learned: questions and answers or conversations; for CLIP images and captions."""

    output: Place
    """Folder for the adapter, its checkpoints and its records."""

    context: DataConfig | Place | Sequence[Place] | None = None
    """What is to be kept (``corda.mode: kpm``), or learned (ipm): options of samples; "self" for samples that the base makes; a keep file
    of ``corda-vlm collect`` (.safetensors); or several of such and of sources of samples in a list. None takes ``data``, not for kpm."""

    evaluation: DataConfig | None = None
    """Held-out samples whose loss is measured: the mean over tokens, then over samples; for CLIP over batches."""

    corda: CordaConfig = field(default_factory=CordaConfig)
    """How the adapter is prepared."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""

    keep: KeepConfig | None = None
    """Hold the training to the base on samples of what is to be kept, to a budget of forgetting if one is set; {} takes all defaults."""

    seed: Seed = 0
    """Of the order of the data, and all else that is random; the draw of the context has ``corda.seed``."""

    def __post_init__(self) -> None:
        """Refuse KPM without a context of what is to be kept, keeping without samples or a base, and what else cannot be done."""
        super().__post_init__()
        if self.context is None and self.corda.mode == "kpm":
            raise ValueError(
                "corda.mode is kpm, but there is no context: name samples of what the model is to keep, or set corda.mode to ipm."
            )
        names = self.context_names
        if "" in names or (not names and isinstance(self.context, list | tuple)):
            raise ValueError(f"context is {self.context!r}; expected options of samples, {SELF}, or at least one file.")
        self._check_keeping(names)
        if self.training.max_drift is not None and self.corda.protection in (Protect.START, Protect.NONE):
            raise ValueError(
                f"training.max_drift is {self.training.max_drift}, but corda.protect: {self.corda.protection} moves A, so that the plan "
                "does not tell how far outputs drift; set corda.protect to strict or whitened, or leave max_drift out."
            )
        if self.evaluation is None and self.training.evaluate_every is not None:
            raise ValueError(
                f"training.evaluate_every is {self.training.evaluate_every}, but there is no evaluation: name held-out samples."
            )

    def _check_keeping(self, names: tuple[str, ...]) -> None:
        """Refuse keeping without samples or a base; ``names`` are the context's."""
        if self.keep is not None and self.keep.samples is None and (self.context is None or self.corda.mode == "ipm"):
            raise ValueError(
                "keep has no samples, and there is no context of what is to be kept (corda.mode: kpm or lora) to take them from; name "
                "keep.samples."
            )
        if self.keep is not None and self.keep.samples is None and names and all(map(is_keep_file, names)):
            raise ValueError(f"keep needs samples, but the context is {names[0]}, which holds none; name keep.samples, or leave keep out.")
        if self.keep is not None and self.keep.kind == "distill" and self.corda.residual == "subtract":
            raise ValueError(
                "keep compares with the base, but corda.residual: subtract writes the start into its weights, so it cannot be run without "
                "the adapter; leave residual out, or set keep.kind to replay."
            )

    @property
    def context_names(self) -> tuple[str, ...]:
        """What the context is where it is given by names: keep files, sources, "self"; nothing where it is None or options."""
        if self.context is None or isinstance(self.context, DataConfig):
            return ()
        return (self.context,) if isinstance(self.context, str) else tuple(self.context)


def read_recipe(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Return the recipe in a YAML file, with ``key.key=value`` overrides put in.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an option is unknown, missing or has an impossible value.
    """
    return read_config(path, Recipe, overrides)


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as values of JSON, all its options."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe), sort_keys=True))
    return values


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe whole, all its options, as ``read_recipe`` reads it."""
    write_whole(path, yaml.safe_dump(values_of(recipe)).encode())


def read_model(path: Path) -> ModelConfig:
    """Return the base that an output's recipe names, whatever its other options are: corda-vlm 0.1.0 had more of them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it names no base, or in a way that cannot be right.
    """
    values = read_yaml(path)
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f"{path} names no base; give it with --base.")
    return from_mapping(model, ModelConfig, f"{path}, model")
