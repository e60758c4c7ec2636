"""What a language model can read, and whether it needs the positions of its tokens."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from corda_vlm.towers import image_tokens


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
    """Whether it counts positions from the left of a batch, and takes no others: samples of a batch must have the same length."""
    needs_positions: bool = False
    """Whether it counts positions from the left of a batch, padding included, unless it gets ``position_ids``."""

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
    decoder = (model.get_decoder() if hasattr(model, "get_decoder") else None) or model
    tables = _position_tables(decoder)
    # Tables that keep a place for padding, as RoBERTa's, derive positions from the tokens, and begin after that place.
    own = next((table for table in tables if table.padding_idx is not None), None)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    counts_from_left = own is None and not _is_rotary(decoder)
    return TextLimits(
        max_tokens=num_positions(model) if own is None else own.num_embeddings - own.padding_idx - 1,
        num_embeddings=_num_embeddings(model),
        image_tokens=tuple(image_tokens(model)),
        padding_shifts=counts_from_left and not takes_positions and bool(tables),
        needs_positions=counts_from_left and takes_positions,
    )


def num_positions(model: Any) -> int | None:
    """Return how many positions the language model or text tower of a model of transformers has; None if it is not known."""
    config: Any = getattr(model, "config", None)
    count = getattr(config.get_text_config(), "max_position_embeddings", None) if hasattr(config, "get_text_config") else None
    return count if isinstance(count, int) and count > 0 else None  # XLNet's -1 means any number


def _num_embeddings(model: Any) -> int | None:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # transformers does not know where this model has them
        return None


def _position_tables(decoder: nn.Module) -> list[Any]:
    """Return the embeddings of absolute positions."""
    return [
        module for name, module in decoder.named_modules() if "position" in name.rpartition(".")[2] and isinstance(module, nn.Embedding)
    ]


def _is_rotary(decoder: nn.Module) -> bool:
    """Return whether queries and keys are rotated by their positions, so that only distances matter; in Qwen2-VL's dimensions too."""
    return any("rotary" in type(module).__name__.lower() for module in decoder.modules())
