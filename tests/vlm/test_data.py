"""Samples of every form become the tokens that the model sees when it is asked."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from corda_vlm.data import IGNORED_LABEL, Collator, read_sample

IMAGE = Image.new("RGB", (16, 16), (255, 0, 0))


def text_of(item: Any, processor: Any) -> str:
    return " ".join(processor.tokenizer.decode(Collator(processor)([item])["input_ids"][0]).split())


@pytest.mark.parametrize(
    "item",
    [
        {"image": IMAGE, "question": "what color ?", "answer": "red"},
        {"image": IMAGE, "conversations": [{"from": "human", "value": "<image>\nwhat color ?"}, {"from": "gpt", "value": "red"}]},
        {"image": [IMAGE], "conversations": [{"from": "human", "value": "what color ?"}, {"from": "gpt", "value": "red"}]},
    ],
)
def test_questions_go_through_the_chat_template(item: Any, processor: Any) -> None:
    assert text_of(item, processor) == "<s> user <image> <image> <image> <image> what color ? </s> <s> assistant red </s>"


@pytest.mark.parametrize(
    "item", [(IMAGE, "a red circle"), {"image": IMAGE, "text": "a red circle"}, {"image": IMAGE, "text": "<image>\na red circle"}]
)
def test_plain_text_is_taken_as_it_stands(item: Any, processor: Any) -> None:
    assert text_of(item, processor) == "<image> <image> <image> <image> a red circle"


def test_text_alone_for_a_tokenizer(tokenizer: Any) -> None:
    batch = Collator(tokenizer)([(None, "a red circle"), {"question": "what color ?", "answer": "red"}])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][0].tolist() == [0] * (batch["input_ids"].shape[1] - 3) + [1, 1, 1]


def test_an_image_may_be_a_path(processor: Any, tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "red.png")
    given, read = (Collator(processor)([(image, "a")])["pixel_values"] for image in (IMAGE, tmp_path / "red.png"))
    assert torch.equal(given, read)


def test_labels_are_the_responses_only(processor: Any, samples: list[dict[str, object]]) -> None:
    batch = Collator(processor, with_labels=True)(samples[:3])
    kept = [processor.tokenizer.decode(row[row != IGNORED_LABEL]) for row in batch["labels"]]
    assert kept == ["red </s>", "blue </s>", "green </s>"]


def test_every_assistant_turn_is_learned(processor: Any) -> None:
    turns = [("human", "what color ?"), ("gpt", "red"), ("human", "what shape ?"), ("gpt", "circle")]
    item = {"image": IMAGE, "conversations": [{"from": who, "value": text} for who, text in turns]}
    labels = Collator(processor, with_labels=True)([item])["labels"][0]
    assert processor.tokenizer.decode(labels[labels != IGNORED_LABEL]).split() == ["red", "</s>", "circle", "</s>"]


def test_trimmed_logits_give_the_same_loss(processor: Any, samples: list[dict[str, object]], llava: Any) -> None:
    items = [*samples[:3], {"image": IMAGE, "question": "what shape is this ?", "answer": "a red circle"}]
    whole, trimmed = (Collator(processor, with_labels=True, trim_logits=trim)(items) for trim in (False, True))
    assert trimmed["labels"].shape[1] < whole["labels"].shape[1]
    with torch.no_grad():
        torch.testing.assert_close(llava(**trimmed).loss, llava(**whole).loss)


def test_prompt_has_the_tokens_of_generation(processor: Any, samples: list[dict[str, object]]) -> None:
    asked = {key: value for key, value in samples[0].items() if key != "answer"}
    prompt = Collator(processor)([asked])["input_ids"][0]
    whole = Collator(processor, with_labels=True)([samples[0]])
    assert torch.equal(whole["input_ids"][0][: len(prompt)], prompt)
    assert (whole["labels"][0][: len(prompt)] == IGNORED_LABEL).all()


def test_mistakes_get_one_clear_sentence(processor: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"1 <image> token\(s\) but 0 image"):
        read_sample({"question": "<image> what ?"}, processor)
    with pytest.raises(ValueError, match=r"1 <image> token\(s\) but 0 image"):
        read_sample((None, "<image> a circle"), processor)
    with pytest.raises(ValueError, match=r"1 <image> token\(s\) but 2 image"):
        read_sample({"image": [IMAGE, IMAGE], "text": "<image> a"}, processor)
    with pytest.raises(ValueError, match="processor given is a tokenizer"):
        read_sample((IMAGE, "a"), tokenizer)
    with pytest.raises(ValueError, match=r"fields \['caption'\] but no text"):
        read_sample({"caption": "a"}, processor)
    with pytest.raises(ValueError, match="expected a pair"):
        read_sample("a circle", processor)
    with pytest.raises(ValueError, match="An image is a int"):
        read_sample((3, "a"), processor)
    with pytest.raises(ValueError, match="turn from 'robot'"):
        read_sample({"conversations": [{"from": "robot", "value": "a"}]}, processor)
    with pytest.raises(ValueError, match="no response to learn"):
        Collator(processor, with_labels=True)([(IMAGE, "a")])


@pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        ("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}", 1, 1),
        ("<s>{% for m in messages %}{{ m['content'] }}</s> {% endfor %}", 1, 1),
        (None, 1, 1),
    ],
)
def test_texts_begin_and_answers_end_once(template: str | None, start: int, end: int, tokenizer: Any) -> None:
    """LLaVA 1.5's template writes neither mark, others both; a model that never saw the end does not learn to stop."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    own._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", own.bos_token_id)])
    batch = Collator(own, with_labels=True)([{"question": "what color ?", "answer": "red"}])
    ids = batch["input_ids"][0].tolist()
    assert ids[0] == own.bos_token_id
    assert ids.count(own.bos_token_id) == start
    assert ids[-1] == batch["labels"][0, -1] == own.eos_token_id
    assert ids[-2] != own.eos_token_id
