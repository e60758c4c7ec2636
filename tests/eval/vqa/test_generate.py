"""Answers of a tiny LLaVA: batches, files of predictions, resumed runs, and whole evaluations."""

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import tiny_llava
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from corda_eval.records import library_versions
from corda_eval.suite.tasks import read_suite
from corda_eval.vqa import generate, predictions
from corda_eval.vqa.answer import Asking, answer_batch
from corda_eval.vqa.benchmark import answer_benchmark
from corda_eval.vqa.example import LETTER_ANSWER, SHORT_ANSWER, VqaExample, VqaTask
from corda_eval.vqa.generate import BatchCheck, check_batch_invariance, generate_answers
from corda_eval.vqa.predictions import model_digest

SHORT = Asking(max_new_tokens=16)  # the default takes seconds here
QUESTIONS = ["what color is the shape ?", "is a circle red ?", "what is this ?", "is the shape in this blue ?", "two ?"]


@pytest.fixture
def examples() -> list[VqaExample]:
    images: list[Image.Image | None] = [Image.new("RGB", (16, 24), (40 * i, 255 - 40 * i, 90)) for i in range(4)]
    kinds = ["open", "binary", "open", "binary", "text"]
    return [
        VqaExample(image, question, "red", question_id=f"q{i}", kind=kind)
        for i, (image, question, kind) in enumerate(zip([*images, None], QUESTIONS, kinds, strict=True))
    ]


class Killed(Exception):
    pass


