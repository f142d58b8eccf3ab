"""Checkpoints of several processes: whatever is killed when, the newest step that all have can be read."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.train.thread_team import play
from train.checkpoints import Checkpoints
from train.distributed import Team
from train.errors import TrainError


def kept(folder: Path, team: Team) -> Checkpoints:
    return Checkpoints(folder, "config", team)


def test_a_first_process_that_cannot_write_leaves_the_slices_of_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(team: Team, step: int) -> None:
        kept(tmp_path, team).save(step, {"x": torch.full((2,), float(step + team.rank))}, {"n": step}, 1, 0)

    play("latents", lambda team: save(team, 10))

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        if ".1." not in file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoints.save_file", full)
        with pytest.raises((TrainError, threading.BrokenBarrierError)):
            play("latents", lambda team: save(team, 20))
    found = play("latents", lambda team: kept(tmp_path, team).newest())
    for rank, saved in enumerate(found):
        assert saved is not None and saved[0] == saved[2]["n"] == 10
        assert saved[1]["x"].tolist() == [10.0 + rank] * 2


def test_a_process_that_does_not_see_the_folder_ends_all_in_one_sentence(tmp_path: Path) -> None:
    kept(tmp_path / "0", Team()).save(10, {"x": torch.zeros(1)}, {}, 2, 0)

    def look(team: Team) -> str:
        with pytest.raises(TrainError) as caught:
            kept(tmp_path / str(team.rank), team).newest()
        return str(caught.value)

    first, second = play("data", look)
    assert "step 10 is damaged in another process" in first and "000000010.safetensors is damaged" in second
