"""Names from configs and files stay text in Markdown, and in the figures beside it."""

import pytest

from corda_eval.records import code, escaped, table


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("kpm_strict, half-way [1, 2] (3)", "kpm_strict, half-way [1, 2] (3)"),
        ("R&D at 3e-4", "R&D at 3e-4"),
        ("a|b", r"a\|b"),
        ("<script>alert(1)</script>", r"\<script>alert(1)\</script>"),
        ("`x` and *y*", r"\`x\` and \*y\*"),
        ("[here](https://evil.example)", r"[here]\(https://evil.example)"),
        ("![](x.png)", r"![]\(x.png)"),
        ("&lt;", r"\&lt;"),
        ("\\|", r"\\\|"),
        ("two\nlines", "two lines"),
    ],
)
def test_texts_are_shown_as_they_are(text: str, markdown: str) -> None:
    assert escaped(text) == markdown


def test_code_holds_ticks() -> None:
    assert (code("lora"), code("a`b"), code("``")) == ("`lora`", "`` a`b ``", "``` `` ```")


def test_a_cell_is_one_cell() -> None:
    assert table(["arm", "gain|loss"], [["a|b", "1"]]) == [r"| arm | gain\|loss |", "|---|---|", r"| a\|b | 1 |", ""]
