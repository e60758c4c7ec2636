"""Work on every layer, and in threads: order, cores, errors."""

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch import Tensor

from corda_core import select_linears
from corda_core.layers import flops_per_second, in_threads, no_progress, num_workers, on_host, over_layers


def test_every_layer_once_in_order_with_progress() -> None:
    model = tiny_llama()
    names = select_linears(model)
    watched: list[tuple[str, list[str]]] = []

    def progress(steps: Iterable[Any], title: str) -> Iterable[Any]:
        watched.append((title, list(steps)))
        return steps

    shapes = over_layers(model, names, lambda name, weight: (name, weight.shape), progress, "look")
    assert list(shapes) == list(names)
    assert all(shapes[name] == (name, model.get_submodule(name).weight.shape) for name in names)
    assert watched == [("look", list(names))]


def test_errors_name_the_layer() -> None:
    def fail(name: str, weight: Tensor) -> None:
        if "up_proj" in name:
            raise ValueError("it is odd.")

    model = tiny_llama()
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj: it is odd\."):
        over_layers(model, select_linears(model), fail, no_progress, "")


def test_layers_are_taken_at_a_time_only_where_they_are_small_and_on_the_cpu() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert num_workers([(64, 4096)], torch.device("cpu")) == 4
        assert num_workers([(64, 4096), (4096, 4096)], torch.device("cpu")) == 1
        assert num_workers([(64, 64)], torch.device("meta")) == 1
    finally:
        torch.set_num_threads(threads)


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
        thread_counts = set(
            in_threads(lambda _: (torch.get_num_threads(), threading.current_thread() is threading.main_thread()), range(8), 2)
        )
        assert thread_counts == {(2, False)}
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


def test_tensors_come_to_this_machine_as_they_are() -> None:
    values = torch.randn(3, 4), torch.arange(5, dtype=torch.float64)
    for tensor, copy in zip(values, on_host(*values), strict=True):
        assert copy.device.type == "cpu"
        assert torch.equal(copy, tensor)


@pytest.mark.gpu
def test_tensors_come_from_a_device_whole_and_into_ordinary_memory() -> None:
    values = torch.randn(2048, 2048, device="cuda"), torch.randn(7, device="cuda", dtype=torch.float64)
    for tensor, copy in zip(values, on_host(*(value + 0 for value in values)), strict=True):
        assert not copy.is_pinned()
        assert torch.equal(copy, tensor.cpu())


def test_the_speed_of_products_is_measured_once() -> None:
    assert flops_per_second(torch.device("cpu"), torch.float32) > 1e8
    assert flops_per_second(torch.device("cpu"), torch.float32) == flops_per_second(torch.device("cpu"), torch.float32)
