"""What is checked before anything is computed: the model, and the processor that reads its samples."""

import warnings
from typing import Any

from accelerate.utils.other import is_compiled_module
from peft import PeftModel
from torch import nn

from corda_core.bases import check_untouched
from corda_core.linears import unwrapped
from corda_vlm.data.conversation import reads_images, tokenizer_of

WRAPPED = ("module", "_fsdp_wrapped_module")
"""Wrappers' names for the module that they hold."""


def checked_base(model: nn.Module) -> nn.Module:
    """Return the base itself, without DDP, DataParallel or ``torch.compile`` around it.

    Raises:
        TypeError: If it is no model.
        ValueError: If it carries adapters (its layers have other names then, and perhaps other outputs than the base's), is wrapped in
            a way that is not known, or is not all in memory.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a model of torch: load it first, with from_pretrained for instance.")
    base = unwrapped(model)
    if isinstance(base, PeftModel):
        raise ValueError(
            f"The model carries the adapter {next(iter(base.peft_config))!r} already, and contexts are those of a base without any: "
            "collect them before, or merge the adapter first; a second one on the same base is put on with corda_core.attach."
        )
    children = dict(base.named_children())
    if len(children) == 1 and (key := next(iter(children))) in WRAPPED:
        raise ValueError(
            f"{type(base).__name__} is wrapped around a {type(children[key]).__name__} in a way that is not known here; pass the model "
            "itself, and wrap what comes back."
        )
    compiled = next(
        (name for name, module in base.named_modules() if module._compiled_call_impl is not None or is_compiled_module(module)), None
    )
    if compiled is not None:
        raise ValueError(
            f"{compiled or type(base).__name__} is compiled, and would be compiled anew for every shape and hook; pass the model as it was "
            "before, and compile what comes back."
        )
    check_untouched(base)
    return base


def warn_of_resized(model: nn.Module) -> None:
    """Warn before the training, not after, that an adapter cannot be loaded without the very rows that resizing has drawn."""
    config: Any = getattr(model, "config", None)
    path = getattr(config, "_name_or_path", "")
    if not path:
        return
    try:
        known = type(config).from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        return
    before, present = (getattr(version.get_text_config(), "vocab_size", None) for version in (known, config))
    if before != present:
        warnings.warn(
            f"The embeddings have {present} rows, those of {path} {before}: new rows are random each time, and the adapter depends on "
            "them; save this base with save_pretrained, to load the adapter on it.",
            stacklevel=4,
        )


def check_processor(model: Any, processor: Any) -> None:
    """Refuse a processor of another model, before it makes tokens that the model does not know.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, the two mean other tokens by an image, or images cannot be read.
    """
    kind, tokenizer = type(processor).__name__, tokenizer_of(processor)
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "text_config", config), "vocab_size", None)
    tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    if size is not None and tokens > size:
        raise ValueError(f"The {kind} has {tokens} tokens, but the model knows {size}: it belongs to another model; take the model's own.")
    if _image_token_of(config) is not None and not reads_images(processor):
        raise ValueError(f"{kind} reads no images, but {type(model).__name__} takes them; pass the model's own processor.")
    check_image_token(model, processor)


def check_image_token(model: Any, processor: Any) -> None:
    """Refuse a processor whose token for an image is not the one that the model expects.

    Raises:
        ValueError: If the tokens differ.
    """
    expected = _image_token_of(getattr(model, "config", None))
    token = getattr(processor, "image_token_id", expected)
    # Of Gemma 3, Llama 4 and Ovis 2 the one that prompts have, in whose place the processor puts others, which the tokenizer knows.
    known = getattr(getattr(processor, "tokenizer", None), "added_tokens_decoder", {})
    if expected is not None and token != expected and expected not in known:
        raise ValueError(
            f"{type(processor).__name__} puts token {token} where an image stands, but the model expects {expected}: it belongs to another "
            "model; take its own."
        )


def _image_token_of(config: Any) -> int | None:
    token: int | None = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    return token
