"""What an error means to users."""

import errno
import re
from collections.abc import Iterator

import torch.distributed as dist

from corda_core.layers import num_processes


def one_line(error: BaseException) -> str:
    """Return an error's text for the middle of a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error or one of its causes says that there was no room to write."""
    # Words: safetensors has an error of its own for it, and torch.save one of its container's position.
    words = re.compile("No space left on device|unexpected pos")
    return any(getattr(cause, "errno", None) == errno.ENOSPC or words.search(str(cause)) for cause in _causes(error))


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error or one of its causes says that another process of the group ended or cannot be reached."""
    # Words: gloo's and NCCL's errors in a backward pass are plain RuntimeErrors.
    words = re.compile("gloo|NCCL|[Cc]onnection (closed|reset)")
    return any(
        isinstance(cause, dist.DistError) or (num_processes() > 1 and isinstance(cause, RuntimeError) and words.search(str(cause)))
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, newest first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
