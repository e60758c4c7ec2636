"""Tiny random models with two towers, and what makes their inputs."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torchvision import transforms

from corda_vlm.data.pairs import OpenClipPairs, PairCollator, TransformersPairs

open_clip = pytest.importorskip("open_clip")
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTH = 40
DATA = Path(os.environ.get("CORDA_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data"))


def real(name: str) -> Path:
    """Return a file of real photographs, or skip the test."""
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not in {DATA}; set CORDA_TEST_DATA to the folder that holds it")
    return DATA / name


def characters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a token a letter."""
    letters = {chr(code): place for place, code in enumerate(range(32, 127), 4)}
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 299} | letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=LENGTH
    )


def hugging_clip() -> tuple[Any, PairCollator]:
    """CLIP of transformers."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**TEXT, "max_position_embeddings": LENGTH, "projection_dim": 16, "eos_token_id": 299},
        vision_config={**VISION, "projection_dim": 16},
        projection_dim=16,
    )
    reader = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    return transformers.CLIPModel(config).eval(), TransformersPairs(transformers.CLIPProcessor(reader, characters()))


def hugging_siglip() -> tuple[Any, PairCollator]:
    """SigLIP of transformers."""
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={**TEXT, "max_position_embeddings": LENGTH, "projection_size": 24}, vision_config=dict(VISION)
    )
    reader = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    return transformers.SiglipModel(config).eval(), TransformersPairs(transformers.SiglipProcessor(reader, characters()))


def open_clips() -> tuple[Any, OpenClipPairs]:
    """A model of open_clip."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, "mlp_ratio": 2.0},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
    )
    preprocess = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.3] * 3)])
    return model.eval(), OpenClipPairs(preprocess, open_clip.SimpleTokenizer(context_length=16))


def coloured(number: int) -> Image.Image:
    """Return a picture of one colour, another for each number."""
    return Image.new("RGB", (20, 18), (number * 37 % 256, number * 91 % 256, number * 13 % 256))
