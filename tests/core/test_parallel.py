"""Work in threads: order, cores, errors."""

import threading
from collections.abc import Iterator

import pytest
import torch

from corda_core.layers import in_threads


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_items_are_drawn_as_needed(workers: int) -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            drawn.append(item)
            yield item

    results = in_threads(lambda item: item * item, items(), workers)
    assert next(results) == 0
    assert len(drawn) <= 2 * workers
    assert list(results) == [item * item for item in range(1, 20)]


def test_workers_share_the_cores() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = set(in_threads(lambda _: (torch.get_num_threads(), threading.current_thread() is threading.main_thread()), range(8), 2))
        assert found == {(2, False)}
        assert torch.get_num_threads() == 4
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [4]
    finally:
        torch.set_num_threads(threads)


def test_the_first_error_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda item: 1 // item, [3, 2, 0, 1], 2))
