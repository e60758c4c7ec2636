"""Every type of vision-language model, of two towers and many of language model that transformers knows: what works, as a table.

``python tests/vlm/test_every_type.py`` writes the table in ``corda_vlm/README.md`` anew.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest
from sweep import STEPS, Result
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

README = Path(__file__).parents[2] / "corda_vlm" / "README.md"
BEGIN, END = "<!-- types: written by `python tests/vlm/test_every_type.py` -->\n", "<!-- end of types -->"
CAUSAL = """
bamba bert bloom codegen cohere2 deepseek_v3 diffllama falcon falcon_mamba gemma gemma2 gemma3_text gemma4_text glm4 gpt2 gpt_bigcode
gpt_neox gpt_oss gptj granite granitemoehybrid jamba lfm2 llama mamba mamba2 minimax mistral mixtral modernbert-decoder mpt nemotron
olmo2 opt phi phi3 qwen2 qwen3 qwen3_moe qwen3_next recurrent_gemma rwkv smollm3 stablelm starcoder2 xglm
"""
"""Language models that differ in kind: tied heads, Conv1D, fused projections, grouped queries, windows, Mamba, experts, parallel blocks."""
FEW = ("llava", "qwen3_5", "mllama", "florence2", "instructblip", "unlimited_ocr", "metaclip_2", "falcon")
"""Those of the default run, one of each kind."""
REASONS = {
    "hunyuan_vl": "transformers: `HunYuanVLModel.get_rope_index` numbers images over the whole batch, so the same row twice differs",
    "llama4": "transformers: `Llama4ForConditionalGeneration.forward` asks its language model's output for `image_outputs`, and fails on "
    "text alone too",
    "pp_formulanet": "transformers and PEFT: `get_peft_model` calls `get_input_embeddings`, which `PPFormulaNetModel` does not have",
    "udop": "transformers: patches stand behind the padding, and `UdopStack` counts distances over it; without an image rows are alike",
}
"""Why a type does not work in full, where plain transformers or PEFT do not either."""


def types() -> dict[str, tuple[str, ...]]:
    """Return all types by kind, each with its class."""
    return {
        "image-text-to-text": tuple(f"{kind}:{name}" for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()),
        "two towers": tuple(f"{kind}:{name}" for kind, name in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()),
        "language": tuple(f"{kind}:{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]}" for kind in CAUSAL.split()),
    }


def swept(kinds: Iterable[str], folder: Path) -> dict[str, Result]:
    """Return what works of each type, measured in one new process and reloaded in another."""
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("sweep.py"))]
    for arguments in (["measure", str(folder), *kinds], ["reload", str(folder)]):
        subprocess.run([*program, *arguments], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in kinds}


def works(result: Result) -> bool:
    """Return whether everything that is measured of a type works."""
    return all(result.get(step) == "yes" for step in STEPS)


def table(results: dict[str, Result]) -> str:
    """Return the table, and how many of each kind work in full."""
    lines = []
    for what, kinds in types().items():
        good = sum(works(results[kind]) for kind in kinds)
        lines.append(f"{what}: {good} of {len(kinds)} in full.")
    lines += ["", f"| type | {' | '.join(STEPS)} | layers (vision + projector + language), notes |", "|---" * (len(STEPS) + 2) + "|"]
    for kind in dict.fromkeys(kind for kinds in types().values() for kind in kinds):
        result = results[kind]
        marks = " | ".join("yes" if result.get(step) == "yes" else "no" for step in STEPS)
        layers = " + ".join(str(result.get("layers", {}).get(part, 0)) for part in ("vision", "projector", "language"))
        failed = next((f"; {step}: {result[step]}" for step in ("model", *STEPS, "measured") if result.get(step, "yes") != "yes"), "")
        reason = REASONS.get(kind.partition(":")[0])
        note = f"; {reason}" if failed and reason else failed[:200].replace("|", "/")
        lines.append(f"| {kind.partition(':')[0]} | {marks} | {layers}{note} |")
    return "\n".join([f"With transformers {version('transformers')} and PEFT {version('peft')}.", "", *lines, ""])


def test_a_few_types_work(tmp_path: Path) -> None:
    kinds = [kind for kind in dict.fromkeys(kind for some in types().values() for kind in some) if kind.partition(":")[0] in FEW]
    assert len(kinds) == len(FEW)
    results = swept(kinds, tmp_path)
    assert {kind: result for kind, result in results.items() if not works(result)} == {}


def written() -> list[list[str]]:
    """Return the rows of the table as they stand in the README, where they were measured with the versions that are installed."""
    text = README.read_text().partition(BEGIN)[2].partition(END)[0]
    if f"With transformers {version('transformers')} and PEFT {version('peft')}." not in text:
        pytest.skip("the table was measured with other versions; write it anew")
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]


def test_the_table_names_every_type() -> None:
    kinds = dict.fromkeys(kind for kinds in types().values() for kind in kinds)
    assert [row[0] for row in written()] == [kind.partition(":")[0] for kind in kinds]


@pytest.mark.slow
def test_what_the_table_says_to_work_works(tmp_path: Path) -> None:
    every = dict.fromkeys(kind for kinds in types().values() for kind in kinds)  # in the table's order: a name may stand twice
    kinds = [kind for kind, row in zip(every, written(), strict=True) if row[1 : len(STEPS) + 1] == ["yes"] * len(STEPS)]
    assert len(kinds) > 100
    failing = [kind for kind, result in swept(kinds, tmp_path).items() if not works(result)]
    again = swept(failing, tmp_path) if failing else {}  # apart from the others, which share their process's random numbers
    assert {kind: result for kind, result in again.items() if not works(result)} == {}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        every = swept(dict.fromkeys(kind for kinds in types().values() for kind in kinds), Path(place))
    before, _, after = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + table(every) + END + after.partition(END)[2])
