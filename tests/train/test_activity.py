"""Snapshots of silence: what comes back, births and deaths against a loop, a resume, files that are damaged."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.activity import LONGEST, ActivityLog, Snapshot, changes, read_activity, silence_histogram
from train.errors import TrainError


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    log = ActivityLog(tmp_path / "activity")
    silent_F = torch.tensor([0, 1, 2**40, LONGEST, 12_345])
    fired_F = torch.tensor([0, 1, 10, 1_000_000, 7])
    log.add(5, 5 * 2**32, silent_F, fired_F)
    (shot,) = read_activity(tmp_path / "activity")
    assert (shot.step, shot.tokens) == (5, 5 * 2**32)
    assert shot.silent_F.tolist() == [0, 1, LONGEST, LONGEST, 12_345]
    assert shot.fired_F[:2].tolist() == [0, 1]
    torch.testing.assert_close(shot.fired_F.double(), fired_F.double(), rtol=0.1, atol=0)


def test_a_million_latents_take_five_bytes_each(tmp_path: Path) -> None:
    silent_F = torch.arange(2**20)
    ActivityLog(tmp_path).add(1, 1, silent_F, silent_F)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 5 * 2**20 + 1000


def test_a_resumed_run_writes_its_steps_again_and_drops_later_ones(tmp_path: Path) -> None:
    log = ActivityLog(tmp_path)
    for step in (10, 20, 30, 40):
        log.add(step, 100 * step, torch.full((3,), step), torch.zeros(3, dtype=torch.int64))
    log.add(20, 2000, torch.tensor([7, 8, 9]), torch.ones(3, dtype=torch.int64))
    shots = list(read_activity(tmp_path))
    assert [shot.step for shot in shots] == [10, 20]
    assert shots[1].silent_F.tolist() == [7, 8, 9]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, zeros = ActivityLog(tmp_path), torch.zeros(3, dtype=torch.int64)
    log.add(10, 10, zeros, zeros)
    log.add(20, 20, zeros, zeros)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        log.add(10, 10, zeros + 1, zeros)
    assert [(shot.step, shot.silent_F.tolist()) for shot in read_activity(tmp_path)] == [(10, [0] * 3), (20, [0] * 3)]


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), max_size=6), st.integers(1, 9))
def test_births_and_deaths_are_those_of_a_loop(silent: list[list[int]], dead_after: int) -> None:
    shots = [Snapshot(i, 10 * i, torch.tensor(row).int(), torch.zeros(4)) for i, row in enumerate(silent)]
    found = list(changes(iter(shots), dead_after))
    alive = [True] * 4
    for change, row in zip(found, silent, strict=True):
        births = deaths = 0
        for latent, tokens in enumerate(row):
            lives = tokens < dead_after
            births += lives and not alive[latent]
            deaths += alive[latent] and not lives
            alive[latent] = lives
        assert (change.births, change.deaths, change.dead) == (births, deaths, alive.count(False))


def test_a_threshold_beyond_what_is_counted_is_that_of_the_longest_silence(tmp_path: Path) -> None:
    ActivityLog(tmp_path).add(1, 1, torch.tensor([2**35, 5]), torch.zeros(2, dtype=torch.int64))
    (change,) = changes(read_activity(tmp_path), 2**33)
    assert change.dead == 1


def test_silence_falls_into_octaves() -> None:
    silent_F = torch.tensor([0, 1, 2, 3, 4, 7, 8, 2**31 - 1])
    assert (8 * silence_histogram(silent_F, 4)).tolist() == [1, 1, 2, 2, 2]


def test_no_folder_holds_no_snapshot(tmp_path: Path) -> None:
    assert list(read_activity(tmp_path / "none")) == []


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    zeros = torch.zeros(3, dtype=torch.int64)
    ActivityLog(tmp_path).add(1, 1, zeros, zeros)
    whole = (tmp_path / "000000001.safetensors").read_bytes()
    (tmp_path / "000000002.safetensors").write_bytes(whole[:-2])
    with pytest.raises(TrainError, match=r"000000002\.safetensors is damaged"):
        list(read_activity(tmp_path))
    ActivityLog(tmp_path).add(2, 2, zeros[:2], zeros[:2])
    with pytest.raises(TrainError, match="those before 3"):
        list(read_activity(tmp_path))
