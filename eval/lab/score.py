"""Score the lab model on the whole test split of easy-VQA.

python -m corda_eval.lab.score
"""

import json
from functools import partial

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from corda_eval.lab.base import load_lab
from corda_eval.lab.shapes import COLOURS, SHAPES
from corda_eval.vqa.benchmark import answer_benchmark
from corda_eval.vqa.easy_vqa import TASK, load_easy_vqa
from corda_vlm.context import progress_bar

KINDS = {"yes/no": ("yes", "no"), "shape": SHAPES, "colour": COLOURS}


def score_easy_vqa(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> dict[str, float]:
    """Return the accuracy in percent over all 9,673 questions ("all") and by kind of answer."""
    examples = load_easy_vqa("test")
    bar = partial(progress_bar, title="easy-VQA test")
    right = answer_benchmark(TASK, examples, model, processor, batch_size=64, progress=bar).scores
    by_kind = {
        kind: [hit for hit, example in zip(right, examples, strict=True) if example.answer in names] for kind, names in KINDS.items()
    }
    return {name: round(100 * sum(hits) / len(hits), 2) for name, hits in ({"all": right} | by_kind).items()}


if __name__ == "__main__":
    print(json.dumps(score_easy_vqa(*load_lab())))
