"""The lab CLIP: a small model of open_clip, pretrained by ``corda_eval.lab.clip_pretrain`` and shipped beside this file.

Images of 64 x 64 pixels on white, names of icons, drawings and shapes as captions; 256 features.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from corda_vlm.training.models import load_base
from corda_vlm.training.recipe import ModelConfig

LAB_CLIP = Path(__file__).parent / "weights" / "clip"


def load_lab_clip(folder: Path | None = None) -> tuple[nn.Module, Callable[[Image.Image], Tensor], Callable[[list[str]], Tensor]]:
    """Return the model in float32 and evaluation mode, what makes a tensor of an image, and what makes tokens of texts; uses no network.

    Args:
        folder: What ``clip_pretrain`` wrote; None takes what is shipped.

    Raises:
        FileNotFoundError: If there is no such model.
        ModuleNotFoundError: If open_clip is not installed.
    """
    where = LAB_CLIP if folder is None else folder
    if not (where / "open_clip_model.safetensors").exists():
        raise FileNotFoundError(
            f"{where} holds no lab CLIP; reinstall corda-vlm or run: python -m corda_eval.lab.clip_pretrain --data FOLDER --output {where}"
        )
    model, pairs = load_base(ModelConfig(path=f"local-dir:{where}", library="open_clip", dtype="float32"))
    return model, pairs.preprocess, pairs.tokenizer


def read_pictures(path: Path) -> Any:
    """Return a file of ``clip_data`` as a table of ``datasets``: ``image`` (with its transparency), ``caption`` and ``source``.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If ``datasets`` is not installed.
    """
    try:
        from datasets import Dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("datasets is not installed; run: pip install 'corda-vlm[train]'") from error
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a file that this writes: python -m corda_eval.lab.clip_data --help")
    return Dataset.from_parquet(str(path))


def on_white(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, white shining through where it is transparent; ``convert`` alone would show what colour lies there."""
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")
