"""The benchmark's cases and its table; the runs themselves take minutes and are not tests."""

import torch
from torch import nn

from corda_eval.bench.cases import Case, batched
from corda_eval.bench.prepare import comparison


def test_batches_hold_all_samples_in_order() -> None:
    samples = [{"x": torch.full((1, 2), float(place))} for place in range(5)]
    batches = batched(Case(nn.Linear(2, 2), ("",), samples, batch_size=2, rank=1, options={}))
    assert [len(batch["x"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["x"] for batch in batches])[:, 0], torch.arange(5.0))


def test_table_takes_the_median_of_the_pairs_ratios() -> None:
    keys = ("forward", "collection", "decomposition", "overhead", "whole", "forward_mb", "extra_mb")
    runs = [
        {"side": side, "pair": pair, **dict.fromkeys(keys, value)}
        for side, values in (("ours", (1.0, 2.0, 4.0)), ("peft", (6.0, 4.0, 40.0)))
        for pair, value in enumerate(values)
    ]
    assert "| whole | 6.0 s | 2.0 s | 6.00 |" in comparison(runs)
