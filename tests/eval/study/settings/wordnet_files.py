"""A WordNet of made-up nouns."""

from itertools import product
from pathlib import Path

KINDS = ("tool", "fish", "tree", "city", "song", "game", "book", "color")


def write_wordnet(folder: Path, count: int = 400) -> None:
    """Write the files of so many nouns, each of one of ``KINDS``."""
    words = ["".join(letters) for letters in product("bdfgklm", "aeiou", "nprst", "aeou")][:count]
    data = ["  1 A licence.", "00000001 03 n 01 entity 0 000 | what there is"]
    data += [f"{number:08} 03 n 01 {kind} 0 001 @ 00000001 n 0000 | one of many" for number, kind in enumerate(KINDS, 2)]
    for number, word in enumerate(words):
        data.append(f"{number + 100:08} 03 n 01 {word} 0 001 @ {2 + number % len(KINDS):08} n 0000 | number {number} of what there is")
    (folder / "data.noun").write_text("\n".join(data) + "\n")
    (folder / "cntlist.rev").write_text("".join(f"{word}%1:03:00:: 1 {count - number}\n" for number, word in enumerate(words)))
