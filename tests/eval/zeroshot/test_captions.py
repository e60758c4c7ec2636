"""Karpathy's splits, in both forms."""

import json
from pathlib import Path

import pytest
from two_towers import coloured, hugging_clip

from corda_eval.zeroshot.captions import karpathy
from corda_eval.zeroshot.retrieval import retrieve


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    for number in range(3):
        coloured(number).save(tmp_path / "images" / "val2014" / f"{number}.png")
    return tmp_path / "images"


def test_both_forms_are_the_same_set(tmp_path: Path, images: Path) -> None:
    own = {
        "images": [
            {
                "filepath": "val2014",
                "filename": f"{number}.png",
                "split": "test" if number else "train",
                "sentences": [{"raw": f"picture {number}"}, {"raw": f"image {number}"}],
            }
            for number in range(3)
        ]
    }
    blips = [{"image": f"val2014/{number}.png", "caption": [f"picture {number}", f"image {number}"]} for number in (1, 2)]
    (tmp_path / "own.json").write_text(json.dumps(own))
    (tmp_path / "blip.json").write_text(json.dumps(blips))
    first, second = karpathy(tmp_path / "own.json", images), karpathy(tmp_path / "blip.json", images)
    assert first.captions == second.captions == [["picture 1", "image 1"], ["picture 2", "image 2"]]
    assert first.images == second.images
    model, pairs = hugging_clip()
    result = retrieve(model, first, pairs)
    assert result.num_examples == 4
    assert result.metrics["text_retrieval_recall@5"] == 1
    assert karpathy(tmp_path / "own.json", images, limit=1).captions == first.captions[:1]
    assert karpathy(tmp_path / "own.json", images, split="train", captions_per_image=1).captions_per_image == 1
    with pytest.raises(ValueError, match="no images in the split 'restval'"):
        karpathy(tmp_path / "own.json", images, split="restval")
    with pytest.raises(FileNotFoundError, match=r"as for 2 of blip.json's 2 images"):
        karpathy(tmp_path / "blip.json", images / "val2014")


def test_what_is_no_such_file_is_named(tmp_path: Path, images: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected Karpathy's or BLIP's annotations"):
        karpathy(tmp_path / "none.json", images)
    (tmp_path / "bad.json").write_text('[{"file": 1}]')
    with pytest.raises(ValueError, match="is not of Karpathy's or BLIP's form"):
        karpathy(tmp_path / "bad.json", images)
