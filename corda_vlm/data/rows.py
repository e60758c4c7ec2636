"""Samples that know where they come from, so that an error can name the one that is wrong."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from PIL import Image
from torch.utils.data import Dataset

Item = Any
"""(image or None, text), or a dict with ``text``, ``question``/``answer``, ``conversations`` or ``messages``, and perhaps ``image``."""

T = TypeVar("T")


class Row(dict[str, Any]):
    """The fields of a sample, and where it comes from."""

    def __init__(self, fields: Mapping[str, Any], where: str, max_tokens: int | None = None) -> None:
        """Take the fields, the place that errors name, and after how many tokens to cut the sample."""
        super().__init__(fields)
        self.where, self.max_tokens = where, max_tokens

    def __reduce__(self) -> Any:
        return Row, (dict(self), self.where, self.max_tokens)


class Numbered(Dataset[Any], Sequence[Any]):
    """Samples that know their number, unless they know a better place."""

    def __init__(self, items: Any, name: str) -> None:
        """Take samples that have a length and numbers, and what to call them.

        Raises:
            ValueError: If they are one sample, a table or text.
        """
        if isinstance(items, (Mapping, str)) or hasattr(items, "iloc"):
            raise ValueError(
                f"{name} is a {type(items).__name__}; expected a list or dataset of samples: put one sample or batch into a list, name the "
                'split of a dict of datasets, and give a table of pandas as `.to_dict("records")`.'
            )
        self.items, self.name = items, name

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        item = self.items[index]
        return item if isinstance(item, (Row, Image.Image)) else Row(fields_of(item), f"{self.name}[{index}]")


def read_each(read: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
    """Return what is read from each sample.

    Raises:
        ValueError: If one cannot be read; the text says which.
    """
    values = []
    for number, item in enumerate(items):
        try:
            values.append(read(item))
        except ValueError as error:
            raise ValueError(f"{getattr(item, 'where', f'Sample {number} of the batch')}: {error}") from error
    return values


def fields_of(item: Item) -> Mapping[str, Any]:
    """Return a dict as it is, and an (image or None, text) pair as fields.

    Raises:
        ValueError: If the item is neither.
    """
    if isinstance(item, Mapping):
        return item
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        return {"image": item[0], "text": item[1]}
    raise ValueError(f"A sample is a {type(item).__name__}; expected a pair (image or None, text) or a dict.")
