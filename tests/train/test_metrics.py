"""`metrics.jsonl` survives a kill in the middle of a line; the control file is obeyed once."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.errors import TrainError
from train.lock import only_process
from train.metrics import append_metrics, cut_metrics, obey, read_metrics, tell


def test_entries_come_back_and_a_line_that_was_cut_short_does_not(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert list(read_metrics(file)) == []
    for step in range(5):
        append_metrics(file, {"step": step, "fvu": 0.5})
    with file.open("a") as handle:
        handle.write('{"step": 5, "f')
    assert [entry["step"] for entry in read_metrics(file)] == [0, 1, 2, 3, 4]
    cut_metrics(file, 2)
    append_metrics(file, {"step": 3})
    assert [entry["step"] for entry in read_metrics(file)] == [0, 1, 2, 3]


def test_a_run_is_told_and_obeys_once(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="holds no run"):
        tell(tmp_path, "stop")
    (tmp_path / "config.toml").write_text("")
    assert obey(tmp_path) == set()
    with pytest.raises(TrainError, match="no process trains in"):
        tell(tmp_path, "stop")
    with only_process(tmp_path):
        tell(tmp_path, "checkpoint")
        tell(tmp_path, "stop")
    (tmp_path / "lock").unlink()
    with (tmp_path / "control").open("a") as handle:
        handle.write("dance\n")
    assert obey(tmp_path) == {"checkpoint", "stop"}
    assert obey(tmp_path) == set() and [file.name for file in tmp_path.iterdir()] == ["config.toml"]


def test_none_of_it_imports_torch() -> None:
    code = "import sys, train.config, train.metrics, train.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
