"""Perplexity on text that no calibration or training has seen.

Text: the reference manual of Python, which comes with every Python (``pydoc_data.topics``), so nothing is downloaded.
Its wording changes between Python versions: compare figures of one version only.
Score: perplexity exp(L), L the mean negative log-likelihood (nats a token) over all predicted tokens:
    L = -(1/n) Σ_w Σ_t log p(w_t | w_1 .. w_{t-1}),  t = 2 .. length in each window w.
Note: each window stands alone and its first token is not predicted; there is no stride and no beginning-of-text token.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from corda_core.linears import evaluating

HELD_OUT_EVERY = 4
"""One topic in four is held out: about 30 % of the text."""


def held_out_text() -> tuple[str, str]:
    """Return the context (for calibration) and the held-out text (for perplexity), which share no topic and no paragraph.

    The topics are taken in alphabetical order; the first of every ``HELD_OUT_EVERY`` is held out.
    Long topics of the manual repeat short ones ("compound" holds "if", "for", "try"):
    a paragraph counts for the first topic that has it, else the context would hold some of the held-out text.
    """
    context: list[str] = []
    held_out: list[str] = []
    seen: set[str] = set()
    for number, topic in enumerate(sorted(topics)):
        part = held_out if number % HELD_OUT_EVERY == 0 else context
        part += _new_paragraphs(topics[topic], seen)
    return "\n\n".join(context), "\n\n".join(held_out)


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> list[Tensor]:
    """Return ``count`` windows of ``length`` token ids, shape (length,), that do not overlap.

    The text is cut from its beginning; the windows returned are spread evenly over it, in order.

    Raises:
        ValueError: If the text is too short, or ``length`` or ``count`` is less than 1.
    """
    if length < 1 or count < 1:
        raise ValueError(f"Asked for {count} windows of {length} tokens; both must be at least 1.")
    # verbose=False: the whole text is longer than the model's input, which is no mistake here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // length
    if available < count:
        raise ValueError(f"The text gives {available} windows of {length} tokens, not {count}; ask for fewer or shorter windows.")
    starts = [number * available // count * length for number in range(count)]
    return [torch.tensor(ids[start : start + length]) for start in starts]


def perplexity(model: nn.Module, windows: Sequence[Tensor], *, batch_size: int = 4) -> float:
    """Return exp of ``mean_loss``: 1 for a model that is always right, the size of the vocabulary for uniform guessing."""
    return math.exp(mean_loss(model, windows, batch_size=batch_size))


def mean_loss(model: nn.Module, windows: Sequence[Tensor], *, batch_size: int = 4) -> float:
    """Return the mean negative log-likelihood of the predicted tokens, in nats a token."""
    losses = window_losses(model, windows, batch_size=batch_size)
    return sum(losses) / len(losses)


def window_losses(
    model: nn.Module, windows: Sequence[Tensor], *, batch_size: int = 4, progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter
) -> list[float]:
    """Return each window's mean negative log-likelihood over its predicted tokens, in nats a token.

    The log-softmax is taken in float32 whatever the model's type, the mean in float64.

    Args:
        model: A model whose forward pass takes ``input_ids`` and ``attention_mask`` and returns ``logits``.
        windows: Token ids, all windows of one length of at least 2, so that a mean over windows is one over tokens.
        batch_size: Windows in one forward pass; takes 4 bytes x batch x length x vocabulary for the log-softmax.
        progress: Wraps the iterable of batches, a progress bar for instance.

    Raises:
        ValueError: If there is no window, or the windows differ in length or are too short to predict a token.
    """
    lengths = {len(window) for window in windows}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(f"The windows have the lengths {sorted(lengths)}; expected windows of one length of at least 2 tokens.")
    device = next(model.parameters()).device
    means: list[float] = []
    with evaluating(model):
        for ids in progress(torch.stack(tuple(windows)).split(batch_size)):
            ids = ids.to(device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
            losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            means += losses.double().view(len(ids), -1).mean(1).tolist()
    return means


def _new_paragraphs(text: str, seen: set[str]) -> list[str]:
    """Return the paragraphs not seen before, whatever their line breaks and indentation, and add them to ``seen``."""
    fresh: list[str] = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            fresh.append(paragraph)
    return fresh
