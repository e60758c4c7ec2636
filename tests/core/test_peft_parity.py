"""Against PEFT's CorDA: the same ``B0 A0`` where float32 can know it, and a float64 judge where it cannot."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corda_core import collect, lora_layers, plan, select_linears

RANK = 4


class Stack(nn.Module):
    """Layers of all proportions, and one that is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.wide, self.tall = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 40)
        self.transposed = Conv1D(20, 24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.square(x), self.wide(x), self.tall(x), self.transposed(x)], dim=-1)


def peft_model(model: nn.Module, samples: list[Tensor], mode: str) -> nn.Module:
    """Return the model with the adapter that PEFT initialises."""
    names = select_linears(model)
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=list(names),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    preprocess_corda(model, config, run_model=lambda: [model(sample) for sample in samples])
    return get_peft_model(model, config)


def peft_product(model: nn.Module, samples: list[Tensor], mode: str) -> dict[str, Tensor]:
    """``B A`` of each layer as PEFT initialises it."""
    layers = lora_layers(peft_model(model, samples, mode))
    return {name: layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach() for name, layer in layers.items()}


def our_product(model: nn.Module, samples: list[Tensor], mode: str) -> dict[str, Tensor]:
    covariances = collect(model, [{"x": sample} for sample in samples], select_linears(model), normalize="sample-max")
    adapter_plan = plan(model, covariances, mode=mode, rank=RANK, split="paper")
    return {name: init.B0 @ init.A0 for name, init in adapter_plan.layers.items()}


def samples_of(scales: Tensor) -> list[Tensor]:
    """Samples whose largest entry is positive: PEFT divides by |max(x)|, we by max|x|, which are then the same."""
    samples = [torch.randn(1, 60, len(scales)) * scales for _ in range(8)]
    for sample in samples:
        sample[0, 0, 0] = 1.5 * sample.abs().max()
    return samples


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_the_same_product_where_it_is_well_conditioned(mode: str) -> None:
    model, samples = Stack(), samples_of(torch.linspace(0.5, 2.0, 24))
    our_update = our_product(model, samples, mode)
    peft_update = peft_product(model, samples, mode)
    assert set(our_update) == set(peft_update) == {"square", "wide", "tall", "transposed"}
    for name, product in our_update.items():
        torch.testing.assert_close(product, peft_update[name], rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_float64_judge_where_it_is_not() -> None:
    """σ₁/σ_k of W C near 1e6: PEFT's float32 picks directions with more context energy than the smallest there is, ours does not."""
    n = 96
    model = nn.Sequential(nn.Linear(n, n, bias=False))
    generator = torch.Generator().manual_seed(0)
    left, basis = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    model[0].weight.data = left * torch.logspace(0, -4, n) @ basis.T
    samples = [torch.randn(1, 4 * n, n, generator=generator) * torch.logspace(0, -1, n) @ basis.T for _ in range(4)]
    samples = [sample / sample.abs().max() for sample in samples]
    covariances = collect(model, [{"input": sample} for sample in samples], ["0"], normalize="sample-max")
    P = model[0].weight.detach().double() @ covariances["0"].damped(0.01).dense(torch.float64, torch.device("cpu"))
    smallest = torch.linalg.svdvals(P)[-RANK:].norm()

    def energy_ratio(B: Tensor) -> float:
        """Context energy of the directions that B spans, over the smallest there is."""
        return float((torch.linalg.qr(B.double()).Q.T @ P).norm() / smallest)

    our_B = plan(model, covariances, mode="kpm", rank=RANK).layers["0"].B0
    peft_B = lora_layers(peft_model(model, samples, "kpm"))["0"].lora_B["default"].weight.detach()
    assert energy_ratio(our_B) < 1.001
    assert energy_ratio(peft_B) > 1.01
