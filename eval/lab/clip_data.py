"""Pictures with captions for the lab CLIP, from packages that registries serve; writes parquet files.

    npm pack @iconify-json/noto @iconify-json/noto-v1 @iconify-json/fluent-emoji @iconify-json/fluent-emoji-flat \
        @iconify-json/emojione @iconify-json/twemoji
    apt-get install openclipart-png tuxpaint-stamps-default
    pip install 'corda-vlm[demo,train]' resvg-py
    python -m corda_eval.lab.clip_data --icons FOLDER_OF_THE_TGZ --output runs/clip_data

- ``train.parquet``: icons in five styles, drawings of Open Clip Art and stamps of Tux Paint by their titles, coloured shapes of easy-VQA.
- ``icons_seen.parquet``: twemoji's icons (a style that ``train`` lacks) of names that ``train`` has.
- ``icons_unseen.parquet``: twemoji's icons of names that ``train`` lacks in every style: a tenth of all, chosen by a hash.
- ``drawings.parquet``: titled drawings that ``train`` lacks, for retrieval.
- ``shapes.parquet``: easy-VQA's test images; of the 24 pairs of a colour and a shape ``train`` lacks the four of ``UNSEEN_SHAPES``.
"""

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from tqdm import tqdm

from corda_core.files import replacing_in
from corda_eval.lab.clip import on_white
from corda_eval.lab.shapes import named_images
from corda_eval.vqa.easy_vqa import load_easy_vqa

STYLES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione")
UNSEEN_STYLE = "twemoji"
UNSEEN_SHAPES = ("a red rectangle", "a teal triangle", "a yellow circle", "a black triangle")
CLIP_ART_FOLDERS = [
    "animals",
    "food",
    "plants",
    "people",
    "transportation",
    "tools",
    "office",
    "buildings",
    "electronics",
    "recreation",
    "education",
    "science",
    "containers",
    "decorations",
    "geography",
    "unsorted",
    "special",
]
"""Of Open Clip Art, without its 4,900 computer icons, stars, arrows and flags."""
COLLECTION = 8
"""A title that more drawings share names a collection, such as "various cliparts"."""
PIXELS = 64
SKIN_TONE = re.compile(r"skin-tone|-(medium-)?(light|dark)$|-medium$")


@dataclass(frozen=True)
class Captioned:
    """A picture (with its transparency, where it has some), its caption, and the source that it is from."""

    image: Image.Image
    caption: str
    source: str


def write_data(
    icons: Annotated[Path, typer.Option(help="Folder of the npm packages (.tgz) of the icons.")],
    output: Annotated[Path, typer.Option(help="Folder for the parquet files.")],
    clip_art: Annotated[Path, typer.Option(help="Open Clip Art's folder.")] = Path("/usr/share/openclipart/png"),
    stamps: Annotated[Path, typer.Option(help="Tux Paint's stamps.")] = Path("/usr/share/tuxpaint/stamps"),
) -> None:
    """Read the packages and write the five files."""
    unseen_style = list(read_icons(icons, UNSEEN_STYLE))
    train = [icon for style in STYLES for icon in read_icons(icons, style) if not is_held_out(icon.caption)]
    names = {icon.caption for icon in train}
    drawings = list(read_clip_art(clip_art))
    train += [drawing for drawing in drawings if not is_held_out(drawing.caption)]
    train += read_stamps(stamps)
    train += [shape for shape in read_shapes("train") if shape.caption not in UNSEEN_SHAPES]
    files = {
        "train": train,
        "icons_seen": [icon for icon in unseen_style if icon.caption in names],
        "icons_unseen": [icon for icon in unseen_style if is_held_out(icon.caption)],
        "drawings": [drawing for drawing in drawings if is_held_out(drawing.caption)],
        "shapes": list(read_shapes("test")),
    }
    with replacing_in(output) as fresh:
        for name, pictures in files.items():
            _write_table(fresh / f"{name}.parquet", pictures)
            print(f"{name}: {len(pictures)} pictures, {len({picture.caption for picture in pictures})} captions")


