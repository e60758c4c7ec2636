"""Two processes (gloo, CPU) must give what one gives: samples sharded, layers shared out, DDP and FSDP2 models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

from corda_core import collect, plan, select_linears
from corda_core.store import read_plan

WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from conftest import tiny_llama
from corda_core import collect, plan, select_linears
from corda_core.store import save_plan
how, folder = sys.argv[1:]
dist.init_process_group("gloo")
torch.manual_seed(0)
model = tiny_llama()
names = select_linears(model)
from safetensors.torch import load_file, save_file
samples = load_file(folder + "/samples.safetensors")["ids"]
wrapped = model
if how == "ddp":
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
if how == "fsdp":
    from torch.distributed.fsdp import fully_shard
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
rank, world = dist.get_rank(), dist.get_world_size()
covariances = collect(wrapped, [{{"input_ids": part}} for part in samples[rank::world].split(2)], names)
adapter_plan = plan(wrapped, covariances, mode="kpm", rank=4)
save_plan(adapter_plan, f"{{folder}}/{{how}}{{rank}}.safetensors")
save_file({{name: covariance.matrix for name, covariance in covariances.items()}}, f"{{folder}}/covariances{{rank}}.safetensors")
dist.destroy_process_group()
"""


def run_in_two(script: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("how", ["plain", "ddp", "fsdp"])
def test_two_processes_equal_one(how: str, tmp_path: Path) -> None:
    ids = torch.randint(5, 20, (8, 16))
    save_file({"ids": ids}, tmp_path / "samples.safetensors")
    torch.manual_seed(0)
    model = tiny_llama()
    covariances = collect(model, [{"input_ids": ids}], select_linears(model))
    alone = plan(model, covariances, mode="kpm", rank=4)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[1])))
    run_in_two(script, how, str(tmp_path))
    for rank in (0, 1):
        adapter_plan = read_plan(tmp_path / f"{how}{rank}.safetensors")[0]
        assert list(adapter_plan.layers) == list(alone.layers)
        assert adapter_plan.provenance["base_digest"] == alone.provenance["base_digest"]
        matrices = load_file(tmp_path / f"covariances{rank}.safetensors")
        for name, init in adapter_plan.layers.items():
            expected = alone.layers[name]
            assert init.num_tokens == expected.num_tokens
            C = covariances[name].matrix
            torch.testing.assert_close(matrices[name], C, rtol=0, atol=1e-6 * C.abs().max().item())
            # The directions of near-equal σ turn with the last bits of C.
            torch.testing.assert_close(init.B0 @ init.A0, expected.B0 @ expected.A0, rtol=0, atol=1e-5)


SHARDED_EXPERTS = """
import sys
sys.path[:0] = [{tests!r}, {core!r}]
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from test_experts import KINDS, RANK, TARGETS, tiny
from corda_core import attach, lora_layers, select_linears
from corda_core.linears import expert_of
from corda_core.lora import change_factors, peft_layers
from corda_core.plan import random_plan
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
KINDS["Qwen3Moe"]["num_experts"] = 3  # 12 rows of A, 6 for each process: an expert and a half
model = tiny()
adapted = attach(model, random_plan(model, select_linears(model, TARGETS), RANK), protect="none")
for _, layer in peft_layers(adapted).values():
    torch.nn.init.normal_(layer.lora_B["default"].weight)
whole = {{name: [factor.clone() for factor in change_factors(layer)] for name, layer in lora_layers(adapted).items() if expert_of(name)}}
assert len(whole) == 12
for _, layer in peft_layers(adapted).values():
    for factors in (layer.lora_A, layer.lora_B):
        shards = distribute_tensor(factors["default"].weight.detach(), mesh, [Shard(0)])
        factors["default"].weight = torch.nn.Parameter(shards)
layers = lora_layers(adapted)
for name, factors in whole.items():
    for factor, expected in zip(change_factors(layers[name]), factors, strict=True):
        assert not isinstance(factor, DTensor) and torch.equal(factor, expected), name
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_factors_of_experts_are_read_where_they_are_sharded_across_experts(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = tmp_path / "worker.py"
    script.write_text(SHARDED_EXPERTS.format(tests=str(here.parent), core=str(here)))
    run_in_two(script)
