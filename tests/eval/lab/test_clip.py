"""The shipped lab CLIP: what its card says of size and abilities, with open_clip's own loader."""

from pathlib import Path

import pytest
import torch
from two_towers import real

from corda_eval.lab.clip import LAB_CLIP, load_lab_clip
from corda_eval.lab.clip_data import UNSEEN_SHAPES
from corda_eval.lab.clip_sets import shapes
from corda_eval.zeroshot.cifar import cifar10
from corda_eval.zeroshot.classify import classify_images
from corda_vlm.data.pairs import OpenClipPairs

open_clip = pytest.importorskip("open_clip")


def test_it_is_small_and_open_clip_reads_it() -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{LAB_CLIP}")
    assert sum(parameter.numel() for parameter in model.parameters()) < 8e6
    assert sum(file.stat().st_size for file in LAB_CLIP.iterdir()) < 32 * 2**20
    ours, our_preprocess, tokenize = load_lab_clip()
    tokens = open_clip.get_tokenizer(f"local-dir:{LAB_CLIP}")(["a red circle", "an icon of a dog."])
    assert torch.equal(tokens, tokenize(["a red circle", "an icon of a dog."]))
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(image), ours.encode_image(image))
        assert torch.equal(model.encode_text(tokens), ours.encode_text(tokens))
    assert str(preprocess) == str(our_preprocess)


def test_it_names_shapes_also_in_pairs_that_it_never_saw() -> None:
    pytest.importorskip("easy_vqa")
    model, preprocess, tokenize = load_lab_clip()
    data = shapes("test")
    result = classify_images(model, data, OpenClipPairs(preprocess, tokenize))
    assert result.metrics["acc1"] > 0.35
    assert result.metrics["acc5"] > 0.9
    unseen = [score for item, score in zip(data.items, result.scores, strict=True) if data.class_names[item.label] in UNSEEN_SHAPES]
    assert len(unseen) > 50
    assert sum(unseen) / len(unseen) > 3 / 24


@pytest.mark.slow
def test_photographs_are_more_than_guessed() -> None:
    model, preprocess, tokenize = load_lab_clip()
    result = classify_images(model, cifar10(real("cifar10-test.parquet")), OpenClipPairs(preprocess, tokenize))
    assert 0.15 < result.metrics["acc1"] < 0.3


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="corda_eval.lab.clip_pretrain"):
        load_lab_clip(tmp_path)
