"""One folder with everything that this package reads: a base, data, runs, an exported LoRA, an evaluation, a study."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import tiny_llama, tiny_llava
from PIL import Image
from recipes import COLORS, write_recipe

import corda_vlm
from corda_core import collect, plan, select_linears
from corda_core.store import save_covariances, save_plan
from corda_eval.suite.measure import measure
from corda_eval.suite.page import write_comparison
from corda_eval.suite.tasks import read_suite
from corda_vlm.training.deploy import deploy
from corda_vlm.training.recipe import ModelConfig, read_recipe
from corda_vlm.training.run import run_recipe

ROOT = Path(__file__).parents[2]
STEPS = 8
"""No multiple of the six of an epoch, nor of those between checkpoints: these are at 3, 6 and 8, and the last two stay."""
LAST = ["adapter_model.safetensors", "adapter_config.json", "training.json", "README.md"]
"""What is written after the last checkpoint."""
OPTIONS = {"normalize": None}
"""Of the covariances."""


@dataclass(frozen=True)
class Place:
    """The folder, and what is in it. ``other-…`` are files of the same kinds from another run.

    base, data.json, *.png, recipe.yaml            what a user gives
    data-json, data-jsonl, data-parquet, recipe    the same, to be spoilt
    whole, died                                    outputs of ``train``: finished; dead before its last save
    lora, suite, out, asked                        what ``export`` made of it; what ``eval`` asked and found, wholly or in part
    store, study                                   covariances and a plan; study.yaml and its results
    """

    folder: Path

    @property
    def recipe(self) -> Path:
        """The recipe of ``whole``."""
        return self.folder / "recipe.yaml"

    @property
    def base(self) -> str:
        """The base's folder."""
        return str(self.folder / "base")


def make_place(folder: Path, processor: Any) -> Place:
    """Return a filled folder."""
    place = Place(folder)
    options = {"steps": STEPS, "save_every": 3, "evaluate_every": 6}
    write_recipe(folder, processor, training=options, evaluation={"source": str(folder / "data.json"), "limit": 4})
    for seed, prefix in enumerate(("", "other-")):
        _write_data(folder, prefix)
        _write_runs(place, prefix, seed)
        _write_store(folder / f"{prefix}store", seed)
        _write_suite(place, prefix)
        _write_study(folder / f"{prefix}study")
    shutil.copytree(folder / "base", folder / "other-base")
    tiny_llama().save_pretrained(folder / "other-base")
    return place


def _write_data(folder: Path, prefix: str) -> None:
    import datasets

    rows = json.loads((folder / "data.json").read_text())[:: -1 if prefix else 1]
    flat = [{"image": row["image"], "question": "what color is this ?", "answer": row["conversations"][1]["value"]} for row in rows]
    places = [folder / f"{prefix}data-{kind}" for kind in ("json", "jsonl", "parquet")]
    for place in places:
        place.mkdir()
        for number in range(len(rows)):
            Image.open(folder / f"{number}.png").resize((16, 32 if prefix else 16)).save(place / f"{number}.png")
    (places[0] / "data.json").write_text(json.dumps(rows))
    (places[1] / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    datasets.Dataset.from_list(flat).to_parquet(str(places[2] / "data.parquet"))


def _write_runs(place: Place, prefix: str, seed: int) -> None:
    """Write a run, the same run as it is before its last save, and a LoRA that it was exported to."""
    whole, died, lora = (place.folder / f"{prefix}{name}" for name in ("whole", "died", "lora"))
    run_recipe(
        read_recipe(place.recipe, [f"output={whole}", f"seed={seed}", f"corda.seed={seed}", f"training.learning_rate=0.00{5 - seed}"])
    )
    shutil.copytree(whole, died, ignore=lambda folder, names: LAST if folder == str(whole) else [])
    deploy(whole, lora, base=place.base, dtype="float32")
    (place.folder / f"{prefix}recipe").mkdir()
    shutil.copy(whole / "recipe.yaml", place.folder / f"{prefix}recipe")


def _write_suite(place: Place, prefix: str) -> None:
    """Write a suite, what it finds, and the same when only the answers to one task's questions are there."""
    folder, suite, out = place.folder, place.folder / f"{prefix}suite", place.folder / f"{prefix}out"
    for color in COLORS:
        (suite / "photos" / color).mkdir(parents=True)
        Image.new("RGB", (16, 16), color).save(suite / "photos" / color / "0.png")
    (suite / "text.txt").write_text("what color is the shape in this ? red blue green circle a one two " * 100)
    tasks = [
        {"task": "digits", "role": "target", "limit": 5 if prefix else 4},
        {"task": "image_folder", "data": str(suite / "photos")},
        {"task": "perplexity", "data": str(suite / "text.txt"), "limit": 2},
    ]
    (suite / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks, "batch_size": 2}))
    adapters = {name: folder / f"{prefix}{name}" for name in ("whole", "lora")}
    measured = measure(ModelConfig(place.base, dtype="float32"), adapters, read_suite(suite / "suite.yaml"), out)
    assert measured is not None
    write_comparison(measured, out)
    shutil.copytree(out, out.with_name(f"{prefix}asked"), ignore=shutil.ignore_patterns("digits.json"))


def _write_store(folder: Path, seed: int) -> None:
    model = tiny_llama()
    torch.manual_seed(seed)
    batches = [{"input_ids": torch.randint(5, 20, (8, 16))}]
    covariances = collect(model, batches, select_linears(model))
    save_covariances(covariances, folder / "covariances.safetensors", model=model, data="", options=OPTIONS)
    save_plan(plan(model, covariances, rank=4, mode="kpm", whiten=True), folder / "plan.safetensors")


def _write_study(folder: Path) -> None:
    """Take the smallest of the published settings, and its runs."""
    shutil.copytree(ROOT / "eval" / "results" / "compare" / "smollm2_two", folder / "results" / "smollm2_two")
    study = yaml.safe_load((ROOT / "configs" / "compare_lab.yaml").read_text())
    settings = {"smollm2_two": study["settings"]["smollm2_two"]}
    arms = {name: study["arms"][name] for name in settings["smollm2_two"]["arms"]}
    (folder / "study.yaml").write_text(yaml.safe_dump(study | {"settings": settings, "arms": arms, "results": str(folder / "results")}))


def tuned_model(adapter: Path) -> Any:
    """Return the base with an adapter on it."""
    return corda_vlm.load(tiny_llava(), adapter)


def content(file: Path) -> str:
    """Return a digest of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
