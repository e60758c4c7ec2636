"""Recall at k, from its definition; ties; models of both libraries."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from two_towers import coloured, hugging_clip, open_clips

from corda_eval.zeroshot import retrieval
from corda_eval.zeroshot.retrieval import CaptionedImages, retrieval_ranks, retrieve


def recalls(images: Tensor, captions: Tensor, owners: Tensor, k: int) -> tuple[float, float]:
    """Return both recalls from their definition, one row at a time; a stable sort puts the lowest index first."""
    cosines = captions @ images.T
    by_caption = [owners[row] in cosines[row].sort(descending=True, stable=True)[1][:k] for row in range(len(captions))]
    by_image = [bool((owners[cosines[:, row].sort(descending=True, stable=True)[1][:k]] == row).any()) for row in range(len(images))]
    return sum(by_caption) / len(captions), sum(by_image) / len(images)


@pytest.mark.parametrize("rows", [2, 1024])
def test_recall_is_its_definition(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "ROWS", rows)
    owners = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6])
    # Whole numbers: products are exact, and many are equal.
    images = torch.randint(-1, 2, (7, 3)).float()
    captions = torch.randint(-1, 2, (11, 3)).float()
    image_ranks, text_ranks = retrieval_ranks(images, captions, owners)
    for k in (1, 2, 3, 5, 20):
        expected = recalls(images, captions, owners, k)
        result = ((image_ranks < k).double().mean().item(), (text_ranks < k).double().mean().item())
        assert result == pytest.approx(expected), k


CAPTIONS = [["a red one", "red"], ["blue", "the blue one", "sky"], ["green"], ["a white thing", "snow"]]


@pytest.mark.parametrize("make", [hugging_clip, open_clips])
def test_models_are_measured_in_both_directions(make: Any) -> None:
    model, pairs = make()
    pictures: Sequence[Image.Image] = [coloured(number) for number in range(4)]
    result = retrieve(model, CaptionedImages("tiny", pictures, CAPTIONS), pairs, ks=(1, 2), batch_size=3)
    texts = [caption for captions in CAPTIONS for caption in captions]
    with torch.no_grad():
        if make is open_clips:
            images, captions, _ = model(pairs.read(pictures)["image"], pairs.tokenize(texts))
        else:
            output = model(**pairs.read(pictures), **pairs.tokenize(texts))
            images, captions = output.image_embeds, output.text_embeds
    owners = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    for k in (1, 2):
        recall = result.metrics[f"image_retrieval_recall@{k}"], result.metrics[f"text_retrieval_recall@{k}"]
        assert recall == pytest.approx(recalls(images, captions, owners, k))
    assert result.headline == "image_retrieval_recall@1"
    assert sum(result.scores) / len(result.scores) == pytest.approx(result.metrics[result.headline])
    assert [record["answer"] for record in result.records] == owners.tolist()
    first = retrieve(model, CaptionedImages("tiny", pictures, CAPTIONS, captions_per_image=1), pairs)
    assert [record["caption"] for record in first.records] == [captions[0] for captions in CAPTIONS]


def test_bad_sets_are_named() -> None:
    model, pairs = hugging_clip()
    pictures = [coloured(0), coloured(1)]
    with pytest.raises(ValueError, match=r"tiny, image 1 has the captions \[\]"):
        retrieve(model, CaptionedImages("tiny", pictures, [["a"], []]), pairs)
    with pytest.raises(ValueError, match="image 0 has the captions 'one'"):
        retrieve(model, CaptionedImages("tiny", pictures, ["one", "two"]), pairs)
    with pytest.raises(ValueError, match="2 images and captions of 1"):
        retrieve(model, CaptionedImages("tiny", pictures, [["a"]]), pairs)
    with pytest.raises(ValueError, match=r"ks is \[0\]"):
        retrieve(model, CaptionedImages("tiny", pictures, [["a"], ["b"]]), pairs, ks=[0])
    with pytest.raises(ValueError, match="captions_per_image is 0"):
        retrieve(model, CaptionedImages("tiny", pictures, [["a"], ["b"]], captions_per_image=0), pairs)
