"""From a model option to a base model and its processor."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from corda_core.bases import ANCESTRY, set_ancestry_
from corda_vlm.checks import check_processor
from corda_vlm.context import with_sizes_of
from corda_vlm.data.pairs import OpenClipPairs
from corda_vlm.failures import one_line
from corda_vlm.towers import image_dtype, is_text_only
from corda_vlm.training.recipe import ModelConfig

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
"""What open_clip calls the weights in a model's folder."""
LOCAL = "local-dir:"
"""How open_clip names such a folder."""


def load_base(config: ModelConfig) -> tuple[nn.Module, Any]:
    """Return the model in evaluation mode and its processor (a tokenizer for text alone, ``OpenClipPairs`` for open_clip).

    Raises:
        ModuleNotFoundError: If an extra is needed that is not installed.
        ValueError: If the model is not there, is damaged, or its processor is of another model.
    """
    with network_only_if(config.download):
        return _load_open_clip(config) if config.library == "open_clip" else _load_transformers(config)


@contextmanager
def network_only_if(allowed: bool) -> Iterator[None]:
    """Keep the libraries of the hub off the network, unless it is allowed; PEFT and open_clip would ask it by themselves."""
    was_offline, variable = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    if not allowed:
        constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        os.environ.pop("HF_HUB_OFFLINE", None)
        if variable is not None:
            os.environ["HF_HUB_OFFLINE"] = variable


def _load_transformers(config: ModelConfig) -> tuple[nn.Module, Any]:
    known = _known(config)
    try:
        described = AutoConfig.from_pretrained(config.path, **known)
        reader = _reader(described)
        options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
        if config.attention is not None:
            options["attn_implementation"] = config.attention
        if config.quantize is not None:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=config.quantize,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=getattr(torch, config.dtype),
            )
        model = reader.from_pretrained(config.path, **known, **options).eval()
        processor = read_processor(config, model)
    except ImportError as error:
        raise ModuleNotFoundError(f"model.path {config.path} needs a package that is not installed: {error}") from error
    except Exception as error:  # of damaged files transformers lets through what a dozen libraries raise
        raise ValueError(_not_loaded(config, error)) from error
    check_processor(model, processor)
    return model, processor


def describe_base(config: ModelConfig) -> nn.Module:
    """Return the model without its weights (on the meta device), for estimates; reads its ``config.json`` only.

    Raises:
        ModuleNotFoundError: If an extra is needed that is not installed.
        ValueError: If the model is not there.
    """
    with torch.device("meta"):
        if config.library == "open_clip":
            return _open_clip().create_model(config.path, pretrained=None, device="meta").to(getattr(torch, config.dtype))
        try:
            described = AutoConfig.from_pretrained(config.path, **_known(config))
        except Exception as error:  # as above
            raise ValueError(_not_loaded(config, error)) from error
        model: nn.Module = _reader(described).from_config(
            described, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
        )
    return model


def read_processor(config: ModelConfig, model: nn.Module) -> Any:
    """Return what reads samples for a model of transformers: a tokenizer for text alone, else a processor.

    Raises:
        OSError: If it is not there.
        ValueError: If it cannot be read.
    """
    return with_sizes_of(model, (AutoTokenizer if is_text_only(model) else AutoProcessor).from_pretrained(config.path, **_known(config)))


def _known(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of all of transformers' ``from_pretrained``."""
    options: dict[str, Any] = {"local_files_only": not config.download, "trust_remote_code": config.trust_remote_code}
    return options if config.revision is None else options | {"revision": config.revision}


def _reader(described: Any) -> Any:
    """Return the class that reads a model of this kind with its output layer."""
    if described.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if described.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel


def _load_open_clip(config: ModelConfig) -> tuple[nn.Module, Any]:
    open_clip = _open_clip()
    is_file = config.weights is not None and Path(config.weights).exists()
    if config.path.startswith("hf-hub:") and not config.download:
        raise ValueError(f"model.path is {config.path!r}, which is on the hub; set model.download to true to fetch it.")
    if config.weights is not None and not is_file and not config.download:
        raise ValueError(f"model.weights is {config.weights!r}, which is no file here; give one, or set model.download to true for a tag.")
    try:
        precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[config.dtype]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            model, _, preprocess = open_clip.create_model_and_transforms(config.path, pretrained=config.weights, precision=precision)
        tokenizer = open_clip.get_tokenizer(config.path)
    except UserWarning as error:
        raise ValueError(
            f"model.path {config.path} and model.weights {config.weights} have other activations ({error}); take the architecture "
            "whose name ends in -quickgelu, or other weights."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(_not_loaded(config, error)) from error
    set_ancestry_(model, _recorded_ancestry(config))
    return model.eval(), OpenClipPairs(preprocess, tokenizer, image_dtype(model))


def _recorded_ancestry(config: ModelConfig) -> Any:
    """Return what `export --merge` wrote of a model's ancestors into its weights; open_clip's own loader leaves it there."""
    is_folder = config.path.startswith(LOCAL)  # then open_clip reads its weights from there
    file = Path(config.path.removeprefix(LOCAL)) / OPEN_CLIP_WEIGHTS if is_folder else Path(config.weights or "")
    if file.suffix != ".safetensors" or not file.exists():
        return []
    with safe_open(file, "pt") as weights:
        return json.loads((weights.metadata() or {}).get(ANCESTRY, "[]"))


def _open_clip() -> Any:
    # Imported here: it belongs to the extra `open-clip`.
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("open_clip is not installed; run: pip install 'corda-vlm[open-clip]'") from error
    return open_clip


def _not_loaded(config: ModelConfig, error: Exception) -> str:
    """Return the sentence for a model that could not be read."""
    reason = one_line(error)[:300]
    if Path(config.path).exists():
        return f"model.path {config.path} could not be read: {reason}"
    if config.download:
        return f"model.path {config.path} could not be fetched: {reason}; what has come stays, run again to resume."
    return (
        f"model.path {config.path} is no folder here and not in the cache of the hub; set model.download to true (export and eval: "
        "--download) to fetch it."
    )
