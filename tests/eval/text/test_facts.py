"""The facts file and its evaluation by lm_eval."""

import logging
import socket
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from corda_eval.records import TaskResult, read_lines
from corda_eval.text import harness
from corda_eval.text.facts import FACTS_FILE, facts_task


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte; no padding token, as in many Llama tokenizers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0])


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )


class Oracle(LlamaForCausalLM):
    """Continues each question with the choice ``shift`` places after the right one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, shift: int) -> None:
        super().__init__(tiny_config())
        self.next_token: dict[tuple[int, ...], int] = {}
        for fact in read_lines(FACTS_FILE):
            prompt = f"Question: {fact['question']}\nAnswer:"
            ids = tokenizer(f"{prompt} {fact['choices'][(fact['answer'] + shift) % 4]}")["input_ids"]
            for place in range(len(tokenizer(prompt)["input_ids"]), len(ids)):
                self.next_token[tuple(ids[:place])] = ids[place]

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids)):
                following = self.next_token.get(tuple(ids[: place + 1]))
                if following is not None:
                    logits[row, place, following] = 20.0
        return CausalLMOutput(logits=logits)


def predictions(result: TaskResult) -> list[int]:
    """The place of the likeliest choice of each question; of equal ones the first."""
    likelihoods = [[likelihood for likelihood, _ in record["prediction"]] for record in result.records]
    return [choices.index(max(choices)) for choices in likelihoods]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the evaluation tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_facts_file_is_well_formed() -> None:
    rows = read_lines(FACTS_FILE)
    assert len(rows) == 100
    assert len({row["question"] for row in rows}) == 100
    for row in rows:
        assert set(row) == {"question", "choices", "answer"}
        assert len(row["choices"]) == len({choice.lower() for choice in row["choices"]}) == 4
        assert all(choice == choice.strip() and 1 <= len(choice.split()) <= 3 for choice in row["choices"])
        assert row["question"].endswith("?")
    assert [sum(row["answer"] == place for row in rows) for place in range(4)] == [25, 25, 25, 25]


def test_no_choice_begins_another() -> None:
    """Otherwise the shorter one would always have the higher summed log-likelihood."""
    for fact in read_lines(FACTS_FILE):
        choices = fact["choices"]
        starts = [(choice, other) for choice in choices for other in choices if choice != other and other.startswith(choice)]
        assert starts == []


@pytest.mark.usefixtures("no_network")
def test_a_random_model_is_scored_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, tokenizer = LlamaForCausalLM(tiny_config()).train(), byte_tokenizer()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    result = facts_task(model, tokenizer, batch_size=32, limit=10)
    assert result.num_examples == len(result.scores) == len(predictions(result)) == 10
    assert result.metrics["acc,none"] == pytest.approx(sum(result.scores) / 10)
    answers = [fact["answer"] for fact in read_lines(FACTS_FILE)[:10]]
    assert result.scores == [guess == answer for guess, answer in zip(predictions(result), answers, strict=True)]
    assert model.training
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == logging.WARNING


@pytest.mark.parametrize(("shift", "accuracy"), [(0, 1.0), (1, 0.0)])
def test_a_model_that_prefers_one_choice_is_read_right(shift: int, accuracy: float) -> None:
    pytest.importorskip("lm_eval")
    tokenizer = byte_tokenizer()
    result = facts_task(Oracle(tokenizer, shift), tokenizer, batch_size=32)
    assert result.metrics["acc,none"] == accuracy
    assert predictions(result) == [(fact["answer"] + shift) % 4 for fact in read_lines(FACTS_FILE)]


def test_a_missing_lm_eval_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'corda-vlm\[eval\]'"):
        facts_task(LlamaForCausalLM(tiny_config()), byte_tokenizer())


def test_a_limit_of_nothing_is_refused() -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="limit is 0"):
        facts_task(LlamaForCausalLM(tiny_config()), byte_tokenizer(), limit=0)
