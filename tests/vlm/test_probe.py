"""Which layers can learn."""

from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch import Tensor, nn

from corda_core import select_linears
from corda_vlm.probe import probe


class Maze(nn.Module):
    """A layer whose output is used, one whose is dropped, one without gradient, one behind an argmax, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("used", "dropped", "frozen", "counted", "idle"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.used(x)
        self.dropped(hidden)
        with torch.no_grad():
            frozen = self.frozen(hidden)
        counted = self.counted(hidden).argmax(-1, keepdim=True)
        return {"logits": hidden + frozen + counted, "states": (hidden, [None, "text"])}


NAMES = ["used", "dropped", "frozen", "counted", "idle"]


@pytest.mark.parametrize("training", [True, False])
def test_every_kind_of_layer_is_told_apart(training: bool) -> None:
    model = Maze().train(training)
    reach = probe(model, {"x": torch.randn(2, 4)}, NAMES)
    assert reach.learnable == ("used",)
    assert set(reach.unused) == {"dropped", "frozen", "counted"}
    assert reach.not_run == ("idle",)
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_answer_is_that_of_a_backward_pass() -> None:
    model = Maze()
    model(torch.randn(2, 4))["logits"].sum().backward()
    trained = tuple(name for name in NAMES if model.get_submodule(name).weight.grad is not None)
    assert probe(model, {"x": torch.randn(2, 4)}, NAMES).learnable == trained


def test_frozen_weights_and_shared_modules_do_not_matter() -> None:
    model = tiny_llama().requires_grad_(False)
    model.model.layers[1].mlp = model.model.layers[0].mlp  # runs twice
    names = select_linears(model)
    assert probe(model, {"input_ids": torch.tensor([[2, 5, 6]])}, names).learnable == names


def test_hooks_are_gone_after_an_error() -> None:
    model = Maze()
    with pytest.raises(RuntimeError):
        probe(model, {"x": torch.randn(2, 5)}, NAMES)
    assert not any(module._forward_hooks for module in model.modules())
