"""Perplexity and its windows, against a token-by-token float64 reference."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corda_eval.text.perplexity import held_out_text, mean_loss, perplexity, text_windows, window_losses

VOCABULARY = 32
WORDS = [f"w{number}" for number in range(VOCABULARY)]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        # Far from the usual 0.02, so that the predictions are far from uniform.
        initializer_range=0.5,
        attention_dropout=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def windows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (12,), generator=generator) for _ in range(5)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def reference_loss(model: LlamaForCausalLM, windows: list[Tensor]) -> float:
    """Mean loss with one forward pass for each predicted token, in float64."""
    model = model.double().eval()
    losses = []
    for window in windows:
        for place in range(1, len(window)):
            with torch.no_grad():
                last = model(window[None, :place]).logits[0, -1]
            probabilities = last.exp() / last.exp().sum()
            losses.append(-math.log(probabilities[window[place]]))
    return sum(losses) / len(losses)


def test_perplexity_equals_the_reference_token_by_token(model: LlamaForCausalLM, windows: list[Tensor]) -> None:
    loss, score = mean_loss(model, windows), perplexity(model, windows)
    expected = reference_loss(model, windows)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert score == pytest.approx(math.exp(expected), rel=1e-5)


def test_uniform_guessing_gives_the_size_of_the_vocabulary(model: LlamaForCausalLM, windows: list[Tensor]) -> None:
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, windows) == pytest.approx(VOCABULARY, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_does_not_matter(model: LlamaForCausalLM, windows: list[Tensor], batch_size: int) -> None:
    assert mean_loss(model, windows, batch_size=batch_size) == pytest.approx(mean_loss(model, windows), rel=1e-6)


def test_progress_wraps_the_batches(model: LlamaForCausalLM, windows: list[Tensor]) -> None:
    sizes: list[int] = []

    def watch(batches: list[Tensor]) -> list[Tensor]:
        sizes.extend(len(batch) for batch in batches)
        return batches

    window_losses(model, windows, batch_size=2, progress=watch)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("lengths", [[], [1, 1], [4, 5]])
def test_unusable_windows_are_refused(model: LlamaForCausalLM, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="windows of one length"):
        mean_loss(model, [torch.zeros(length, dtype=torch.long) for length in lengths])


def test_windows_are_disjoint_pieces_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = list(range(VOCABULARY))
    windows = text_windows(" ".join(WORDS), tokenizer, 5, 6)
    assert torch.cat(windows).tolist() == ids[:30]
    spread = text_windows(" ".join(WORDS), tokenizer, 5, 3)
    assert [window.tolist() for window in spread] == [ids[0:5], ids[10:15], ids[20:25]]


@pytest.mark.parametrize(("length", "count"), [(5, 7), (33, 1), (0, 1), (5, 0)])
def test_too_many_windows_are_refused(tokenizer: PreTrainedTokenizerFast, length: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count}"):
        text_windows(" ".join(WORDS), tokenizer, length, count)


def test_context_and_held_out_text_share_nothing() -> None:
    context, held_out = held_out_text()
    assert held_out_text() == (context, held_out)
    assert len(context) > 200_000
    assert len(held_out) > 50_000
    assert not word_runs(context, 30) & word_runs(held_out, 30)


def word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    """All runs of ``length`` words; shorter ones recur without copying (a standard phrase, the head of a traceback)."""
    words = text.split()
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
