"""Samples of every form become the tokens that the model sees when it is asked."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import subwords
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing

import corda_vlm
from corda_vlm.context import collator_for
from corda_vlm.data.conversation import answer_of
from corda_vlm.data.items import load_items
from corda_vlm.data.limits import TextLimits
from corda_vlm.data.rows import Row
from corda_vlm.data.samples import IGNORED_LABEL, Collator, read_sample
from corda_vlm.data.sources import DataConfig
from corda_vlm.data.tokens import MARK

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


def tokens_of(items: list[Any], reader: Any) -> tuple[list[str], list[str]]:
    """Return the tokens of one sample, and those that are learned."""
    batch = Collator(reader, with_labels=True)(items)
    tokenizer = getattr(reader, "tokenizer", reader)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert torch.equal(labels[labels != IGNORED_LABEL], ids[labels != IGNORED_LABEL])
    return tokenizer.convert_ids_to_tokens(ids.tolist()), tokenizer.convert_ids_to_tokens(labels[labels != IGNORED_LABEL].tolist())


def talk(*texts: str) -> dict[str, Any]:
    return {"conversations": [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]}


def llava_processor(tokenizer: Any, template: str | None = subwords.LLAVA_TEMPLATE) -> Any:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer, chat_template=template, **options)


@pytest.mark.parametrize("prepends", [True, False])
def test_every_answer_ends_where_the_template_marks_no_end(prepends: bool) -> None:
    processor = llava_processor(subwords.llama(prepends))
    item = {"image": IMAGE, **talk("<image>\nwhat", "red", "what", "cat", "what", "red")}
    tokens, learned = tokens_of([item], processor)
    assert learned == ["▁red", "</s>", "▁cat", "</s>", "▁red", "</s>"]
    # The documented format, as one text.
    text = f"USER: {'<image>' * 4}\nwhat ASSISTANT: red</s>USER: what ASSISTANT: cat</s>USER: what ASSISTANT: red</s>"
    assert tokens == processor.tokenizer.convert_ids_to_tokens(processor.tokenizer(text)["input_ids"])


@pytest.mark.parametrize("answer", ["red", " red", "red ", "\nred\n"])
@pytest.mark.parametrize("trims", ["", "|trim"])
def test_answers_end_whatever_white_space_is_around_them(answer: str, trims: str) -> None:
    template = "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content']" + trims + " }} {% endfor %}"
    template += "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    _, learned = tokens_of([{"question": "what", "answer": answer}], subwords.llama(template=template))
    assert learned[-1] == "</s>"
    assert learned.count("</s>") == 1
    assert "red" in "".join(learned)


def test_white_space_behind_an_end_is_not_learned(tokenizer: Any) -> None:
    own = subwords.llama(template=tokenizer.chat_template)
    assert tokens_of([talk("what", "red", "what", "cat")], own)[1][-2:] == ["cat", "</s>"]
    assert "<0x0A>" not in tokens_of([talk("what", "red", "what", "cat")], own)[1]


@pytest.mark.parametrize("prepends", [True, False])
def test_a_tokenizer_that_ends_texts_ends_whole_texts_only(prepends: bool) -> None:
    reader = subwords.llama(prepends, ends=True)
    assert tokens_of([{"question": "what", "answer": "red"}], reader)[0] == ["<s>", "▁what", "<0x0A>", "red", "</s>"]
    asked = Collator(reader)([{"question": "what"}])["input_ids"][0].tolist()
    assert reader.convert_ids_to_tokens(asked) == ["<s>", "▁what", "<0x0A>"]
    assert Collator(reader)([(None, "what red")])["input_ids"][0].tolist() == reader("what red")["input_ids"]
    assert tokens_of([talk("what", "red", "what", "cat")], reader)[0].count("</s>") == 2
    pictured = {"image": IMAGE, "question": "what", "answer": "red"}
    assert tokens_of([pictured], llava_processor(reader))[0][-2:] == ["▁red", "</s>"]


ASK = "{% if add_generation_prompt %}ASSISTANT:"
NEWLINE = "{% for m in messages %}{{ m['role'].upper() }}:\n{{ m['content'] }}{{ eos_token }}{% endfor %}" + ASK + "\n{% endif %}"
SPACE = "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }}{% endfor %}" + ASK + " {% endif %}"
LINES = "{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}"
BEGINS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }}{{ eos_token }}{% endfor %}" + ASK + "{% endif %}"
)


@pytest.mark.parametrize("prepends", [True, False])
def test_tokens_are_those_of_the_whole_text(prepends: bool) -> None:
    reader = subwords.llama(prepends, template=NEWLINE)
    tokens, learned = tokens_of([{"question": "what", "answer": "red"}], reader)
    assert learned == ["red", "</s>"]
    whole = reader("USER:\nwhat</s>ASSISTANT:\nred</s>")["input_ids"]
    assert tokens == reader.convert_ids_to_tokens(whole)


@pytest.mark.parametrize("template", [NEWLINE, SPACE, LINES, BEGINS, None])
@pytest.mark.parametrize("kind", ["prepend", "metaspace", "bytes", "slow"])
@pytest.mark.parametrize("answer", ["red", " red", "\n\nred", "tired"])
def test_prompts_are_asked_as_they_were_trained(template: str | None, kind: str, answer: str) -> None:
    """Also where a token of the whole text would reach across, as that of a space and a word."""
    slow = transformers.ByT5Tokenizer()
    slow.chat_template = template
    readers = {"prepend": subwords.llama(True, template=template), "metaspace": subwords.llama(False, template=template)}
    reader = (readers | {"bytes": subwords.gpt2(template), "slow": slow})[kind]
    turns = ["what", answer, "what cat", answer, "red"]
    trained = Collator(reader, with_labels=True)([talk(*turns[:4])])
    ids, labels = trained["input_ids"][0].tolist(), trained["labels"][0].tolist()
    for length in (1, 3):
        asked = Collator(reader)([talk(*turns[:length])])["input_ids"][0].tolist()
        assert ids[: len(asked)] == asked
        assert labels[len(asked) - 1] == IGNORED_LABEL
        assert labels[len(asked)] == ids[len(asked)]
    learned = [token for token in labels if token != IGNORED_LABEL]
    assert answer.strip() in reader.decode(learned)
    assert answer.startswith(" ") or "  " not in reader.decode(ids)
    assert ids[-1] == reader.eos_token_id != ids[-2]


def test_a_cut_through_a_token_leaves_no_second_space() -> None:
    reader = subwords.llama(template=SPACE)
    assert tokens_of([{"question": "what", "answer": "red"}], reader) == (
        ["<s>", "▁USER", ":", "▁what", "ASSISTANT", ":", "▁", "red", "</s>"],
        ["red", "</s>"],
    )


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["red", "red", "blue"], "red"),
        (["blue", "red"], "blue"),
        ([{"answer": "red"}, {"answer": "blue"}, {"answer": "blue"}], "blue"),
        (np.array(["red", "blue", "blue"], dtype=object), "blue"),
        (["", None, math.nan, 3], "3"),
        (np.int64(4), "4"),
        ("red", "red"),
        ([], None),
        ("", None),
        (" ", None),
        (math.nan, None),
        (np.float32("nan"), None),
        (None, None),
    ],
)
def test_of_several_answers_the_most_frequent_counts(answers: Any, expected: str | None, tokenizer: Any) -> None:
    assert answer_of(answers, "answer") == expected
    item = {"question": "what color ?", "answer": answers}
    alone = {"question": "what color ?", "answer": expected}
    assert torch.equal(Collator(tokenizer)([item])["input_ids"], Collator(tokenizer)([alone])["input_ids"])
    if expected is None:
        with pytest.raises(ValueError, match="here: A training item has no response to learn"):
            Collator(tokenizer, with_labels=True)([Row(item, "here")])


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (
            [("system", "this"), ("human", "<image>\nwhat"), ("gpt", "red")],
            "<s> system this </s> <s> user I what </s> <s> assistant red </s>",
        ),
        ([("system", "this"), ("human", "what"), ("gpt", "red")], "<s> system this </s> <s> user I what </s> <s> assistant red </s>"),
        (
            [("system", "<image>\nthis"), ("human", "what"), ("gpt", "red")],
            "<s> system I this </s> <s> user what </s> <s> assistant red </s>",
        ),
        (
            [("human", "what"), ("gpt", "red"), ("human", "<image>\nwhat"), ("gpt", "blue")],
            "<s> user what </s> <s> assistant red </s> <s> user I what </s> <s> assistant blue </s>",
        ),
        ([("human", "what"), ("gpt", "<image> red")], "<s> user what </s> <s> assistant I red </s>"),
    ],
)
@pytest.mark.parametrize("openai", [True, False])
def test_placeholders_stand_where_they_are_written(turns: list[tuple[str, str]], expected: str, openai: bool, processor: Any) -> None:
    keys = ("role", "content") if openai else ("from", "value")
    item = {"image": IMAGE, "conversations": [dict(zip(keys, turn, strict=True)) for turn in turns]}
    text = text_of(item, processor).replace(" ".join(["<image>"] * 4), "I")
    assert text == expected.replace("system", "<unk>")


def test_to_a_language_model_a_placeholder_is_text(tokenizer: Any) -> None:
    text = "what is <image> in this ?"
    for item in ({"text": text}, {"question": text}, talk(text)):
        ids = Collator(tokenizer)([item])["input_ids"][0].tolist()
        assert " ".join(tokenizer.convert_ids_to_tokens(ids)).count(text) == 1


def test_messages_of_parts(processor: Any, tokenizer: Any) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what color ?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    expected = text_of({"image": IMAGE, **talk("<image>\nwhat color ?", "red")}, processor)
    assert text_of({"images": [IMAGE], "messages": messages}, processor) == expected
    assert text_of({"images": [IMAGE], "conversations": np.array(messages, dtype=object), "messages": None}, processor) == expected
    with pytest.raises(ValueError, match=r"1 <image> token\(s\) but 0 image"):
        read_sample({"messages": messages}, processor)
    with pytest.raises(ValueError, match=r"part .*'image'.* expected text, or parts of the types \['text'\]"):
        read_sample({"messages": messages}, tokenizer)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"conversations": []}, r"the fields \['conversations'\] but no text"),
        ({"question": None, "answer": "red"}, r"the fields \['answer'\] but no text"),
        ({"question": math.nan, "answer": "red"}, "question is nan; expected text or a number"),
        ({"question": ["a"]}, "question is a list; expected text"),
        ({"text": ""}, "no text"),
        ({"messages": [{"role": "user", "content": None}]}, "has a turn whose text is None; expected text, or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "has the part .*video"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "has a turn from 'tool'"),
        ({"messages": [{"content": "a"}]}, 'has the turn .*content.*; expected a list of {"from"'),
        (talk("what", ""), "has an empty answer among its turns"),
        ({"question": "a", "answer": {"text": "b"}}, r"answer has the keys \['text'\]"),
    ],
)
def test_samples_that_say_nothing_are_refused_by_row(item: Any, reason: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=f"^Sample 1 of the batch: .*{reason}"):
        Collator(tokenizer)([{"text": "a"}, item])
    with pytest.raises(ValueError, match=f"^data.json, row 7: .*{reason}"):
        Collator(tokenizer)([{"text": "a"}, Row(item, "data.json, row 7")])


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('only users speak') }}", "{{ messages[0]['content'] + 1 }}", "{{ messages[9]['content'] }}"]
)
def test_a_template_that_refuses_a_row_names_it(template: str, llama: Any, tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% if messages[0]['content'] == 'bad' %}" + template + "{% endif %}" + tokenizer.chat_template
    items = [{"question": "what ?", "answer": "red"}, {"question": "bad", "answer": "red"}]
    reason = r"The chat template refuses the conversation up to its turns \['user'.*\] \("
    with pytest.raises(ValueError, match=rf"^images_texts\[1\]: {reason}"):
        corda_vlm.prepare(llama, items, processor=own, rank=2)
    with pytest.raises(ValueError, match=rf"^items\[1\]: {reason}"):
        corda_vlm.fine_tune(llama, items, own, steps=1, batch_size=2, learning_rate=1e-3, seed=0)


def test_text_that_the_model_cannot_read_is_refused_by_row(llama: Any, tokenizer: Any) -> None:
    items = [{"question": "what ?", "answer": "red"}] * 3 + [{"question": "what " * 200, "answer": "red"}]
    reason = r"A sample has 2\d\d tokens, but the model has 128 positions"
    with pytest.raises(ValueError, match=rf"^images_texts\[3\]: {reason}"):
        corda_vlm.prepare(llama, items, processor=tokenizer, rank=2)
    with pytest.raises(ValueError, match=rf"^items\[3\]: {reason}"):
        corda_vlm.fine_tune(llama, items, tokenizer, steps=1, batch_size=4, learning_rate=1e-3, seed=0)
    llama.resize_token_embeddings(8)
    with pytest.raises(ValueError, match=r"^images_texts\[0\]: A sample has the token \d+, but the model has embeddings of 8 tokens"):
        corda_vlm.prepare(llama, items[:1], processor=tokenizer, rank=2)


@pytest.mark.parametrize("candidates", [None, 2])
def test_tables_and_single_samples_are_no_samples(candidates: int | None, llama: Any, tokenizer: Any) -> None:
    items = [{"question": "what ?", "answer": "red"}, {"question": "what color ?", "answer": "blue"}]
    for wrong, kind in ((pd.DataFrame(items), "DataFrame"), (items[0], "dict"), ("what ?", "str"), ({"train": items}, "dict")):
        reason = f"is a {kind}; expected a list or dataset of samples"
        named = r"names 'what \?'; expected samples, or keep files"  # a text may be the name of one
        with pytest.raises(ValueError, match=f"^images_texts {named if kind == 'str' else reason}"):
            corda_vlm.prepare(llama, wrong, processor=tokenizer, rank=2, candidates=candidates)
        with pytest.raises(ValueError, match=f"^items {reason}"):
            corda_vlm.fine_tune(llama, wrong, tokenizer, steps=1, batch_size=2, learning_rate=1e-3, seed=0)
    assert Collator(tokenizer, with_labels=True)(pd.DataFrame(items).to_dict("records"))["labels"].shape[0] == 2


def test_a_picture_that_the_processor_refuses_is_named(llava: Any, processor: Any) -> None:
    own = copy.copy(processor)
    own.image_processor = Picky()
    items = [{"image": Image.new("RGB", (16, 16)), "question": "what ?", "answer": "red"}] * 2
    items += [{"image": Image.new("RGB", (300, 1)), "question": "what ?", "answer": "red"}]
    with pytest.raises(ValueError, match=r"^images_texts\[2\]: .*does not take the image\(s\) of 300 x 1 pixels \(aspect ratio"):
        corda_vlm.prepare(llava, items, processor=own, rank=2)


class Picky(transformers.CLIPImageProcessor):
    """Refuses long pictures, as Qwen2-VL's does."""

    def __init__(self) -> None:
        super().__init__(size={"shortest_edge": 16}, crop_size=16)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        if any(max(image.size) > 200 * min(image.size) for image in images):
            raise ValueError("aspect ratio above 200")
        return super().__call__(images, *args, **kwargs)