def is_held_out(caption: str) -> bool:
    """Return whether no picture of this caption may be trained on: one of ten, by its hash, whatever the style."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def read_icons(folder: Path, style: str) -> Iterator[Captioned]:
    """Yield the icons of one package of npm, without those that differ in skin tone only.

    Raises:
        FileNotFoundError: If the package is not there; says how to get it.
        ModuleNotFoundError: If the package that draws them is not installed.
    """
    packages = sorted(folder.glob(f"iconify-json-{style}-[0-9]*.tgz"))
    if not packages:
        raise FileNotFoundError(f"{folder} holds no iconify-json-{style}-*.tgz; run there: npm pack @iconify-json/{style}")
    with tarfile.open(packages[-1]) as archive:
        table = json.load(archive.extractfile("package/icons.json"))  # type: ignore[arg-type]
    for name, icon in tqdm(sorted(table["icons"].items()), desc=style):
        if not SKIN_TONE.search(name):
            size = (icon.get("width", table["width"]), icon.get("height", table["height"]))
            yield Captioned(_draw(_svg(icon["body"], *size)), _spoken(name), style)


def read_clip_art(folder: Path) -> Iterator[Captioned]:
    """Yield the drawings of objects whose files name a title of their own: not their author, nor a collection's.

    Raises:
        FileNotFoundError: If the folder is not there; says how to get it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There are no drawings in {folder}; run: apt-get install openclipart-png")
    files = sorted(path for part in CLIP_ART_FOLDERS for path in (folder / part).rglob("*.png"))
    drawings = []
    for path in tqdm(files, desc="drawings"):
        try:
            opened = Image.open(path)
        except Image.DecompressionBombError:
            continue  # one drawing has 620 million pixels
        with opened as image:
            title, author = image.info.get("Title", ""), image.info.get("Author", "")
            caption = re.sub(r"[\W\d_]+", " ", title).strip().lower().removesuffix(" b and w")
            if 3 <= len(caption) <= 60 and title != author and image.width * image.height < 30e6:
                drawings.append(Captioned(_small(image.convert("RGBA")), caption, "openclipart"))
    counts = Counter(drawing.caption for drawing in drawings)
    yield from (drawing for drawing in drawings if counts[drawing.caption] <= COLLECTION)


def read_stamps(folder: Path) -> Iterator[Captioned]:
    """Yield the stamps, many of them photographs, by the first line of their texts.

    Raises:
        FileNotFoundError: If the folder is not there; says how to get it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There are no stamps in {folder}; run: apt-get install tuxpaint-stamps-default")
    for text in tqdm(sorted(folder.rglob("*.txt")), desc="stamps"):
        caption = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip().rstrip(".!").lower()
        picture = text.with_suffix(".png")  # a quarter are drawings in SVG, and left out
        if picture.exists() and caption and "alphabets" not in text.parts:
            with Image.open(picture) as image:
                yield Captioned(_small(image.convert("RGBA")), caption, "tuxpaint")


def read_shapes(split: str) -> Iterator[Captioned]:
    """Yield easy-VQA's pictures: "a red circle"."""
    for image, colour, shape in named_images(load_easy_vqa(split)):
        yield Captioned(image.convert("RGBA"), f"a {colour} {shape}", "easy-vqa")


def _spoken(name: str) -> str:
    """Return an icon's name as people say it: flag-south-korea is "flag of south korea"."""
    return re.sub(r"^flag-(for-)?(?!in-hole)", "flag of ", name).replace("-", " ")


def _svg(body: str, width: int, height: int) -> str:
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="0 0 {width} {height}">{body}</svg>'


def _draw(svg: str) -> Image.Image:
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise ModuleNotFoundError("Drawing icons needs the package resvg-py; run: pip install resvg-py") from error
    return _small(Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg, width=2 * PIXELS, skip_system_fonts=True)))).convert("RGBA"))


def _small(image: Image.Image) -> Image.Image:
    """Return the picture in the middle of a transparent square of ``PIXELS``."""
    image.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (PIXELS, PIXELS), (255, 255, 255, 0))
    square.paste(image, ((PIXELS - image.width) // 2, (PIXELS - image.height) // 2))
    return square


def _write_table(path: Path, rows: Sequence[Captioned]) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    names = sorted({row.caption for row in rows})
    kinds: dict[str, Any] = {
        "image": ImageFeature(),
        "caption": Value("string"),
        "label": ClassLabel(names=names),
        "source": Value("string"),
    }
    captions = [row.caption for row in rows]
    # Training lays pictures on grounds of its own; what is measured looks the same to everybody.
    pictures = [{"bytes": _png(row.image if path.stem == "train" else on_white(row.image)), "path": None} for row in rows]
    columns = {"image": pictures, "caption": captions, "label": captions, "source": [row.source for row in rows]}
    Dataset.from_dict(columns, features=Features(kinds)).to_parquet(str(path))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    typer.run(write_data)
