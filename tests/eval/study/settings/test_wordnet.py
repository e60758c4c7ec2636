"""WordNet's files are read as they are written, roles share no word, and no choice is better for who has not read the question."""

from collections import Counter
from pathlib import Path

import pytest
from wordnet_files import KINDS, write_wordnet

from corda_eval.study.settings.wordnet import CHOICES, ROLES, Noun, nouns, questions

REAL = Path("/usr/share/wordnet")


def test_a_noun_has_its_commonest_sense_and_all_above_any_sense(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(
        "  1 This is the licence.\n"
        "00000010 03 n 01 entity 0 000 | what there is\n"
        "00000020 03 n 02 tool 0 hand_tool 0 001 @ 00000010 n 0000 | used in work\n"
        "00000030 03 n 01 animal 0 001 @ 00000010 n 0000 | lives\n"
        '00000040 05 n 01 bat 0 002 @ 00000030 n 0000 ~ 00000010 n 0000 | flies at night; "a bat in the belfry"\n'
        "00000050 06 n 01 bat 1 001 @ 00000020 n 0000 | used for hitting a ball\n"
        "00000060 06 n 01 Bath 0 001 @i 00000020 n 0000 | a town\n"
        "00000070 06 n 01 unseen 0 001 @ 00000020 n 0000 | in no text\n"
    )
    (tmp_path / "cntlist.rev").write_text(
        "bat%1:05:00:: 2 3\nbat%1:06:01:: 1 9\nbat%2:05:00:: 1 90\nbath%1:06:00:: 1 5\ntool%1:03:00:: 1 1\n"
    )
    found = {noun.word: noun for role in ROLES for noun in nouns(tmp_path, role)}
    assert found == {
        "bat": Noun("bat", "used for hitting a ball", "tool", frozenset({"bat", "tool", "hand tool", "animal", "entity"})),
        "tool": Noun("tool", "used in work", "entity", frozenset({"tool", "hand tool", "entity"})),
    }
    (tmp_path / "cntlist.rev").unlink()
    with pytest.raises(FileNotFoundError, match=r"cntlist.rev does not exist, but WordNet is needed; run apt-get install wordnet-base"):
        nouns(tmp_path, "train")


def check(asked: list[Noun], kinds: set[str], count: int) -> None:
    result = questions(asked, kinds, count)
    assert result == questions(asked, kinds, count)
    assert len({question.text for question in result}) == count
    by_text = {f"{noun.word} is a kind of": noun for noun in asked}
    for question in result:
        noun = by_text[question.text.partition(" ")[2]]
        words = [choice.removeprefix(" ") for choice in question.choices]
        assert words[0] == noun.kind
        assert len(set(words)) == CHOICES
        assert not set(words[1:]) & noun.above
        assert set(words) <= kinds
    right, all_choices = (Counter(choice for question in result for choice in question.choices[:some]) for some in (1, CHOICES))
    blind = sum(question.choices[0] == max(question.choices, key=lambda choice: right[choice]) for question in result) / count
    assert blind < 0.6
    assert right.keys() <= all_choices.keys()


def test_wrong_choices_are_right_elsewhere_and_wrong_here(tmp_path: Path) -> None:
    write_wordnet(tmp_path)
    asked = nouns(tmp_path, "asked")
    words = [{noun.word for noun in nouns(tmp_path, role)} for role in ROLES]
    assert len(set.union(*words)) == sum(map(len, words))
    check(asked, set(KINDS), 60)
    with pytest.raises(ValueError, match=r"WordNet gives \d+ questions, not 5000; ask for fewer"):
        questions(asked, set(KINDS), 5000)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs Debian's wordnet-base")
def test_the_real_wordnet_has_enough() -> None:
    asked = nouns(REAL, "asked")
    assert len(asked) > 2500
    assert len(nouns(REAL, "train")) > 2500
    assert "fish" in {noun.kind for noun in asked}
