"""The page about a plan."""

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama, tiny_llava
from typer.testing import CliRunner

import corda_vlm
from corda_core import collect, plan, select_linears
from corda_vlm.cli import app
from corda_vlm.plan_report import write_plan_report

for package in ("matplotlib", "jinja2"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*larger than min")


def test_page_of_a_corda_plus_plus_plan(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    many = [samples[place % len(samples)] for place in range(40)]
    config = corda_vlm.CordaConfig(rank=4, budget="rank", parts=("vision", "projector", "language"))
    planned = corda_vlm.plan_contexts(tiny_llava(), [many[:20], many[20:]], config, processor)
    write_plan_report(planned, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert f"{planned.num_parameters:,} parameters in {len(planned.layers)} layers" in text
    assert "candidate chosen" in text
    assert "compactness" in text
    pictures = [base64.b64decode(picture).decode() for picture in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)]
    parts = {"model.vision_tower.encoder.layers", "model.multi_modal_projector", "model.language_model.layers"}
    assert all(part in text for part in parts)
    assert len(pictures) == 3 * len(parts) + 9
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_page_of_a_plain_plan_has_only_its_ranks(tmp_path: Path) -> None:
    import torch

    model = tiny_llama()
    plain = plan(model, collect(model, [{"input_ids": torch.randint(5, 20, (8, 16))}], select_linears(model)), mode="kpm", rank=3)
    write_plan_report(plain, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert text.count("data:image") == 1
    assert "Spectra" not in text


def test_show_writes_an_adapter_s_plan(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    adapted = corda_vlm.prepare(tiny_llava(), samples, rank=2, processor=processor)
    corda_vlm.save(adapted, tmp_path / "adapter")
    called = ["show", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "plan.html")]
    done = CliRunner().invoke(app, called)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "Adapter plan: KPM" in (tmp_path / "plan.html").read_text()
    done = CliRunner().invoke(app, [*called[:2], str(tmp_path / "nowhere")])
    assert done.exit_code == 1
    assert "does not exist" in done.output
