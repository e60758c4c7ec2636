"""lm_eval on models in memory: tasks of one's own without a network, figures as the harness gives them."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama

pytest.importorskip("lm_eval")
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from corda_eval.text import harness
from corda_eval.text.harness import evaluate_text

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{rest}
metric_list:
  - metric: {metric}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    rows = [{"q": "what color is this ?", "a": "red", "choices": ["red", "blue"], "gold": number % 2} for number in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    fields = {
        "choice": ("multiple_choice", "{{q}}", "{{gold}}", 'doc_to_choice: "{{choices}}"', "acc"),
        "words": ("loglikelihood_rolling", "", "{{q}}", "", "word_perplexity"),
        "said": ("generate_until", "{{q}}", "{{a}}", "generation_kwargs: {until: [two], max_gen_toks: 4, do_sample: false}", "exact_match"),
    }
    paths = []
    for name, (kind, text, target, rest, metric) in fields.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(TASK.format(name=name, data=data, kind=kind, text=text, target=target, rest=rest, metric=metric))
        paths.append(str(path))
    return paths


def test_tasks_of_ones_own(tasks: list[str], tokenizer: Any) -> None:
    choice, words, generation = evaluate_text(tiny_llama(), tokenizer, tasks, batch_size=2)
    assert (choice.task, choice.headline, choice.num_examples) == ("choice", "acc,none", 6)
    assert choice.metrics["acc,none"] == sum(choice.scores) / 6 == 0.5  # it says the same to all, and half of them want it
    assert [record["id"] for record in choice.records] == [f"choice/{number}" for number in range(6)]
    assert words.headline == "word_perplexity,none"
    assert len(set(words.scores)) == 1  # nats a word of the same text
    assert generation.scores == [0.0] * 6
    json.dumps([[*task.records, *task.scores, dict(task.metrics)] for task in (choice, words, generation)])
    assert evaluate_text(tiny_llama(), tokenizer, tasks[:1], limit=2)[0].scores == choice.scores[:2]


@pytest.mark.slow
def test_the_figures_are_those_of_the_harness_itself(tasks: list[str], tokenizer: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "choice,words", "--batch_size", "1"]
    arguments += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", "lm_eval", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    reference = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]
    for ours in evaluate_text(tiny_llama(), tokenizer, tasks[:2]):
        for metric, value in ours.metrics.items():
            assert value == pytest.approx(reference[ours.task][metric], rel=1e-6), metric


def test_unknown_tasks_and_absent_data_are_sentences(tasks: list[str], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there|does not exist"):
        evaluate_text(tiny_llama(), tokenizer, [str(tmp_path / "none.yaml")])
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="data of choice could not be read"):
        evaluate_text(tiny_llama(), tokenizer, tasks[:1])


FEWSHOT = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/asked.jsonl, train: {folder}/shown.jsonl}}}}
test_split: test
fewshot_split: {split}
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
{rest}
metric_list:
  - metric: {metric}
"""
SHUFFLES = """import random

def shuffled(docs):
    return docs.select(random.sample(range(len(docs)), len(docs)))
"""


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Tasks whose prompts or order are drawn by chance: other examples, those of the test split, or the task's own shuffling."""
    colors = ["red", "blue", "green", "one", "two"]
    for name, start, count in (("asked", 0, 12), ("shown", 100, 40)):
        rows = [{"q": f"what color is {start + number} ?", "a": colors[number % 5], "choices": colors} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "utils.py").write_text(SHUFFLES)
    choose = ("multiple_choice", "acc", 'doc_to_choice: "{{choices}}"')
    for name, split, (kind, metric, rest) in (
        ("shot", "train", choose),
        ("same_split", "test", choose),
        ("three", "train", (*choose[:2], choose[2] + "\nnum_fewshot: 3")),
        ("none", "train", (*choose[:2], choose[2] + "\nnum_fewshot: 0")),
        ("shuffled", "train", (*choose[:2], choose[2] + "\nprocess_docs: !function utils.shuffled")),
        (
            "said",
            "train",
            ("generate_until", "exact_match", "generation_kwargs: {until: [two], max_gen_toks: 3, do_sample: true, temperature: 1.0}"),
        ),
    ):
        text = FEWSHOT.format(name=name, folder=tmp_path, split=split, kind=kind, metric=metric, rest=rest)
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def asked(report: Any, task: str) -> list[Any]:
    """Return each prompt, in the order of the data, with what was answered."""
    samples = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
    return [(sample["arguments"], sample["resps"]) for sample in samples]


@pytest.mark.parametrize("num_fewshot", [None, 2])
@pytest.mark.parametrize("task", ["shot", "same_split", "three", "none", "shuffled", "said"])
def test_prompts_are_drawn_as_the_harness_draws_them(
    drawn: Path, tokenizer: Any, task: str, num_fewshot: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)
    monkeypatch.setattr(evaluator, "get_git_commit_hash", lambda: "")
    model = tiny_llama()
    language = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", softmax_dtype=torch.float32)
    manager = TaskManager(include_path=[drawn], include_defaults=False)
    reference = evaluator.simple_evaluate(
        model=language, tasks=[task], num_fewshot=num_fewshot, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    reports: list[Any] = []
    real = harness.run_tasks
    monkeypatch.setattr(harness, "run_tasks", lambda *args, **options: reports.append(real(*args, **options)) or reports[-1])
    for seed in (3, 4):  # the caller's own generators do not matter, and are left as they were
        random.seed(seed)
        torch.manual_seed(seed)
        (ours,) = evaluate_text(model, tokenizer, [str(drawn / f"{task}.yaml")], num_fewshot=num_fewshot)
        assert random.random() == random.Random(seed).random()
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(seed)))
        assert ours.metrics[ours.headline] == reference["results"][task][ours.headline]
        assert asked(reports[-1], task) == asked(reference, task)
    shown = str(asked(reference, task)[0][0]).count("what color")
    assert shown == {("none", 2): 1, ("three", None): 4}.get((task, num_fewshot), 1 + (num_fewshot or 0)) * (1 if task == "said" else 5)


def test_a_task_that_wants_no_examples_is_said_to_get_none(drawn: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    evaluate_text(tiny_llama(), tokenizer, [str(drawn / "none.yaml")], num_fewshot=2)
    assert "none asks for no examples in its prompts itself; as in lm_eval, num_fewshot=2 does not change that." in caplog.messages
    caplog.clear()
    evaluate_text(tiny_llama(), tokenizer, [str(drawn / "shot.yaml")], num_fewshot=2)
    assert not caplog.messages
