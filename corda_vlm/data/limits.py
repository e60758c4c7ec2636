"""What the language model of a model can read, and whether it must be told where its tokens stand."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class TextLimits:
    """What a model can read; by default anything."""

    max_tokens: int | None = None
    """Its positions."""
    num_embeddings: int | None = None
    """Tokens that it has an embedding for."""
    image_tokens: tuple[int, ...] = ()
    """Tokens that get their embedding from an image."""
    padding_shifts: bool = False
    """Whether its positions are counted from the left of a batch, and cannot be told: samples of a batch must be of one length."""
    needs_positions: bool = False
    """Whether its positions are counted from the left of a batch, padding included, unless ``position_ids`` says where tokens stand."""

    def check(self, input_ids: Tensor) -> None:
        """Refuse one sample's tokens (T,) if the model cannot read them.

        Raises:
            ValueError: If there are too many, or one is unknown.
        """
        if self.max_tokens is not None and len(input_ids) > self.max_tokens:
            raise ValueError(
                f"A sample has {len(input_ids):,} tokens, but the model has {self.max_tokens:,} positions; shorten it, or leave it out."
            )
        if self.num_embeddings is None:
            return
        unknown = [token for token in input_ids.tolist() if token >= self.num_embeddings and token not in self.image_tokens]
        if unknown:
            raise ValueError(
                f"A sample has the token {unknown[0]}, but the model has embeddings of {self.num_embeddings} tokens; take the model's own "
                "processor, or resize its embeddings."
            )


def limits_of(model: Any) -> TextLimits:
    """Return what a vision-language or language model of transformers can read; of others nothing is known."""
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return TextLimits()
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    decoder = model if found is None else found
    # Tables that keep a place for padding, as RoBERTa's, find the positions themselves from the tokens, and begin behind that place.
    table = next((module for name, module in decoder.named_modules() if _is_own_table(name, module)), None)
    images = [getattr(config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id")]
    return TextLimits(
        max_tokens=num_positions(model) if table is None else table.num_embeddings - table.padding_idx - 1,
        num_embeddings=_num_embeddings(model),
        image_tokens=tuple(token for token in images if isinstance(token, int)),
        padding_shifts=table is None
        and not _is_told(model)
        and _turns_nothing(decoder)
        and any(map(_holds_positions, decoder.named_modules())),
        needs_positions=table is None and _is_told(model) and _turns_nothing(decoder),
    )


def num_positions(model: Any) -> int | None:
    """Return how many positions the language model or text tower of a model of transformers has; None if it is not known."""
    config: Any = getattr(model, "config", None)
    found = getattr(config.get_text_config(), "max_position_embeddings", None) if hasattr(config, "get_text_config") else None
    return found if isinstance(found, int) and found > 0 else None  # XLNet's -1 stands for any number


def _num_embeddings(model: Any) -> int | None:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # transformers does not know where this model has them
        return None


def _is_own_table(name: str, module: nn.Module) -> bool:
    return _holds_positions((name, module)) and getattr(module, "padding_idx", None) is not None


def _holds_positions(named: tuple[str, nn.Module]) -> bool:
    """Return whether a module is a table of absolute positions."""
    name, module = named
    return "position" in name.rpartition(".")[2] and isinstance(module, nn.Embedding)


def _is_told(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _turns_nothing(decoder: nn.Module) -> bool:
    """Return whether queries and keys are not turned by their positions, which leaves only distances to matter.

    Models that count in more dimensions than one, as Qwen2-VL, turn too.
    """
    return not any("rotary" in type(module).__name__.lower() for module in decoder.modules())
