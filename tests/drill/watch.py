"""Work in this process that is stopped when it takes too long, and what its errors say."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from drill.kills import LONGEST


class HangError(BaseException):
    """Work took too long; no handler of errors may take it for one."""


@contextmanager
def alarm() -> Iterator[None]:
    """Raise ``HangError`` in what takes longer than ``LONGEST``."""

    def stop(number: int, frame: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(LONGEST))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def unclear(sentence: str, names: Iterable[str]) -> str:
    """Return what is wrong with an error's text, or nothing: it is one line of ours, and holds one of the names."""
    for problem, holds in (
        ("refused in more than a sentence", "\n" in sentence),
        ("refused in a system's words", "[Errno" in sentence or "(os error" in sentence),
        ("refused without its name", not any(name[:40] in sentence for name in names)),
    ):
        if holds:
            return f"{problem}: {sentence[:300]}"
    return ""
