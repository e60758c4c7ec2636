"""Small pictures and rows that tests of data are made of."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy()).convert(mode)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    content = BytesIO()
    image.save(content, form)
    return content.getvalue()


def write_json(path: Path, rows: Any) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def pixels_of(item: dict[str, Any]) -> torch.Tensor:
    assert item["image"].mode == "RGB"
    return pil_to_tensor(item["image"])


def write_llava(tmp_path: Path) -> str:
    """Write rows of LLaVA's instruction file: with an image in a folder, and without."""
    (tmp_path / "coco").mkdir()
    rows = []
    for number in range(4):
        noise(number).save(tmp_path / f"coco/{number}.png")
        rows.append({"id": str(number), "image": f"coco/{number}.png", "conversations": turns("<image>\nwhat color ?", "red")})
    rows.append({"id": 4, "model": "", "conversations": [*turns("one ?", "one"), *turns("two ?", "two")]})
    return write_json(tmp_path / "llava.json", rows)
