"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from corda_core.files import replacing_in, write_whole


def test_files_are_replaced_together_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "other").write_text("kept")
    with replacing_in(tmp_path) as fresh:
        (fresh / "a").write_text("new")
        (fresh / "b").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "new", "b": "new", "other": "kept"}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def write_half() -> None:
        with replacing_in(tmp_path) as fresh:
            (fresh / "a").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "old"}


def test_one_file_is_written_into_a_new_folder(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "a", b"data")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a"]
    assert (tmp_path / "new" / "a").read_bytes() == b"data"
