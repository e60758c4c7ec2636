"""A tiny LLaVA on the disk with data in LLaVA's format, and a recipe for it."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import tiny_llava
from PIL import Image
from safetensors.torch import save_file

COLORS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (20, 30, 220)}


def write_open_clip(folder: Path) -> Any:
    """Write a tiny random CLIP of open_clip into a new folder, as ``local-dir:`` reads it, and return the model."""
    import open_clip

    shape = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {"size": 16}}))
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**shape)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model


def write_recipe(folder: Path, processor: Any, **changes: Any) -> Path:
    """Write model, data and recipe into a folder, and return the recipe's path; ``changes`` are sections that are put over it."""
    torch.manual_seed(0)
    tiny_llava().save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    rows = []
    for number in range(24):
        color = list(COLORS)[number % 3]
        shade = tuple(min(255, value + number) for value in COLORS[color])
        Image.new("RGB", (16, 16), shade).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat color is this ?"},
            {"from": "gpt", "value": color if number % 2 else f"a {color} circle"},
        ]
        rows.append({"id": number, "image": f"{number}.png", "conversations": turns})
    kept = [{"text": "the shape in this is a circle"}, {"text": "what is one two ?"}, {"text": "assistant is in the circle"}] * 3
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "kept.json").write_text(json.dumps(rows[:6] + kept))
    recipe = {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "data": {"source": str(folder / "data.json")},
        "context": {"source": str(folder / "kept.json")},
        "output": str(folder / "output"),
        "corda": {"protect": "start", "rank": 4, "parts": ["vision", "language"], "train_fully": ["projector"], "batch_size": 4},
        "training": {"steps": 8, "batch_size": 4, "learning_rate": 5e-3, "save_every": 2, "log_to": "none"},
    }
    for section, values in changes.items():
        recipe[section] = {**recipe[section], **values} if isinstance(recipe.get(section), dict) and isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
