"""The zero-shot benchmark: both sides find the same accuracy."""

from pathlib import Path

import pytest
from PIL import Image

from corda_eval.bench.zeroshot import comparison, random_model, run_ours, run_theirs, spread
from corda_eval.zeroshot.classify import class_head
from corda_eval.zeroshot.folders import image_folder

pytest.importorskip("open_clip_train")


def test_both_sides_agree(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"c{number}").mkdir()
        for other in range(3):
            Image.new("RGB", (20, 20), (number * 40, other * 90, 7)).save(tmp_path / f"c{number}" / f"{other}.png")
    data = spread(image_folder(tmp_path), 12)
    assert [item.label for item in data.items] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    model, pairs = random_model()
    head = class_head(model, data, pairs)
    assert run_ours(model, head, data, pairs, batch_size=5, workers=0) == run_theirs(model, head, data, pairs, batch_size=5, workers=0)


def test_the_table_pairs_the_rounds() -> None:
    runs = [
        {"side": side, "round": turn, "seconds": seconds * (1 + turn), "processor_seconds": seconds, "acc1": 0.5, "images": 100}
        for turn in range(2)
        for side, seconds in (("ours", 1.0), ("open_clip", 2.0))
    ]
    assert "| ours | 1.50 | 0.500 | 1.00 | 0.500 | 67 | 0.5000 |" in comparison(runs)
