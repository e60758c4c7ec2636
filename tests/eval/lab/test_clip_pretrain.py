"""How the lab CLIP's pictures are read and its towers trained, on pictures and names made here."""

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from corda_eval.lab import clip_pretrain
from corda_eval.lab.clip_data import PIXELS, is_held_out, read_clip_art, read_icons, read_stamps, write_data
from corda_eval.lab.clip_pretrain import (
    MODEL,
    Stage,
    augmented,
    caption_features,
    optimise_both,
    optimise_images,
    optimise_text,
    tokens,
    train_tokenizer,
    write_model,
)

open_clip = pytest.importorskip("open_clip")
SQUARE = '<path fill="{}" d="M0 0h32v32H0z"/>'


def icon_package(folder: Path, style: str, icons: dict[str, str]) -> None:
    table = {"prefix": style, "width": 32, "height": 32, "icons": {name: {"body": SQUARE.format(fill)} for name, fill in icons.items()}}
    data = json.dumps(table).encode()
    with tarfile.open(folder / f"iconify-json-{style}-1.0.0.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/icons.json")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))


def test_icons_are_drawn_and_named(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    names = ("red-heart", "thumbs-up-light-skin-tone", "artist-medium-dark", "flag-for-south-korea", "flag-peru", "flag-in-hole")
    icon_package(tmp_path, "noto", dict.fromkeys(names, "#f00"))
    result = {icon.caption: icon for icon in read_icons(tmp_path, "noto")}
    assert set(result) == {"red heart", "flag of south korea", "flag of peru", "flag in hole"}
    assert result["red heart"].image.size == (PIXELS, PIXELS)
    assert result["red heart"].image.getpixel((30, 30)) == (255, 0, 0, 255)


def test_missing_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npm pack @iconify-json/noto"):
        list(read_icons(tmp_path, "noto"))
    with pytest.raises(FileNotFoundError, match="apt-get install openclipart-png"):
        list(read_clip_art(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
        list(read_stamps(tmp_path / "none"))


def drawing(path: Path, **texts: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", (200, 100), "blue").save(path, pnginfo=info)


def test_drawings_have_titles_of_their_own(tmp_path: Path) -> None:
    drawing(tmp_path / "animals" / "dog.png", Title="Brown Dog 02", Author="Ann")
    drawing(tmp_path / "animals" / "signed.png", Title="Ann", Author="Ann")
    drawing(tmp_path / "computer" / "icon.png", Title="Folder", Author="Ann")
    for number in range(9):
        drawing(tmp_path / "food" / f"{number}.png", Title=f"Various cliparts {number}", Author="Bob")
    (result,) = read_clip_art(tmp_path)
    assert (result.caption, result.image.size) == ("brown dog", (PIXELS, PIXELS))
    assert result.image.getpixel((32, 5))[3] == 0
    assert result.image.getpixel((32, 32)) == (0, 0, 255, 255)


def test_stamps_have_the_first_line_of_their_texts(tmp_path: Path) -> None:
    drawing(tmp_path / "animals" / "cow.png")
    (tmp_path / "animals" / "cow.txt").write_text("A Cow.\nde.utf8=Eine Kuh.\n")
    (tmp_path / "animals" / "alone.txt").write_text("No picture.\n")
    drawing(tmp_path / "symbols" / "alphabets" / "a.png")
    (tmp_path / "symbols" / "alphabets" / "a.txt").write_text("The letter A.\n")
    assert [stamp.caption for stamp in read_stamps(tmp_path)] == ["a cow"]


def test_nothing_that_is_held_out_is_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    pytest.importorskip("easy_vqa")
    datasets = pytest.importorskip("datasets")
    names = [f"thing-{chr(97 + i)}{chr(97 + j)}" for i in range(4) for j in range(10)]
    for style in ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione", "twemoji"):
        icon_package(tmp_path, style, dict.fromkeys(names, "#0f0"))
    animals = [f"animal {chr(97 + i)}{chr(97 + j)}" for i in range(2) for j in range(10)]
    for name in animals:
        drawing(tmp_path / "art" / "animals" / f"{name}.png", Title=name.title(), Author="Ann")
    drawing(tmp_path / "stamps" / "cow.png")
    (tmp_path / "stamps" / "cow.txt").write_text("A cow.\n")
    write_data(icons=tmp_path, output=tmp_path / "out", clip_art=tmp_path / "art", stamps=tmp_path / "stamps")
    tables = {file.stem: datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path)) for file in (tmp_path / "out").glob("*.parquet")}
    captions = {name: set(table["caption"]) for name, table in tables.items()}
    assert set(captions) == {"train", "icons_seen", "icons_unseen", "drawings", "shapes"}
    assert captions["drawings"] == {name for name in animals if is_held_out(name)} == set(animals) - captions["train"]
    assert captions["icons_unseen"] == {name.replace("-", " ") for name in names if is_held_out(name.replace("-", " "))}
    assert captions["icons_unseen"]
    assert not captions["icons_unseen"] & captions["train"]
    assert captions["icons_seen"] <= captions["train"]
    assert len(captions["shapes"]) == 24
    assert len(captions["shapes"] & captions["train"]) == 20
    assert tables["icons_seen"].features["label"].names == sorted(captions["icons_seen"])


def test_the_end_token_is_found_by_its_id() -> None:
    tokenizer = train_tokenizer(["a red circle", "the blue square", "Green triangles"] * 3)
    ids = tokens(tokenizer, ["A red circle", "a word that is not known and goes on until the very end of what there is room for" * 2])
    assert ids.shape == (2, MODEL["text_cfg"]["context_length"])  # type: ignore[index]
    assert (ids.argmax(1) == (ids == tokenizer.eos_token_id).int().argmax(1)).all()
    assert ids[0, 0] == tokenizer.bos_token_id
    assert ids[0, -1] == tokenizer.pad_token_id


def test_augmented_pictures_keep_their_ground_and_differ() -> None:
    torch.manual_seed(0)
    picture = torch.zeros(64, 4, PIXELS, PIXELS, dtype=torch.uint8)
    picture[:, 0, 24:40, 24:40] = 255  # a red square, all around it transparent
    picture[:, 3, 24:40, 24:40] = 255
    result = augmented(picture)
    assert result.shape == (64, 3, PIXELS, PIXELS)
    assert torch.isfinite(result).all()
    assert (result[0] - result[1]).abs().max() > 0.1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip_pretrain.MEAN, clip_pretrain.STD))
    plain = result * std + mean
    assert plain.min() >= -1e-5
    assert plain.max() <= 1 + 1e-5
    redness = (plain[:, 0] - plain[:, 1:].amax(1)).amax(dim=(1, 2))
    assert (redness > 0.2).float().mean() > 0.95  # the square is in nearly all of them


