"""Lines of JSON are whole or named, and names from configs and files stay text in Markdown."""

from pathlib import Path

import pytest

from corda_eval.records import add_line, code, escaped, read_lines, read_sealed, table, timed_log, write_json, write_sealed


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


def test_lines_are_added_and_read(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "lines.jsonl"
    assert read_lines(path) == []
    for number in range(2):
        add_line(path, {"run": number, "name": "α"})
    assert read_lines(path) == [{"run": 0, "name": "α"}, {"run": 1, "name": "α"}]
    with path.open("a") as file:
        file.write('{"run": 2')
    with pytest.raises(ValueError, match="lines.jsonl, line 3 is not whole JSON"):
        read_lines(path)


def test_a_log_begins_anew_and_tells_the_time(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for _ in range(2):
        timed_log(path)(step=1, loss=0.5)
    assert read_lines(path) == [{"seconds": 0, "step": 1, "loss": 0.5}]


def test_numbers_of_a_sealed_object_are_one_line_and_texts_as_they_are(tmp_path: Path) -> None:
    value = {"losses": [1, -2.5, 1e-9], "pairs": [[0, 1.5]], "text": "[\n 1,\n 2\n]", "names": ["1, 2"], "none": []}
    write_sealed(tmp_path / "value.json", value)
    assert '"losses": [1,-2.5,1e-09],\n' in (tmp_path / "value.json").read_text()
    assert read_sealed(tmp_path / "value.json", "remove it") == value


def test_json_has_no_infinity(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", {"loss": 1.5})
    assert (tmp_path / "value.json").read_text() == '{\n "loss": 1.5\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", float("inf"))
