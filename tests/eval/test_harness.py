"""lm_eval on models in memory: tasks of one's own without a network, figures as the harness gives them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama

pytest.importorskip("lm_eval")
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
    choice, words, said = evaluate_text(tiny_llama(), tokenizer, tasks, batch_size=2)
    assert (choice.task, choice.headline, choice.num_examples) == ("choice", "acc,none", 6)
    assert choice.metrics["acc,none"] == sum(choice.scores) / 6 == 0.5  # it says the same to all, and half of them want it
    assert [record["id"] for record in choice.records] == [f"choice/{number}" for number in range(6)]
    assert words.headline == "word_perplexity,none"
    assert len(set(words.scores)) == 1  # nats a word of the same text
    assert said.scores == [0.0] * 6
    json.dumps([[*one.records, *one.scores, dict(one.metrics)] for one in (choice, words, said)])
    assert evaluate_text(tiny_llama(), tokenizer, tasks[:1], limit=2)[0].scores == choice.scores[:2]


def test_the_figures_are_those_of_the_harness_itself(tasks: list[str], tokenizer: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "choice,words", "--batch_size", "1"]
    arguments += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", "lm_eval", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]
    for mine in evaluate_text(tiny_llama(), tokenizer, tasks[:2]):
        for metric, value in mine.metrics.items():
            assert value == pytest.approx(theirs[mine.task][metric], rel=1e-6), metric


def test_unknown_tasks_and_absent_data_are_sentences(tasks: list[str], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there|does not exist"):
        evaluate_text(tiny_llama(), tokenizer, [str(tmp_path / "none.yaml")])
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="data of choice could not be read"):
        evaluate_text(tiny_llama(), tokenizer, tasks[:1])
