"""Load exported adapters on the untouched base in a new process, with plain PEFT, and compare logits.

    python -m corda_eval.demo.exports BASE_FOLDER ADAPTER_FOLDER ...

Each adapter folder holds ``reference.safetensors``: a left-padded batch of model inputs and the tuned model's float32 ``logits``
at the last position, where an answer begins. (Over all positions float32 itself is not that sharp here: the base's logits differ by
1.5e-4 from its float64 ones.)
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REFERENCE = "reference.safetensors"


def save_reference(model: Any, processor: Any, folder: Path) -> None:
    """Write the logits with which a tuned model, which is float32 afterwards, begins its answers to eight questions."""
    # Imported here: the new process knows nothing of corda_core or corda_vlm, only what a user has.
    import torch
    from safetensors.torch import save_file

    from corda_eval.vqa import digits, easy_vqa
    from corda_vlm.data.samples import Collator

    examples = digits.load_digit_questions(limit=4) + easy_vqa.load_easy_vqa(limit=4)
    batch = Collator(processor)([{"image": example.image, "question": example.question} for example in examples])
    model.float()
    model.get_base_model().set_attn_implementation("sdpa")  # what a freshly loaded base uses
    with torch.inference_mode():
        logits = model(**batch).logits[:, -1]
    save_file({**batch, "logits": logits.contiguous()}, folder / REFERENCE)


def check_exports(base: Path, adapters: Sequence[Path]) -> list[dict[str, Any]]:
    """Return path, rank and greatest logit difference of each exported adapter, measured by a new process.

    Raises:
        RuntimeError: If the new process fails; the text ends with what it said.
    """
    command = [sys.executable, "-m", "corda_eval.demo.exports", str(base), *map(str, adapters)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Loading the exported adapters failed: {done.stderr[-500:]}")
    compared: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return compared


def main(base: str, adapters: Sequence[str]) -> None:
    """Print, as the last line, the comparison of every adapter as JSON."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import LlavaForConditionalGeneration

    compared = []
    for folder in adapters:
        model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        tuned = PeftModel.from_pretrained(model, folder).eval()
        batch = load_file(Path(folder) / REFERENCE)
        expected = batch.pop("logits")
        with torch.inference_mode():
            difference = (tuned(**batch).logits[:, -1] - expected).abs().max().item()
        compared.append({"path": folder, "rank": tuned.peft_config["default"].r, "max_logit_difference": difference})
    print(json.dumps(compared))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
