"""KaSA's GLUE recipe on a tiny random BERT and a tiny task."""

import json
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from corda_core.lora import lora_layers
from corda_eval.replications.kasa_glue import GlueRecipe, KasaTrainer, adapter, compare, comparison, main, read_rows
from corda_eval.study.methods.kasa import kasa_penalty

TINY = GlueRecipe(rank=2, alpha=4, rate=1e-2, batch_size=4, epochs=2, max_length=8)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a random BERT of one block."""
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    folder = tmp_path / "bert"
    BertForSequenceClassification(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder in SST-2's layout: whether "red" is in the sentence; one sentence begins with a quotation mark."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [("a red circle", 1), ("a blue circle", 0), ("the red shape in this", 1), ('" a green shape', 0)] * 3
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return folder


def test_both_methods_run_the_same_steps(bert: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(bert, task, tmp_path / "out.json", rank=2, alpha=4, rate=1e-2, batch_size=4, epochs=2, max_length=8)
    result = json.loads((tmp_path / "out.json").read_text())
    lora, kasa = result["results"]
    assert result["recipe"]["alpha"] == 4
    assert (lora["method"], kasa["method"]) == ("lora", "kasa")
    assert lora["steps"] == kasa["steps"] == 6
    assert len(lora["accuracies"]) == len(kasa["accuracies"]) == 2
    head = 2 * 16 + 2
    assert lora["trainable_parameters"] == 2 * 2 * (16 + 16) + head  # query and value
    assert kasa["trainable_parameters"] == lora["trainable_parameters"] + 2 * 2
    assert {path.name for path in tmp_path.iterdir()} == {"bert", "data", "out.json"}


def test_table_shows_last_and_best(bert: Path, task: Path) -> None:
    shown = comparison(compare(bert, task, TINY))
    assert shown.count("| 6 |") == 2
    assert "| dev accuracy, last | best |" in shown


def test_regulariser_is_added_in_training_only(bert: Path) -> None:
    model = adapter("kasa", AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2), TINY)
    trainer = KasaTrainer(model=model.eval())
    inputs = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([1])}
    plain = trainer.compute_loss(model, dict(inputs))
    torch.testing.assert_close(plain, model(**inputs).loss)
    for module in model.modules():  # as in training, but for the dropout
        module.training = not isinstance(module, torch.nn.Dropout)
    torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)) - plain, kasa_penalty(model, outer=True)())
    assert len(lora_layers(model)) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.tsv", 'sentence\tlabel\n"quoted\tpos\n'),
        ("train.csv", 'label,sentence\npos,"""quoted"\n'),
        ("train.jsonl", '{"sentence": "\\"quoted", "label": "pos", "idx": 3}\n'),
    ],
)
def test_layouts(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_rows(tmp_path, "train") == [{"sentence": '"quoted', "label": "pos"}]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no train.tsv, train.csv or train.jsonl"),
        ({"train.tsv": "sentence\tlabel\na\t1\n"}, r"holds no dev.tsv"),
        ({"train.tsv": "text\tlabel\na\t1\n"}, r"train.tsv: row 1 has no 'sentence', only text, label"),
        ({"train.tsv": "sentence\tlabel\na\t1\nb\n"}, r"train.tsv: row 2 has no 'label', only sentence"),
        ({"train.tsv": "sentence\tlabel\n"}, r"train.tsv holds no rows"),
        ({"train.tsv": "sentence\tlabel\na\t1\n", "dev.tsv": "sentence\tlabel\na\t2\n"}, r"dev set has the label '2'"),
        ({"train.tsv": "sentence\tlabel\na\t1\n", "dev.tsv": "sentence\tlabel\na\t1\n"}, r"nowhere holds no config.json"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        main(tmp_path / "nowhere", tmp_path)
