"""What an adapter relies on beside its own layers: another base is refused by the tensor's name, and so is one that is not all there."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, tiny_llama, tiny_llava
from test_attach import logits, planned, trained
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from corda_core import attach, attachment_of, collect, export, files, load, merge, plan, save, select_linears, weight_change
from corda_core.bases import ancestry_of, base_digest, checksum, moved_since, other_tensors, weight_digests
from corda_core.linears import weight_matrix
from corda_core.store import ATTACHMENT, read_attachment, save_attachment


def resized(seed: int) -> LlamaForCausalLM:
    """Return a base with four tokens more, whose rows are random: others for each seed, as they are in each process."""
    model = tiny_llama()
    torch.manual_seed(seed)
    model.resize_token_embeddings(29, mean_resizing=False)
    return model


def adapted(model: nn.Module, **options: Any) -> Any:
    return trained(attach(model, planned(model), **options))


def test_a_base_resized_anew_is_refused_and_the_saved_one_is_not(tmp_path: Path) -> None:
    base = resized(1)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base)
    save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"depend on model\.embed_tokens\.weight, which has other values .*train_fully"):
        load(resized(2), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight, which is float32 \(22, 32\) instead of float32 \(29, 32\) in this base"
    ):
        load(tiny_llama(), tmp_path / "adapter")
    again = load(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_what_trains_whole_is_kept_and_may_be_another_in_the_base(tmp_path: Path) -> None:
    model = adapted(resized(1), train_fully=["model.embed_tokens", "lm_head"])
    again = load(resized(2), save(model, tmp_path))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_any_other_tensor_counts(name: str, tmp_path: Path) -> None:
    folder = save(adapted(tiny_llama()), tmp_path)
    other = tiny_llama()
    other.get_parameter(name).data.view(-1)[-1] += 1e-3
    with pytest.raises(ValueError, match=f"depend on {name}, which has other values"):
        load(other, folder)


def test_another_head_and_layers_that_are_not_adapted_count(tmp_path: Path) -> None:
    folder = save(adapted(tiny_llama()), tmp_path / "head")
    config = llama_config()
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"depend on lm_head\.weight, which is absent instead of float32 \(22, 32\) in this base"):
        load(LlamaForSequenceClassification(config), folder)
    model = tiny_llama()
    few = plan(model, collect(model, [{"input_ids": torch.randint(2, 20, (8, 16))}], select_linears(model, ["q_proj"])), mode="kpm", rank=4)
    folder = save(attach(model, few), tmp_path / "few")
    other = tiny_llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"depend on model\.layers\.0\.mlp\.up_proj\.weight"):
        load(other, folder)


class Normed(nn.Module):
    """A layer behind statistics that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.norm(x))


