"""Samples that are too long are refused with a count, left out or cut; never inside an image, never without something to learn."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rows import noise, turns, write_json

from corda_vlm.context import collator_for
from corda_vlm.data import tokens
from corda_vlm.data.items import Items, load_items
from corda_vlm.data.lengths import LONGEST, within_length
from corda_vlm.data.samples import Collator
from corda_vlm.data.sources import DataConfig

LIMIT = 24


def collator(model: Any, processor: Any) -> Collator:
    made = collator_for(model, processor)
    assert isinstance(made, Collator)
    return replace(made, with_labels=True)


def loaded(path: Path, rows: Sequence[dict[str, Any]]) -> Items:
    return load_items(DataConfig(write_json(path / "rows.json", list(rows))))


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows by number of words; an image becomes four tokens. 1: cut in the answer. 2: in the question. 3: inside the second image."""
    noise(0).save(tmp_path / "0.png")
    return [
        {"image": "0.png", "question": "what color ?", "answer": "red"},
        {"image": "0.png", "question": "what color ?", "answer": "red " * 30},
        {"image": "0.png", "question": "what color ? " * 20, "answer": "red"},
        {"image": ["0.png", "0.png"], "question": "<image> " + "what color ? " * 5 + "<image>", "answer": "red " * 30},
        {"image": None, "conversations": [*turns("one ?", "one"), *turns("two ?", "two " * 40)]},
        {"image": None, "text": "red"},
    ]


def long_rows(rows: Sequence[dict[str, Any]], collate: Collator) -> dict[int, int]:
    """Return the numbers of tokens of those that are too long, by the collator itself."""
    plain = replace(collate, with_labels=False)
    return {number: length for number in range(len(rows)) if (length := plain([rows[number]])["input_ids"].shape[1]) > LIMIT}


def test_lengths_are_those_that_the_model_would_be_given(rows: Any, llava: Any, processor: Any, tmp_path: Path) -> None:
    items, collate = loaded(tmp_path, rows), collator(llava, processor)
    long = long_rows(items, collate)
    assert list(long) == [1, 2, 3, 4]
    expected = rf"4 of 6 samples of .*rows.json are longer than {LIMIT} tokens, training.max_length; the first is row 1 with {long[1]}: "
    with pytest.raises(ValueError, match=expected):
        within_length(items, collate, LIMIT, "stop")
    fitting = within_length(items, collate, max(long.values()), "stop")
    assert fitting is items
    with pytest.raises(ValueError, match=f"1 of 6 .* longer than {max(long.values()) - 1} tokens"):
        within_length(items, collate, max(long.values()) - 1, "stop")


