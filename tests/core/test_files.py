"""Files appear whole or not at all, and damaged ones are told by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corda_core.files import read_json, read_tensors, replacing_in, write_tensors, write_whole
from corda_eval.records import read_sealed, write_sealed
from corda_vlm.yaml import read_yaml


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


@pytest.mark.parametrize(
    ("content", "reader", "sentence"),
    [
        (b'{"a": 1', read_json, "is not whole JSON"),
        (b'{"a": "\xff"}', read_json, "is no text in UTF-8"),
        (b"a: \xff", read_yaml, "is no text in UTF-8"),
        (b"[" * 100_000, read_json, "is not whole JSON"),
        (b"a: [1", read_yaml, "is no YAML"),
        (b"day: 2026-02-30", read_yaml, "is no YAML"),
        (b"a: !!python/object/apply:os.getcwd []", read_yaml, "is no YAML"),
        (b"a: \x00", read_yaml, "is no YAML"),
        (b"a: {b: 1, b: 2}", read_yaml, "is no YAML: the key 'b' stands twice"),
        (b"", read_tensors, "is damaged or no safetensors file"),
        (b"\xff" * 100, read_tensors, "is damaged or no safetensors file"),
    ],
)
def test_readers_name_the_file(content: bytes, reader: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} {sentence}"):
        reader(path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is a folder"):
        reader(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'none'} does not exist"):
        reader(tmp_path / "none")


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "rows.json").write_text('{"a": "ä"}', encoding=encoding)
        assert read_json(tmp_path / "rows.json") == {"a": "ä"}


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    about = {name: f'{name}, "quoted", ä, \n' for name in "abcdefgh"}
    for number in range(4):
        write_tensors({"x": torch.arange(6.0)}, tmp_path / str(number), about)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert read_tensors(tmp_path / "0")[1].items() > about.items()


def test_tensors_may_be_read_by_whoever_may_read_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_every_flipped_bit_of_a_file_of_tensors_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16), "none": torch.zeros(0, 3)}
    write_tensors(tensors, path, {"about": "these"})
    loaded, metadata = read_tensors(path)
    assert metadata["about"] == "these"
    assert all(torch.equal(value, tensors[name]) for name, value in loaded.items())
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            again, about = read_tensors(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # a bit of the digest's own name: readers of files that must carry one refuse it
            assert "sha256" not in about or all(torch.equal(value, tensors[name]) for name, value in again.items())


def test_sealed_json_comes_back_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "held.json"
    write_sealed(path, {"score": 0.1, "names": ["ä", None], "1": {"b": 1, "a": 2}})
    assert read_sealed(path, "remove it") == {"score": 0.1, "names": ["ä", None], "1": {"b": 1, "a": 2}}
    path.write_text(path.read_text().replace("0.1", "0.9"))
    with pytest.raises(ValueError, match="held.json is damaged: .*; remove it"):
        read_sealed(path, "remove it")
    path.write_text("[]")
    with pytest.raises(ValueError, match="held.json is not a JSON object"):
        read_sealed(path, "remove it")
    path.write_text('{"score": 1}')
    with pytest.warns(UserWarning, match="What corda-vlm 0.1.0 wrote"):
        assert read_sealed(path, "remove it") == {"score": 1}