def test_what_changed_in_training_and_is_in_no_file_is_not_left_out_silently(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(40, 6)
    peft_model = attach(model, plan(model, collect(model, [{"x": x}], ["proj"]), mode="kpm", rank=2))
    save(peft_model, tmp_path / "start")
    peft_model.train()(x)
    with pytest.raises(ValueError, match=r"norm\.running_mean has other values .* is no part of its file: merge"):
        save(peft_model, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"norm\.running_mean has other values"):
        export(peft_model, tmp_path / "moved")
    assert not (tmp_path / "moved").exists()


def test_a_base_resized_after_attaching_is_not_saved_without_its_rows(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.resize_token_embeddings(29, mean_resizing=False)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is float32 \(29, 32\) instead of float32 \(22, 32\) since"):
        save(model, tmp_path)


def test_the_same_values_in_other_forms_are_the_same_base(tmp_path: Path) -> None:
    base = tiny_llama().bfloat16()
    base.lm_head.weight = base.model.embed_tokens.weight
    model = adapted(base)
    folder = save(model, tmp_path)
    again = tiny_llama().bfloat16()
    again.lm_head.weight = nn.Parameter(again.model.embed_tokens.weight.detach().clone())  # equal, but no longer tied
    again.model.norm.float()  # as PEFT's preparation for 4 and 8 bits does
    load(again, folder)
    second = attach(adapted(tiny_llama().bfloat16(), train_fully=["model.norm"]), planned(tiny_llama().bfloat16()), adapter_name="two")
    assert attachment_of(second, "two").rest == attachment_of(attach(tiny_llama().bfloat16(), planned(tiny_llama().bfloat16()))).rest
    model.float()  # served in another precision, the adapter is still its own
    save(model, folder)


def test_files_without_a_record_still_load(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    folder = save(model, tmp_path)
    save_attachment(replace(attachment_of(model), rest=None), folder / ATTACHMENT, saved_with=folder)
    assert read_attachment(folder / ATTACHMENT)[0].rest is None
    other = tiny_llama()
    other.model.norm.weight.data += 1
    assert attachment_of(load(other, folder)).rest is not None
    for odd in ([1], {"lm_head.weight": 3}):
        with pytest.raises((TypeError, ValueError)):
            replace(attachment_of(model), rest=odd)


def test_a_tensor_is_named_as_in_the_base_whatever_stands_around_it() -> None:
    model = tiny_llama()
    names = select_linears(model)
    others = other_tensors(model, dict.fromkeys(names))
    assert others.keys() == model.state_dict().keys() - {f"{name}.weight" for name in names}
    assert other_tensors(adapted(model, train_fully=["model.norm"]).get_base_model(), dict.fromkeys(names)) == others


def test_checksum_is_fletchers() -> None:
    values = torch.randn(70_000, dtype=torch.bfloat16)
    bits = values.float().view(torch.int32).tolist()
    expected = "".join(f"{sum(part) % 2**64:016x}" for part in (bits, [place * bit for place, bit in enumerate(bits, 1)]))
    assert checksum(values) == checksum(values.float()) == checksum(values.reshape(700, 100)) == expected
    moved = values.clone()
    moved[[0, 1]] = values[[1, 0]]
    assert checksum(moved) != expected
    assert checksum(values.double()) != checksum(torch.nextafter(values.double(), torch.tensor(9.0, dtype=torch.float64)))


def test_a_base_that_carries_layers_of_an_adapter_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    adapter_plan = planned(base)
    folder = save(attach(base, adapter_plan), tmp_path)
    for again in (lambda: attach(base, adapter_plan), lambda: load(base, folder)):
        with pytest.raises(ValueError, match=r"carries an adapter already \(at model\.layers\.0\.self_attn\.q_proj\)"):
            again()


def test_weights_that_are_not_there_are_refused() -> None:
    base = tiny_llama()
    adapter_plan = planned(base)
    base.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds no values here \(device meta\)"):
        attach(base, adapter_plan)
    base.model.layers[0].to("meta")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds no values here \(device meta\)"):
        weight_matrix(base, "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_compiled_and_parallel_models_are_unwrapped(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    expected = logits(tiny_llama())
    wrapped = wrap(tiny_llama())
    adapter_plan = planned(wrapped)
    model = attach(wrapped, adapter_plan)
    assert torch.equal(logits(model), expected)
    assert adapter_plan.layers.keys() == planned(tiny_llama()).layers.keys()
    save(wrap(model), tmp_path)
    assert torch.equal(logits(load(wrap(tiny_llama()), tmp_path)), expected)


def test_another_projector_counts(tmp_path: Path) -> None:
    model = tiny_llava()
    names = select_linears(model, "model.language_model.*q_proj")
    adapter_plan = plan(model, collect(model, [{"input_ids": torch.randint(5, 20, (8, 16))}], names), mode="kpm", rank=4)
    folder = save(attach(model, adapter_plan), tmp_path)
    other = tiny_llava()
    other.model.multi_modal_projector.linear_1.bias.data += 1
    with pytest.raises(ValueError, match=r"depend on model\.multi_modal_projector\.linear_1\.bias"):
        load(other, folder)


def test_what_merges_moved_is_added_up() -> None:
    """Of the layers asked for; a layer that no merge touched is where it was."""
    model, before = tiny_llama(), tiny_llama()
    names = select_linears(model)
    moves, digests = [], [base_digest(model, names)]
    for targets in ("model.layers.0.*", "model.*proj"):
        chosen = select_linears(model, targets)
        adapter_plan = plan(model, collect(model, [{"input_ids": torch.randint(5, 20, (8, 16))}], chosen), mode="kpm", rank=4)
        changed = trained(attach(model, adapter_plan, protect="strict"))
        moves.append(weight_change(changed))
        model = merge(changed)
        digests.append(base_digest(model, names))
    assert [list(step) for step in ancestry_of(model)] == [list(move) for move in moves]
    weights = weight_digests(model, names)
    first, second, last = (moved_since(model, digest, weights) for digest in digests)
    assert first is not None
    assert second is not None
    assert last == {}
    for name in names:
        W, now = weight_matrix(before, name), weight_matrix(model, name)
        assert first[name].change == pytest.approx(moves[0].get(name, 0) + moves[1][name])
        assert second[name].change == pytest.approx(moves[1][name])
        assert float((now - W).norm() / W.norm()) <= 1.05 * first[name].change
    assert moved_since(before, digests[1], weight_digests(before, names)) is None
    assert moved_since(model, digests[0], weight_digests(model, names[:3])) is None


def test_digests_are_those_of_version_0_1_and_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in users' files: SHA-256 of name, type, shape and bytes, whatever the thread and however much is hashed at a time."""
    model, name = tiny_llama().to(torch.bfloat16), "model.layers.0.mlp.down_proj"
    weight = model.get_submodule(name).weight
    described = f"{name} torch.bfloat16 {tuple(weight.shape)}".encode()
    expected = hashlib.sha256(described + weight.detach().view(torch.int16).numpy().tobytes()).hexdigest()
    monkeypatch.setattr(files, "HASHED", 100)
    assert weight_digests(model, [name]) == {name: expected}
    version = weight._version
    weight.data[0, 0] += 1
    assert weight._version == version, "so nothing tells that it has changed"
    assert weight_digests(model, [name]) != {name: expected}
