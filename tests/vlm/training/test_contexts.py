"""What a recipe's context may be, and what it stands for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llava
from recipes import write_recipe

from corda_vlm.context import sources_of
from corda_vlm.data.sources import DataConfig
from corda_vlm.training.contexts import Joined, items_of, read_context
from corda_vlm.training.recipe import read_recipe


@pytest.mark.parametrize(
    "context", ["self", "general.safetensors", ["general.safetensors", "more.json"], {"source": "kept.json", "limit": 3}]
)
def test_a_context_is_read_in_each_of_its_forms(context: Any, processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, context=None)
    path.write_text(path.read_text().replace("context: null", f"context: {context}"))
    expected = DataConfig(**context) if isinstance(context, dict) else context
    assert read_recipe(path).context == expected
    assert read_recipe(path, [f"context={context}"]).context == expected


@pytest.mark.parametrize(
    ("context", "told"),
    [
        ("7", "context is 7; expected option: value lines or a text or a list or null"),
        ("[]", r"context is \[\]; expected options of samples, self, or at least one file"),
        ("''", "context is ''; expected options of samples, self, or at least one file"),
        ("[general.safetensors, 3]", "context is .*; expected"),
        ("{sauce: kept.json}", "unknown option 'sauce'"),
    ],
)
def test_other_forms_are_refused(context: str, told: str, processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    path.write_text(path.read_text().replace(f"context:\n  source: {tmp_path / 'kept.json'}", f"context: {context}"))
    with pytest.raises(ValueError, match=told):
        read_recipe(path)


def test_files_and_samples_are_told_apart(processor: Any, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, processor))
    model, kept, data = tiny_llava(), str(tmp_path / "kept.json"), str(tmp_path / "data.json")
    trained = items_of(recipe.data, recipe, model, processor)

    def read(context: Any) -> Any:
        return read_context(replace(recipe, context=context), model, processor, trained, tmp_path)

    assert read("~/general.safetensors").files == (Path.home() / "general.safetensors",)
    assert read("general.safetensors").samples is None
    alone = read(["general.safetensors", kept])
    assert alone.files == (Path("general.safetensors"),)
    assert alone.samples[6]["text"] == "the shape in this is a circle"
    joined = read([kept, data]).samples
    assert isinstance(joined, Joined)
    assert len(joined) == 15 + 24
    assert joined[14] == items_of(DataConfig(kept), recipe, model, processor)[14]
    assert joined[-1] == joined[15:][-1] == trained[23]
    assert joined.fingerprint() != read([data, kept]).samples.fingerprint()
    with pytest.raises(IndexError):
        joined[39]


def test_samples_and_files_are_told_apart_in_a_list(samples: list[Any]) -> None:
    mixed = sources_of([Path("general.safetensors"), *samples, "more.safetensors"])
    assert mixed.files == (Path("general.safetensors"), Path("more.safetensors"))
    assert mixed.samples == samples
    assert sources_of("general.safetensors").samples is None
    assert sources_of(samples).samples is samples
    with pytest.raises(ValueError, match=r"images_texts names 'general\.json'; expected samples, or keep files"):
        sources_of(["general.json"])
