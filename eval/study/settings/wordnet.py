"""WordNet's nouns (3.0, Princeton University, free to use and to pass on): how they are defined, and what they are a kind of.

Data: Debian's package ``wordnet-base``, which ``apt-get install wordnet-base`` puts to /usr/share/wordnet. Without that:
``apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb FOLDER``; the files are then in FOLDER/usr/share/wordnet.
Files: ``data.noun`` (synsets: their words, what they are a kind of, a gloss) and ``cntlist.rev`` (how often each sense was met in texts).

What is taken are common nouns of one word: in the sense that texts have most often, of those that they have at all.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

CURE = "run apt-get install wordnet-base, or unpack that package anywhere (dpkg-deb -x) and name its folder usr/share/wordnet"
ROLES = {"train": range(8), "validation": range(8, 9), "test": range(9, 10), "context": range(10, 12), "asked": range(12, 20)}
"""Twentieths of the words, by a hash: what is learned from and tried on, and what is kept."""
CHOICES = 4


@dataclass(frozen=True)
class Noun:
    """One noun in its commonest sense."""

    word: str
    definition: str
    kind: str
    """What it is a kind of: the first word of the synset above it."""
    above: frozenset[str]
    """All words of all synsets that any of its senses is a kind of, and of these senses."""


@dataclass(frozen=True)
class Question:
    """What a noun is a kind of."""

    text: str
    """Such as "A trout is a kind of"."""
    choices: tuple[str, ...]
    """Such as " fish": ``CHOICES`` words, the right one first."""


@dataclass(frozen=True)
class _Synset:
    words: tuple[str, ...]
    counts: tuple[int, ...]
    above: tuple[str, ...]
    gloss: str


def nouns(folder: Path, role: str) -> list[Noun]:
    """Return the nouns of one of ``ROLES``, in alphabetical order.

    Raises:
        FileNotFoundError: If a file of WordNet is missing; says how to get it.
    """
    synsets = _synsets(folder)
    senses = defaultdict(list)
    for synset in synsets.values():
        for word, count in zip(synset.words, synset.counts, strict=True):
            senses[word].append((count, synset))
    chosen = []
    for word in sorted(senses):
        count, synset = max(senses[word], key=lambda sense: sense[0])  # of equal ones the first in the file
        definition = synset.gloss.partition('; "')[0].strip()
        if count > 0 and synset.above and _is_plain(word) and word not in definition and crc32(word.encode()) % 20 in ROLES[role]:
            above = frozenset(name for _, sense in senses[word] for name in _words_above(sense, synsets))
            chosen.append(Noun(word, definition, synsets[synset.above[0]].words[0], above))
    return chosen


def questions(some: Sequence[Noun], kinds: set[str], count: int) -> list[Question]:
    """Return ``count`` questions about nouns of which ``kinds`` has what they are a kind of; always the same.

    The wrong choices are drawn from the right ones of all questions, but for what would be right too: so no choice is better than another
    for who has not read the question.

    Raises:
        ValueError: If there are fewer such nouns.
    """
    asked = [noun for noun in some if noun.kind in kinds]
    if len(asked) < count:
        raise ValueError(f"WordNet gives {len(asked)} questions, not {count}; ask for fewer.")
    generator = random.Random(0)
    result = []
    for noun in generator.sample(asked, count):
        choices = [noun.kind]
        while len(choices) < CHOICES:
            other = generator.choice(asked).kind
            if other not in noun.above and other not in choices:
                choices.append(other)
        result.append(Question(f"{statement(noun)}", tuple(f" {choice}" for choice in choices)))
    return result


def statement(noun: Noun) -> str:
    """Return the beginning of what a noun is a kind of."""
    return f"{'An' if noun.word[0] in 'aeiou' else 'A'} {noun.word} is a kind of"


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower()


def _words_above(synset: _Synset, synsets: dict[str, _Synset]) -> Iterator[str]:
    yield from synset.words
    for offset in synset.above:
        yield from _words_above(synsets[offset], synsets)


def _synsets(folder: Path) -> dict[str, _Synset]:
    """Return the synsets of nouns by their place in ``data.noun``, each word with how often texts have it in this sense."""
    counts = {}
    for line in _lines(folder / "cntlist.rev"):
        key, _, count = line.split()
        lemma, _, place = key.partition("%")
        kind, file, number, *_ = place.split(":")
        if kind == "1":
            counts[lemma, int(file), int(number)] = int(count)
    synsets = {}
    for line in _lines(folder / "data.noun"):
        data, _, gloss = line.partition(" | ")
        offset, file, _, size, *rest = data.split()
        end = 2 * int(size, 16)
        words, numbers = rest[:end:2], rest[1:end:2]
        found = tuple(counts.get((w.lower(), int(file), int(n, 16)), 0) for w, n in zip(words, numbers, strict=True))
        pointers = zip(rest[end + 1 :: 4], rest[end + 2 :: 4], strict=False)
        above = tuple(place for symbol, place in pointers if symbol in ("@", "@i"))
        synsets[offset] = _Synset(tuple(word.replace("_", " ") for word in words), found, above, gloss)
    return synsets


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, but WordNet is needed; {CURE}.")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]
