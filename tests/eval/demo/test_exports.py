"""The check of exported adapters reports what the new process found, and its failure."""

from pathlib import Path

import pytest

from corda_eval.demo.exports import check_exports


def test_a_failing_process_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Loading the exported adapters failed"):
        check_exports(tmp_path / "nowhere", [tmp_path])
