"""Files of covariances and plans: whole, checked, refused with the reason."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import save_file
from torch import nn

from corda_core import Choice, Covariance, choose, collect, decompose, plan, select_linears
from corda_core.files import read_tensors, write_tensors
from corda_core.linears import weight_matrix
from corda_core.store import data_digest, load_covariances, read_covariances, read_plan, save_covariances, save_plan

OPTIONS = {"normalize": None, "dtype": "float32"}

WRITER = """
import sys
import torch
from corda_core import AdapterInit, AdapterPlan, Mode
from corda_core.store import save_plan
print("ready", flush=True)
number = 0.0
while True:
    number += 1
    init = AdapterInit(torch.full((64, 4096), number), torch.zeros(4, 64), torch.zeros(64), slice(0, 64), 1)
    save_plan(AdapterPlan({"layer": init}, Mode.KPM, 64, {}), sys.argv[1])
"""


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(5, 20, (4, 16))}]


@pytest.fixture
def covariances(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, Covariance]:
    return collect(model, batches, select_linears(model))


@pytest.fixture
def path(model: nn.Module, batches: list[dict[str, torch.Tensor]], covariances: dict[str, Covariance], tmp_path: Path) -> Path:
    path = tmp_path / "covariances.safetensors"
    save_covariances(covariances, path, model=model, data=data_digest(batches), options=OPTIONS)
    return path


def test_covariances_come_back(model: nn.Module, covariances: dict[str, Covariance], path: Path) -> None:
    found = load_covariances(path, model=model, options=OPTIONS)
    assert list(found) == list(covariances)
    for name, covariance in found.items():
        assert torch.equal(covariance.matrix, covariances[name].matrix)
        assert covariance.num_tokens == covariances[name].num_tokens
    layer = "model.layers.0.self_attn."
    assert found[f"{layer}q_proj"] is found[f"{layer}k_proj"]
    assert path.stat().st_size < 0.8 * sum(4 * one.packed.n**2 for one in covariances.values())


def test_half_the_bits_choose_the_same_directions(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], covariances: dict[str, Covariance], path: Path
) -> None:
    whole, half = covariances, path.with_name("half.safetensors")
    save_covariances(whole, half, model=model, data="", options={}, half=True)
    found = load_covariances(half, model=model, options={})
    tensors = {key: value for key, value in read_tensors(half)[0].items() if not key.endswith("lengths")}
    assert {value.dtype for value in tensors.values()} == {torch.int16}
    for name, covariance in found.items():
        C, expected = covariance.matrix, whole[name].matrix
        lengths = expected.diagonal().sqrt()
        assert ((C - expected).abs() <= 1.6e-5 * lengths[:, None] * lengths).all()
        torch.testing.assert_close(C.diagonal(), expected.diagonal())
        W, damped = weight_matrix(model, name), whole[name].damped(0.01)
        energies = [damped.times(decompose(W, one, 4, "kpm").rows.T).norm() for one in (covariance, whole[name])]
        assert energies[0] <= 1.001 * energies[1]
    layer = "model.layers.0.self_attn."
    assert found[f"{layer}q_proj"] is found[f"{layer}k_proj"]


def test_an_input_that_is_always_zero_stays_so_in_half_the_bits() -> None:
    rows = torch.randn(30, 5)
    rows[:, 2] = 0
    packed, lengths = Covariance.of(rows.T @ rows, 30).halved()
    torch.testing.assert_close(packed.scaled(lengths).dense(), rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert (packed.scaled(lengths).dense()[2] == 0).all()


def test_plan_comes_back(model: nn.Module, covariances: dict[str, Covariance], tmp_path: Path) -> None:
    _, choices = choose(model, [covariances, covariances])
    made = plan(model, covariances, mode="kpm", rank=3, whiten=True)
    layers = {name: replace(init, choice=Choice(choices[name].candidates, 1)) for name, init in made.layers.items()}
    made = replace(made, layers=layers)
    save_plan(made, tmp_path / "plan.safetensors")
    found = read_plan(tmp_path / "plan.safetensors")[0]
    assert (found.mode, found.rank, found.provenance) == (made.mode, made.rank, made.provenance)
    for name, init in made.layers.items():
        again = found.layers[name]
        assert torch.equal(again.A0, init.A0)
        assert torch.equal(again.B0, init.B0)
        assert torch.equal(again.sigma, init.sigma)
        assert (again.components, again.num_tokens, again.choice.index) == (init.components, init.num_tokens, 1)
        assert init.whitening is not None
        assert again.whitening is not None
        assert torch.equal(again.whitening.vectors, init.whitening.vectors)
        assert torch.equal(again.whitening.lengths, init.whitening.lengths)
        assert (again.whitening.unit, again.whitening.error) == (init.whitening.unit, init.whitening.error)
        assert [one.score for one in again.choice.candidates] == [one.score for one in init.choice.candidates]


def test_refused_for_another_base_other_options_other_data(model: nn.Module, path: Path) -> None:
    with pytest.raises(ValueError, match="other options"):
        load_covariances(path, model=model, options={**OPTIONS, "normalize": "sample-max"})
    with pytest.raises(ValueError, match="other data"):
        load_covariances(path, model=model, options=OPTIONS, data="0" * 64)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="other base weights"):
        load_covariances(path, model=model, options=OPTIONS)
    with pytest.raises(ValueError, match="another model"):
        load_covariances(path, model=nn.Linear(3, 3), options=OPTIONS)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_files_are_refused(model: nn.Module, path: Path, keep: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ValueError, match=r"covariances\.safetensors is damaged"):
        load_covariances(path, model=model, options=OPTIONS)


def test_missing_and_foreign_files(model: nn.Module, path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_plan(tmp_path / "none.safetensors")[0]
    with pytest.raises(ValueError, match="holds 'covariances'.*expected 'plan'"):
        read_plan(path)[0]


@pytest.mark.parametrize("kind", ["plan", "covariances"])
def test_a_flipped_bit_anywhere_is_refused(
    kind: str, model: nn.Module, covariances: dict[str, Covariance], path: Path, tmp_path: Path
) -> None:
    if kind == "plan":
        path = tmp_path / "plan.safetensors"
        save_plan(plan(model, covariances, mode="kpm", rank=3), path)
    whole = path.read_bytes()
    for place in torch.randint(8 * len(whole), (60,)).tolist() + list(range(0, 8 * 400, 61)):
        spoilt = bytearray(whole)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_plan(path)[0] if kind == "plan" else load_covariances(path, model=model, options=OPTIONS)


def test_files_of_the_first_version_load_with_a_warning(model: nn.Module, covariances: dict[str, Covariance], path: Path) -> None:
    expected = load_covariances(path, model=model, options=OPTIONS)
    as_version_one(path)
    with pytest.warns(UserWarning, match=r"covariances\.safetensors was written by corda-vlm 0\.1\.0 and has no digest"):
        found = load_covariances(path, model=model, options=OPTIONS)
    assert all(torch.equal(one.matrix, expected[name].matrix) for name, one in found.items())
    tensors, metadata = read_tensors(path)
    save_file(tensors, path, {"corda": metadata["corda"].replace('"format": 2', '"format": 3')})
    with pytest.raises(ValueError, match="of format 3 without a digest"):  # else damage to its name would take the digest away
        load_covariances(path, model=model, options=OPTIONS)


def test_files_from_before_there_were_keep_files_load(model: nn.Module, covariances: dict[str, Covariance], path: Path) -> None:
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata["corda"])
    for key in ("weights", "total_weights", "about"):
        del header[key]
    write_tensors(tensors, path, {"corda": json.dumps(header)})
    found = load_covariances(path, model=model, options=OPTIONS)
    assert all(torch.equal(covariance.matrix, found[name].matrix) for name, covariance in covariances.items())
    assert {covariance.weight for covariance in found.values()} == {None}
    assert read_covariances(path).known == found.keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("layers"),
        lambda header: header.update(layers=[1, 2]),
        lambda header: header.update(num_tokens=None),
        lambda header: header["num_tokens"].pop(),
        lambda header: header["layers"].update({next(iter(header["layers"])): 99}),
    ],
)
def test_headers_of_another_shape_are_refused(change: Callable[[dict[str, Any]], Any], model: nn.Module, path: Path) -> None:
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata["corda"])
    change(header)
    write_tensors(tensors, path, {"corda": json.dumps(header)})
    with pytest.raises(ValueError, match=r"covariances\.safetensors has a header that does not fit"):
        load_covariances(path, model=model, options=OPTIONS)


def as_version_one(path: Path) -> None:
    """Rewrite a file as 0.1.0 wrote it."""
    tensors, metadata = read_tensors(path)
    save_file(tensors, path, {"corda": metadata["corda"].replace('"format": 3', '"format": 2')})


def test_data_digest_tells_batches_apart() -> None:
    one, two = {"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([1, 3])}
    assert data_digest([one]) == data_digest([{"input_ids": torch.tensor([1, 2])}])
    assert len({data_digest(batches) for batches in ([one], [two], [one, two], [two, one])}) == 4


@pytest.mark.slow
def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    """A writer that is killed again and again: the file is always one of the whole ones."""
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    path = tmp_path / "plan.safetensors"
    for pause in (0.05, 0.21, 0.4):
        writer = subprocess.Popen([sys.executable, str(script), str(path)], stdout=subprocess.PIPE, env=os.environ)
        assert writer.stdout is not None
        writer.stdout.readline()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        A0 = read_plan(path)[0].layers["layer"].A0
        assert len(A0.unique()) == 1
