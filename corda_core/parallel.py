"""Several pieces of work at a time on one CPU: kernels on small matrices leave most cores idle."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield ``function(item)`` of all items, in order, done by ``workers`` threads that share the caller's cores.

    No more than 2 × workers items are drawn ahead; with one worker all is done in the caller's thread. The first error ends it.
    """
    if workers == 1:
        yield from map(function, items)
        return
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, cores // workers),)) as pool:
            running: deque[Future[R]] = deque()
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) == 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
    finally:
        torch.set_num_threads(cores)  # what a worker sets for itself, torch also gives to threads that start later