def test_pictures_of_one_caption_are_not_held_against_each_other() -> None:
    """Two pictures of one caption have equal logits for it, which would cost log 2 if each counted against the other."""
    captions = ["a", "a", "b"]
    order = clip_pretrain._pairs_of_different_captions(captions, [2, 1], 3)
    random.seed(0)
    assert sorted(captions[place] for place in next(order)) == captions

    class Perfect(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = torch.nn.Parameter(torch.tensor(4.0))

        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            return torch.eye(2)[[0, 0, 1]]

    log: list[dict[str, float]] = []
    pictures = torch.zeros(3, 4, PIXELS, PIXELS, dtype=torch.uint8)
    model = Perfect()

    def text_features(some: object) -> torch.Tensor:
        return torch.eye(2)[[0, 0, 1]]

    stage = Stage("both", 1, 3, 1e-3, lambda **entry: log.append(entry))
    clip_pretrain._match(model, [model.logit_scale], text_features, pictures, captions, iter([[0, 1, 2]]), stage)
    assert log[0]["loss"] < 1e-4


def test_both_towers_learn_and_open_clip_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    random.seed(0)
    names = ["red thing", "green thing", "blue thing", "gray thing"]
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]], dtype=torch.uint8)
    pictures = torch.cat(
        [colours[:, :, None, None].expand(4, 3, PIXELS, PIXELS), torch.full((4, 1, PIXELS, PIXELS), 255, dtype=torch.uint8)], 1
    )
    wanted = F.normalize(torch.randn(4, 384), dim=-1)
    monkeypatch.setattr(clip_pretrain, "encoder_features", lambda texts: wanted.repeat(100, 1)[: len(texts)])
    small = MODEL | {
        "vision_cfg": clip_pretrain.VISION | {"layers": 1, "width": 64},
        "text_cfg": MODEL["text_cfg"] | {"layers": 1, "width": 48},
    }  # type: ignore[operator]
    monkeypatch.setattr(clip_pretrain, "MODEL", small)
    model = open_clip.CLIP(**small)
    tokenizer = train_tokenizer(names)
    log: list[dict[str, float]] = []
    monkeypatch.setattr(clip_pretrain, "FEATURES", 4)  # four names span no more directions
    model = open_clip.CLIP(**small | {"embed_dim": 4})
    monkeypatch.setattr(clip_pretrain, "MODEL", small | {"embed_dim": 4})
    optimise_text(model, tokenizer, names * 5, Stage("text", 80, 10, 1e-3, lambda **entry: log.append(entry)))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    before = caption_features(model, tokenizer, names)
    optimise_images(model, tokenizer, pictures, names, Stage("images", 40, 4, 1.5e-3, lambda **entry: log.append(entry)))
    assert log[-1]["right"] >= 0.75
    assert torch.equal(caption_features(model, tokenizer, names), before)  # the text tower stays
    optimise_both(model, tokenizer, pictures, names, Stage("both", 2, 4, 1e-3, lambda **entry: log.append(entry)))
    assert not torch.equal(caption_features(model, tokenizer, names), before)
    write_model(model, tokenizer, tmp_path)
    read, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    read_tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    assert torch.equal(read_tokenizer(names), tokens(tokenizer, names))
    images = torch.stack([preprocess(Image.new("RGB", (80, 80), tuple(colour))) for colour in colours.tolist()])
    with torch.no_grad():
        ours, reference = model.eval().encode_image(images), read.eval().encode_image(images)
    torch.testing.assert_close(reference, ours, atol=2e-2, rtol=2e-2)  # float16 in the file