def killed_after(count: int) -> Any:
    def progress(batches: Iterable[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == count:
                raise Killed
            yield batch

    return progress


TASK = VqaTask("tiny", list, "accuracy", lambda answer, example: float("red" in answer), max_new_tokens=3)


def test_answers_alone_and_in_batches(processor: Any, examples: list[VqaExample]) -> None:
    model = tiny_llava().double()
    result = check_batch_invariance(examples, model, processor, Asking(4), batch_size=3)
    assert result == BatchCheck(5, [])
    with pytest.raises(ValueError, match="batch_size is 1; expected at least 2"):
        check_batch_invariance(examples, model, processor, Asking(), batch_size=1)


def test_batch_check_names_what_differs(processor: Any, examples: list[VqaExample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "answer_batch", lambda model, processor, batch, *_, **__: [f"{len(batch) == 3}"] * len(batch))
    result = check_batch_invariance(examples, tiny_llava(), processor, Asking(), batch_size=3)
    assert result.differing == [(f"q{i}", "False", "True") for i in range(3)]
    assert result.num_examples == 5


def test_a_benchmark_is_answered(tmp_path: Path, processor: Any, examples: list[VqaExample]) -> None:
    path, model = tmp_path / "runs" / "predictions.jsonl", tiny_llava().train()
    result = answer_benchmark(TASK, examples, model, processor, predictions=path)
    assert model.training
    hits = [float("red" in str(record["prediction"])) for record in result.records]
    assert (result.task, result.headline, result.scores) == ("tiny", "accuracy", hits)
    assert result.metrics == {
        "accuracy": sum(hits) / 5,
        "accuracy:binary": (hits[1] + hits[3]) / 2,
        "accuracy:open": (hits[0] + hits[2]) / 2,
        "accuracy:text": hits[4],
    }
    assert result.examples_per_second > 0
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert (header["task"], header["batch_size"], header["max_new_tokens"]) == ("tiny", 1, 3)
    assert [(line["question_id"], line["answer"]) for line in lines] == [(record["id"], record["prediction"]) for record in result.records]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_killed_run_goes_on(tmp_path: Path, processor: Any, examples: list[VqaExample], batch_size: int, caplog: Any) -> None:
    path, model = tmp_path / "predictions.jsonl", tiny_llava()
    whole = generate_answers("tiny", examples, model, processor, SHORT, batch_size=batch_size)
    with pytest.raises(Killed):
        generate_answers("tiny", examples, model, processor, SHORT, path=path, batch_size=batch_size, progress=killed_after(2))
    written = path.read_text()
    assert len(written.splitlines()) == 1 + 2 * batch_size
    path.write_text(written[:-9])  # killed while it wrote its last line
    asked: list[Any] = []
    resumed = generate_answers(
        "tiny",
        examples,
        model,
        processor,
        SHORT,
        path=path,
        batch_size=batch_size,
        progress=lambda batches: asked.extend(batches) or batches,
    )
    assert "not whole" in caplog.text
    assert [item.answer for item in resumed] == [item.answer for item in whole]
    assert len(asked) == -(-5 // batch_size) - 1
    ids = [json.loads(line)["question_id"] for line in path.read_text().splitlines()[1:]]
    assert sorted(ids) == sorted(example.question_id for example in examples)
    before = path.read_bytes()
    assert (
        generate_answers("tiny", examples, model, processor, SHORT, path=path, batch_size=batch_size, progress=killed_after(0)) == resumed
    )
    assert path.read_bytes() == before


def test_a_header_cut_off_starts_anew(tmp_path: Path, processor: Any, examples: list[VqaExample]) -> None:
    path, model = tmp_path / "predictions.jsonl", tiny_llava()
    generate_answers("tiny", examples, model, processor, SHORT, path=path)
    whole = path.read_text().splitlines()
    path.write_text(whole[0][:40])
    generate_answers("tiny", examples, model, processor, SHORT, path=path)
    assert path.read_text().splitlines()[0] == whole[0]


def test_predictions_of_another_run_are_refused(tmp_path: Path, processor: Any, examples: list[VqaExample]) -> None:
    path, model = tmp_path / "predictions.jsonl", tiny_llava()
    generate_answers("tiny", examples, model, processor, SHORT, path=path)
    before = path.read_bytes()
    other = tiny_llava()
    with torch.no_grad():
        other.lm_head.weight += 1e-3
    for text, arguments in {
        "task is 'tiny' there and 'small' here": {"task": "small"},
        "questions is .*… there and .*… here": {"examples": examples[:4]},
        "model is .*… there and .*… here": {"model": other},
        "batch_size is 1 there and 2 here": {"batch_size": 2},
        r"max_new_tokens is 16 there and 2 here \(and 1 more differ\)": {"asking": Asking(2, pad_images=True)},
        "system is not recorded there and 'one two' here": {"asking": Asking(16, system="one two")},
    }.items():
        given = {"task": "tiny", "examples": examples, "model": model, "processor": processor, "asking": SHORT, "path": path} | arguments
        with pytest.raises(ValueError, match=f"predictions.jsonl holds predictions of another run: {text}") as caught:
            generate_answers(**given)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_predictions_of_other_versions_are_refused(
    tmp_path: Path, processor: Any, examples: list[VqaExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "predictions.jsonl", tiny_llava()
    generate_answers("tiny", examples, model, processor, SHORT, path=path)
    header, *lines = path.read_text().splitlines()
    versions = library_versions()
    assert {name: json.loads(header)[name] for name in versions} == versions
    assert list(versions) == ["corda-vlm", "torch", "transformers", "peft"]
    monkeypatch.setattr(predictions, "library_versions", lambda: versions | {"transformers": "99.0"})
    with pytest.raises(ValueError, match=r"another run: transformers is '.+' there and '99.0' here; give another file, or remove it."):
        generate_answers("tiny", examples, model, processor, SHORT, path=path)
    old = {name: value for name, value in json.loads(header).items() if name not in versions}
    path.write_text("\n".join([json.dumps(old), *lines]) + "\n")
    with pytest.raises(ValueError, match=r"corda-vlm is not recorded there and '.+' here \(and 3 more differ\); give another file"):
        generate_answers("tiny", examples, model, processor, SHORT, path=path)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda lines: [lines[0], lines[1][:20], *lines[2:]], "line 2 is not whole JSON"),
        (lambda lines: [*lines, lines[1]], "line 7 answers question 'q0' a second time"),
        (
            lambda lines: [*lines, '{"question_id": "q9", "answer": "", "seconds": 1}'],
            "line 7 answers question 'q9' that is not in the task",
        ),
        (lambda lines: [*lines, '{"question_id": "q0"}'], "line 7 is no prediction"),
        (lambda lines: [*lines[:2], lines[2].replace('"answer": "', '"answer": "red'), *lines[3:]], "line 3 is no prediction"),
        (lambda lines: [*lines, "[]"], "line 7 is no prediction"),
        (lambda lines: lines[1:], "does not start as a file of predictions"),
        (lambda lines: ["my notes", "to keep"], "line 1 is not whole JSON .*give another file"),
    ],
)
def test_broken_predictions_are_refused(tmp_path: Path, processor: Any, examples: list[VqaExample], spoil: Any, text: str) -> None:
    path, model = tmp_path / "predictions.jsonl", tiny_llava()
    generate_answers("tiny", examples, model, processor, SHORT, path=path)
    path.write_text("\n".join(spoil(path.read_text().splitlines())) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=text):
        generate_answers("tiny", examples, model, processor, SHORT, path=path)
    assert path.read_bytes() == before


def test_a_file_of_something_else_is_left_alone(tmp_path: Path, processor: Any, examples: list[VqaExample]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one line without an end")
    with pytest.raises(ValueError, match="line 1 is not whole JSON"):
        generate_answers("tiny", examples, tiny_llava(), processor, SHORT, path=path)
    assert path.read_text() == "one line without an end"


def test_model_digest_tells_adapters_apart() -> None:
    base = model_digest(tiny_llava())
    assert base == model_digest(tiny_llava()) != model_digest(tiny_llava().bfloat16())
    model = peft.get_peft_model(tiny_llava(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted = model_digest(model)
    assert adapted != base
    with model.disable_adapter():
        assert model_digest(model) != adapted
    assert model_digest(model) == adapted


def test_images_that_cannot_be_read_name_their_question(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    for image, text in ((tmp_path / "broken.png", "broken.png cannot be read"), (b"abc", "of 3 bytes cannot be read .not an image")):
        with pytest.raises(ValueError, match=f"question 'q7': the image .*{text}"):
            answer_batch(tiny_llava(), processor, [VqaExample(image, "what ?", "", "q7")], Asking(2))
    with pytest.raises(FileNotFoundError, match="1 of 1 questions of tiny have no image"):
        generate_answers("tiny", [VqaExample(tmp_path / "no.png", "what ?", "", "q7")], tiny_llava(), processor, SHORT)


def test_ids_must_be_there_and_differ(processor: Any, examples: list[VqaExample]) -> None:
    with pytest.raises(ValueError, match="tiny has 1 value.s. of question id more than once, first 'q0'"):
        generate_answers("tiny", [*examples, examples[0]], tiny_llava(), processor, SHORT)
    with pytest.raises(ValueError, match="tiny has no questions"):
        generate_answers("tiny", [], tiny_llava(), processor, SHORT)
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate_answers("tiny", examples, tiny_llava(), processor, SHORT, batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0; expected at least 1"):
        Asking(0)


def test_padded_images_keep_their_sides(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Image.Image] = []
    read = type(processor).__call__
    monkeypatch.setattr(
        type(processor), "__call__", lambda self, *args, **given: seen.extend(given["images"]) or read(self, *args, **given)
    )
    tall = VqaExample(Image.new("RGB", (10, 30), (255, 0, 0)), "what ?", "")
    answer_batch(tiny_llava(), processor, [tall], Asking(1, pad_images=True))
    assert seen[0].size == (30, 30)
    assert seen[0].getpixel((15, 0)) == (255, 0, 0)
    assert seen[0].getpixel((0, 15)) == tuple(int(255 * value) for value in processor.image_processor.image_mean)


HF_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""What the template of llava-hf/llava-1.5-7b-hf writes."""
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to "
    "the user's questions."
)


def letters_processor(template: str) -> LlavaProcessor:
    """A LLaVA processor whose tokens are letters, so that a prompt can be read back, behind "<s>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="</s>",
            extra_special_tokens={"image_token": "<image>"},
            padding_side="left",
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


class Asked(Exception):
    pass


class Watched(torch.nn.Module):
    """Keeps what it is asked."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, torch.Tensor]] = []

    def generate(self, **inputs: Any) -> Any:
        self.seen.append(inputs)
        raise Asked


def prompt_of(example: VqaExample, processor: Any, **options: Any) -> str:
    model = Watched()
    with pytest.raises(Asked):
        answer_batch(model, processor, [example], Asking(1, **options))
    (text,) = processor.tokenizer.batch_decode(model.seen[0]["input_ids"])
    return text.replace("<image>" * 4, "<image>")


def test_with_vicunas_sentence_the_prompt_is_llavas_own() -> None:
    processor = letters_processor(HF_TEMPLATE)
    seen = VqaExample(Image.new("RGB", (16, 24)), "What is this?" + SHORT_ANSWER, "")
    rest = f"USER: <image>\nWhat is this?{SHORT_ANSWER} ASSISTANT:"
    assert prompt_of(seen, processor, system=VICUNA) == f"<s>{VICUNA} {rest}"
    assert prompt_of(seen, processor) == prompt_of(seen, processor, system="") == f"<s>{rest}"
    text = VqaExample(None, "Which way?\nA. west\nB. east" + LETTER_ANSWER, "")  # ScienceQA's questions without an image
    assert prompt_of(text, processor, system=VICUNA) == f"<s>{VICUNA} USER: {text.question} ASSISTANT:"
    suite = read_suite(Path(__file__).parents[3] / "configs" / "suite_vlm.yaml")
    assert (suite.system, suite.pad_images) == (VICUNA, True)


def test_a_template_without_system_turns_is_refused() -> None:
    asks_alone = HF_TEMPLATE.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}")
    with pytest.raises(ValueError, match="template of LlavaProcessor leaves system turns out: system='A chat .* change nothing; leave the"):
        prompt_of(VqaExample(None, "What?", ""), letters_processor(asks_alone), system=VICUNA)


def test_what_a_template_says_by_itself_may_be_said() -> None:
    says = "{% if messages[0]['role'] != 'system' %}{{ 'Be short. ' }}{% endif %}" + HF_TEMPLATE
    text = VqaExample(None, "What?", "")
    alone = prompt_of(text, letters_processor(says))
    assert alone == prompt_of(text, letters_processor(says), system="Be short.") == "<s>Be short. USER: What? ASSISTANT:"


def test_squares_need_a_mean_colour() -> None:
    processor = letters_processor(HF_TEMPLATE)
    processor.image_processor.image_mean = None
    with pytest.raises(ValueError, match="LlavaProcessor names no mean colour .image_mean. to pad images with; leave pad_images out"):
        prompt_of(VqaExample(Image.new("RGB", (16, 24)), "What?", ""), processor, pad_images=True)


def test_how_it_was_asked_is_kept(tmp_path: Path, processor: Any, examples: list[VqaExample]) -> None:
    path, model = tmp_path / "predictions.jsonl", tiny_llava()
    asking = Asking(2, system="a circle", pad_images=True)
    result = answer_benchmark(TASK, examples, model, processor, asking, predictions=path)
    header = json.loads(path.read_text().splitlines()[0])
    assert (header["system"], header["pad_images"], header["max_new_tokens"]) == ("a circle", True, 2)
    alone = [answer_batch(model, processor, [example], asking)[0] for example in examples]
    assert [record["prediction"] for record in result.records] == alone
    assert check_batch_invariance(examples[:2], model.double(), processor, asking, batch_size=2) == BatchCheck(2, [])
    with pytest.raises(ValueError, match="system is 'a circle' there and None here|system is 'a circle' there and not recorded here"):
        answer_benchmark(TASK, examples, tiny_llava(), processor, Asking(2, pad_images=True), predictions=path)


def test_answers_end_where_the_models_positions_do(processor: Any, examples: list[VqaExample], monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny_llava(), []
    monkeypatch.setattr(model, "generate", lambda **inputs: given.append(inputs) or inputs["input_ids"])
    for limit in (7, 1024):
        answer_batch(model, processor, examples[:2], Asking(limit))
    length = given[0]["input_ids"].shape[1]
    assert [inputs["max_new_tokens"] for inputs in given] == [7, 128 - length]


def test_processors_that_do_not_know_their_patches_are_told(processor: Any, examples: list[VqaExample]) -> None:
    old = copy.copy(processor)
    old.patch_size = old.vision_feature_select_strategy = None
    model = tiny_llava()
    assert answer_batch(model, old, examples[:2], Asking(3)) == answer_batch(model, processor, examples[:2], Asking(3))
