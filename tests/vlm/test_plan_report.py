"""The page about a plan."""

import base64
import re
from pathlib import Path
from typing import Any

from conftest import tiny_llama, tiny_llava

import corda_vlm
from corda_core import collect, plan, select_linears


def test_page_of_a_corda_plus_plus_plan(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    many = [samples[place % len(samples)] for place in range(40)]
    config = corda_vlm.CordaConfig(rank=4, budget="rank", parts=("vision", "projector", "language"))
    made = corda_vlm.plan_contexts(tiny_llava(), [many[:20], many[20:]], config, processor)
    corda_vlm.write_plan_report(made, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert f"{made.num_parameters:,} parameters in {len(made.layers)} layers" in text
    assert "candidate chosen" in text
    assert "compactness" in text
    pictures = [base64.b64decode(one).decode() for one in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)]
    parts = {"model.vision_tower.encoder.layers", "model.multi_modal_projector", "model.language_model.layers"}
    assert all(part in text for part in parts)
    assert len(pictures) == 3 * len(parts) + 9
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_page_of_a_plain_plan_has_only_its_ranks(tmp_path: Path) -> None:
    import torch

    model = tiny_llama()
    made = plan(model, collect(model, [{"input_ids": torch.randint(5, 20, (8, 16))}], select_linears(model)), mode="kpm", rank=3)
    corda_vlm.write_plan_report(made, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert text.count("data:image") == 1
    assert "Spectra" not in text
