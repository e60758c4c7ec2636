"""`prepare` under two processes (gloo, CPU) makes the adapter that one process makes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file

import corda_vlm
from corda_core import lora_layers, save_covariances
from corda_vlm import CordaConfig, collect_context

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from conftest import tiny_llama
from safetensors.torch import save_file
from transformers import AutoTokenizer
import corda_vlm
from corda_core import lora_layers
dist.init_process_group("gloo")
folder = sys.argv[1]
texts = [(None, text) for text in open(folder + "/texts.txt").read().splitlines()]
context = [*Path(folder).glob("kept.safetensors"), *texts]
model = corda_vlm.prepare(tiny_llama(), context, processor=AutoTokenizer.from_pretrained(folder), rank=4, batch_size=3, max_memory="9KB")
products = {{name: layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data for name, layer in lora_layers(model).items()}}
save_file(products, f"{{folder}}/products{{dist.get_rank()}}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("num_filed", [0, 4])
def test_two_processes_make_the_same_adapter(num_filed: int, tokenizer: Any, tmp_path: Path) -> None:
    """Also where some of the context is a keep file."""
    words = ["red", "blue", "green", "circle", "a", "one", "two", "shape", "what", "color", "is"]
    texts = [" ".join(words[(i * j) % 11] for j in range(1, 5 + i % 4)) for i in range(1, 12)]
    (tmp_path / "texts.txt").write_text("\n".join(texts[num_filed:]))
    if num_filed:
        filed = collect_context(tiny_llama(), [(None, text) for text in texts[:num_filed]], CordaConfig(), tokenizer)
        save_covariances(filed, tmp_path / "kept.safetensors", model=tiny_llama(), data="", options={})
    tokenizer.save_pretrained(tmp_path)
    alone = corda_vlm.prepare(tiny_llama(), [(None, text) for text in texts], processor=tokenizer, rank=4)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[1])))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    expected = {
        name: layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data for name, layer in lora_layers(alone).items()
    }
    for rank in (0, 1):
        products = load_file(tmp_path / f"products{rank}.safetensors")
        assert set(products) == set(expected)
        for name, product in products.items():
            torch.testing.assert_close(product, expected[name], rtol=0, atol=1e-4)
