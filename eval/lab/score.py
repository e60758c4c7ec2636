"""Score the lab model on the whole test split of easy-VQA.

python -m corda_eval.lab.score
"""

import json

from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from corda_eval.lab.base import load_lab
from corda_eval.lab.shapes import COLOURS, SHAPES
from corda_eval.metrics import exact_match
from corda_eval.vqa.answer import answer_questions
from corda_eval.vqa.easy_vqa import load_easy_vqa

KINDS = {"yes/no": ("yes", "no"), "shape": SHAPES, "colour": COLOURS}


def score_easy_vqa(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> dict[str, float]:
    """Return the accuracy in percent over all 9,673 questions ("all") and by kind of answer."""
    examples = load_easy_vqa("test")
    answers = answer_questions(model, processor, examples, batch_size=64, progress=lambda steps: tqdm(steps, desc="easy-VQA test"))
    right = [exact_match(answer, example.answer) for answer, example in zip(answers, examples, strict=True)]
    by_kind = {kind: [hit for hit, one in zip(right, examples, strict=True) if one.answer in names] for kind, names in KINDS.items()}
    return {name: round(100 * sum(hits) / len(hits), 2) for name, hits in ({"all": right} | by_kind).items()}


if __name__ == "__main__":
    print(json.dumps(score_easy_vqa(*load_lab())))
