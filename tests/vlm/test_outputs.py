"""One run at a time has a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from corda_vlm import outputs
from corda_vlm.outputs import locked

HOLDER = """
import sys, time
from pathlib import Path
from corda_vlm.outputs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LOCK_WAIT", 0.1)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match="a is in use by another run; wait"), locked(tmp_path / "a"):
        pass
    with locked(tmp_path / "b"):
        pass
    holder.kill()
    holder.communicate()
    (tmp_path / "a" / ".partial-1").mkdir()
    (tmp_path / "a" / "run" / ".partial-2").mkdir(parents=True)
    with locked(tmp_path / "a"):  # a lock goes with its process; what is written below it may be another's
        assert [left.name for left in (tmp_path / "a").rglob(".partial-*")] == [".partial-2"]