def test_skips(rows: Any, llava: Any, processor: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        items = within_length(loaded(tmp_path, rows), collator(llava, processor), LIMIT, "skip")
    assert (items.places, items.num_long, items.num_cut, items.max_tokens) == ([0, 5], 4, 0, None)
    assert "0 are cut, 4 left out; the first is row 1." in caplog.text
    assert items.fingerprint() != loaded(tmp_path, rows).fingerprint()


def test_cuts_the_end_off_and_leaves_out_what_would_lose_an_image_or_its_response(
    rows: Any, llava: Any, processor: Any, tmp_path: Path
) -> None:
    collate = collator(llava, processor)
    whole = loaded(tmp_path, rows)
    items = within_length(whole, collate, LIMIT, "cut")
    assert (items.places, items.num_long, items.num_cut, items.max_tokens) == ([0, 1, 4, 5], 2, 2, LIMIT)
    for row in (1, 4):
        before, after = collate([whole.read(row)]), collate([items.read(row)])
        assert after["input_ids"].tolist() == before["input_ids"][:, :LIMIT].tolist()
        assert after["labels"].tolist() == before["labels"][:, :LIMIT].tolist()
        assert ("pixel_values" in after) == (row == 1)
    assert collate([items.read(0)])["input_ids"].tolist() == collate([whole.read(0)])["input_ids"].tolist()


def test_the_fingerprint_tells_where_samples_are_cut(rows: Any, llava: Any, processor: Any, tmp_path: Path) -> None:
    collate, items = collator(llava, processor), loaded(tmp_path, [rows[0], rows[1]])
    prints = {within_length(items, collate, limit, "cut").fingerprint() for limit in (LIMIT, LIMIT + 1, 60)}
    assert len(prints) == 3
    assert items.fingerprint() in prints, "60 tokens cut nothing"


def test_texts_are_read_by_one_thread_at_a_time(rows: Any, llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Processors that pad, as Aya Vision's, tell the tokenizer so, and with it threads beside them: lengths were wrong by chance."""
    inside, most = [0], [0]
    read = tokens._Reader.read

    def slow(self: Any, texts: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        ids = read(self, texts)
        inside[0] -= 1
        return ids

    monkeypatch.setattr(tokens._Reader, "read", slow)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("corda_vlm.data.lengths.LONGEST", 999)  # so that all are tokenised
    many = [rows[number] for number in (0, 1, 2, 4, 5)] * 16
    items = within_length(loaded(tmp_path, many), collator(llava, processor), LIMIT, "skip")
    assert items.places == [place for place in range(len(many)) if place % 5 in (0, 4)]
    assert most == [1]


def test_cut_samples_train_in_one_batch_with_others(rows: Any, llava: Any, processor: Any, tmp_path: Path) -> None:
    collate = collator(llava, processor)
    items = within_length(loaded(tmp_path, rows), collate, LIMIT, "cut")
    together = llava(**collate([items[0], items[1]])).loss
    assert together.isfinite()


@pytest.mark.parametrize("on_long", ["skip", "cut"])
def test_the_model_s_positions_are_the_limit_without_another(on_long: str, llava: Any, processor: Any, tmp_path: Path) -> None:
    collate = collator(llava, processor)
    positions = collate.limits.max_tokens
    assert positions is not None
    rows = [{"question": "one ?", "answer": "one " * count} for count in (3, 2 * positions)]
    with pytest.raises(ValueError, match=rf"longer than {positions} tokens, the positions of the model; the first is row 1"):
        within_length(loaded(tmp_path, rows), collate, None, "stop")
    items = within_length(loaded(tmp_path, rows), collate, None, on_long)
    assert [collate([item])["input_ids"].shape[1] for item in items][1:] == ([positions] if on_long == "cut" else [])
    with pytest.raises(ValueError, match=f"training.max_length is {positions + 1}, but the model has {positions} positions"):
        within_length(items, collate, positions + 1, on_long)


def test_nothing_left_is_refused(llava: Any, processor: Any, tmp_path: Path) -> None:
    rows = [{"question": "one ? " * 40, "answer": "one"}] * 3
    with pytest.raises(ValueError, match="3 of 3 samples .* none can be cut: nothing is left"):
        within_length(loaded(tmp_path, rows), collator(llava, processor), LIMIT, "cut")


def test_without_a_limit_nothing_is_looked_at(llava: Any, processor: Any, tmp_path: Path) -> None:
    collate = collator(llava, processor)
    unknown = replace(collate, limits=replace(collate.limits, max_tokens=None))
    items = loaded(tmp_path, [{"question": "one ?", "answer": "one " * 900}])
    assert within_length(items, unknown, None, "stop") is items


def test_what_cannot_be_read_is_left_for_its_own_error(llava: Any, processor: Any, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"none")
    items = loaded(tmp_path, [{"image": "0.png", "question": "one ?", "answer": "one " * 90}, {"question": "one ?", "answer": "one"}])
    assert within_length(items, collator(llava, processor), LIMIT, "skip").num_long == 0
    with pytest.raises(ValueError, match="row 0: the image .* cannot be read"):
        items[0]


def test_processors_are_asked_once_for_images_of_one_size(llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for number in range(3):
        noise(number).save(tmp_path / f"{number}.png")
    collate = collator(llava, processor)
    asked: list[int] = []
    read = type(processor.image_processor).__call__

    def counted(self: Any, images: Any, **options: Any) -> Any:
        asked.append(len(images))
        return read(self, images, **options)

    monkeypatch.setattr(type(processor.image_processor), "__call__", counted)
    monkeypatch.setattr("corda_vlm.data.items.MAX_THREADS", 1)
    rows = [{"image": f"{number % 3}.png", "question": "what ?", "answer": "red " * 3} for number in range(12)]
    assert within_length(loaded(tmp_path, rows), collate, LIMIT + LONGEST * 20, "stop").num_long == 0
    assert asked == [1]
