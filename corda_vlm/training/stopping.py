"""Stop at once when a signal asks for it: this process, whatever it is in the middle of, and those that it started."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

import psutil  # type: ignore[import-untyped]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what schedulers and launchers send, and a terminal that closes."""
GRACE = 1.0
"""Seconds in which children may end by themselves and this process may leave what it is in, before both are killed."""


class Stopped(BaseException):
    """What the main thread leaves its work with; no ``except Exception`` holds it up."""


@contextmanager
def stoppable(say: Callable[[signal.Signals], None]) -> Iterator[None]:
    """End the process with 128 + its number when a signal comes while the context is open; first call ``say``.

    Signals that are ignored or that somebody else takes stay as they are; and all of them outside of the main thread, which alone gets any.
    """
    is_main = threading.current_thread() is threading.main_thread()
    free = [number for number in SIGNALS if is_main and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    if not free:
        yield
        return
    stop = _Stop(say)
    watcher = threading.Thread(target=stop.watch, daemon=True)
    watcher.start()
    with stop.handling(free):
        try:
            yield
        finally:  # also if it ended, or failed for want of a child, in the same moment
            if stop.asked.is_set():
                stop.left.set()
                watcher.join()  # which ends the process


@dataclass(frozen=True)
class _Stop:
    """One wait for a signal. The watcher hears of it at once; the main thread between two lines of Python, which may be minutes apart."""

    say: Callable[[signal.Signals], None]
    asked: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    """Whether the main thread has left its work, and closed what it had open."""
    pipe: tuple[int, int] = field(default_factory=os.pipe)

    @contextmanager
    def handling(self, numbers: Sequence[signal.Signals]) -> Iterator[None]:
        """Send the signals' numbers down the pipe."""
        os.set_blocking(self.pipe[1], False)
        handlers = {number: signal.signal(number, self._leave) for number in numbers}
        before = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)

        def restore() -> None:
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)

        is_open = threading.Event()
        is_open.set()
        os.register_at_fork(after_in_child=lambda: restore() if is_open.is_set() else None)  # what is sent to a worker is for it alone
        try:
            yield
        finally:
            is_open.clear()
            restore()
            os.close(self.pipe[1])

    def watch(self) -> None:
        """Wait for a signal, or for the end of the pipe; after a signal call ``say``, then end children and this process."""
        number = next((byte[0] for byte in iter(lambda: os.read(self.pipe[0], 1), b"") if byte[0] in SIGNALS), None)
        if number is None:
            os.close(self.pipe[0])
            return
        self.asked.set()
        self.say(signal.Signals(number))
        children = psutil.Process().children(recursive=True)
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    end(child)
            _, children = psutil.wait_procs(children, timeout=GRACE)
        self.left.wait(GRACE)
        os._exit(128 + number)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self.asked.set()
        os.write(self.pipe[1], bytes([number]))  # should another library have taken the wakeup descriptor
        if not self.left.is_set():  # nothing may come between the main thread and the end
            raise Stopped
