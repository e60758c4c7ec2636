"""How callers watch long steps: the core prints nothing and knows no progress bar."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps what a long step goes over, ``tqdm`` for instance."""

    def __call__(self, steps: Iterable[T], title: str) -> Iterable[T]:
        """Return the steps, to be gone over once."""


def no_progress(steps: Iterable[T], title: str) -> Iterable[T]:
    """Show nothing."""
    return steps