def test_an_old_processor_takes_its_patches_from_the_model(llava: Any, processor: Any, samples: list[dict[str, object]]) -> None:
    old = copy.copy(processor)
    old.patch_size = old.vision_feature_select_strategy = None
    old.num_additional_image_tokens = 0
    expected, batch = (collator_for(llava, reader)(samples[:2]) for reader in (processor, old))
    assert torch.equal(expected["input_ids"], batch["input_ids"])
    assert old.patch_size is None
    corda_vlm.prepare(llava, samples, processor=old, rank=2)


def test_files_are_read_by_the_same_rules(tmp_path: Path, processor: Any) -> None:
    IMAGE.save(tmp_path / "red.png")
    parts = [{"type": "image"}, {"type": "text", "text": "what color ?"}]
    rows: list[dict[str, Any]] = [
        {"images": ["red.png"], "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]},
        {"question": "what color ?", "answer": ["blue", "red", "", "red", None]},
        {"question": "what color ?", "answer": math.nan},
        {"question": "what color ? " * 100, "answer": "red"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    items = load_items(DataConfig(str(tmp_path / "rows.json")))
    given = {**rows[0], "images": [IMAGE]}
    assert text_of(items[0], processor) == text_of(given, processor) == text_of({"image": IMAGE, **talk("what color ?", "red")}, processor)
    assert items[1] == {"question": "what color ?", "answer": "red"}
    collate = Collator(processor, with_labels=True, limits=TextLimits(max_tokens=128))
    for row, reason in ((2, "A training item has no response"), (3, r"A sample has \d+ tokens, but the model has 128 positions")):
        with pytest.raises(ValueError, match=rf"rows.json, row {row}: {reason}"):
            collate([items[0], items[row]])
    rows.append({"messages": [{"role": "user", "content": [{"type": "audio"}]}]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="rows.json, row 4 has the part .*audio"):
        load_items(DataConfig(str(tmp_path / "rows.json")))


def test_marks_within_a_text_do_not_part_it(tokenizer: Any) -> None:
    marked, plain = ({"question": f"what{mark} color ?", "answer": f"{mark}red"} for mark in (MARK, ""))
    batches = [Collator(tokenizer, with_labels=True)([item]) for item in (marked, plain)]
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])


def test_pictures_within_turns_are_not_overlooked(processor: Any) -> None:
    parts = [{"type": "image", "image": "a.png", "text": None}, {"type": "text", "text": "what color ?", "image": None}]
    with pytest.raises(ValueError, match="has a picture within a turn .* put it into `image`"):
        read_sample({"messages": [{"role": "user", "content": parts}], "image": IMAGE}, processor)
    parts[0]["image"] = None
    assert len(read_sample({"messages": [{"role": "user", "content": parts}], "image": IMAGE}, processor).images) == 1


@pytest.mark.parametrize("text", [5, None, {"a": 1}])
def test_turns_of_another_form_are_told(text: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match="has a turn whose text is"):
        read_sample({"conversations": [{"from": "human", "value": text}]}, processor)
