"""Ask a vision-language model questions and read its greedy answers."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from corda_eval.vqa.example import VqaExample
from corda_vlm.data import Collator, tokenizer_of


@torch.inference_mode()
def answer_questions(
    model: Any, processor: Any, examples: Sequence[VqaExample], *, batch_size: int = 32, max_new_tokens: int = 5, progress: Any = iter
) -> list[str]:
    """Return the model's greedy answers, in order.

    Args:
        model: A LLaVA-type model, adapted or not.
        processor: Its processor.
        examples: The questions; their answers are not shown to the model.
        batch_size: Questions asked at once, padded on the left.
        max_new_tokens: Where an answer that does not end by itself is cut.
        progress: Wraps the iterable of batches, a progress bar for instance.
    """
    collate = Collator(processor)
    tokenizer = tokenizer_of(processor)
    answers: list[str] = []
    was_training = model.training
    model.eval()
    starts: Iterable[int] = progress(range(0, len(examples), batch_size))
    for start in starts:
        batch = collate([{"image": one.image, "question": one.question} for one in examples[start : start + batch_size]])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return [answer.strip() for answer in answers]


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the answers are equal once lower-cased and stripped of white space and a final period."""
    return _plain(prediction) == _plain(answer)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
