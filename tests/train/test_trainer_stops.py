"""Runs that are killed, told to stop, or run out of disk, and end in the bits of an unbroken one; sweeps; processes."""

import errno
import hashlib
import json
import os
import random
import signal
import socket
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae.checkpoint import load_sae
from tests.train.known_rows import small, write_rows
from train.config import TrainConfig, write_run
from train.distributed import join_team
from train.errors import TrainError
from train.inputs import open_rows
from train.lock import only_process
from train.metrics import append_metrics, read_metrics, tell
from train.signals import StoppedError
from train.sweep import member_name, parse_sweep, search_rate, sweep
from train.trainer import Trainer, train

TIMED = ("tokens_per_second", "loader_wait")
"""Not the same in two runs."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


def hashes(run: Path) -> dict[str, str]:
    """Of the SAE and the last checkpoint's tensors, and of the metrics without what is timed."""
    files = [*(run / "sae").iterdir(), max((run / "checkpoints").glob("*.safetensors"))]
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    kept = [
        {name: value for name, value in entry.items() if name not in TIMED}
        for entry in read_metrics(run / "metrics.jsonl")
    ]
    return found | {"metrics": json.dumps(kept)}


def interrupt(step: int) -> Any:
    def kill(entry: dict[str, Any]) -> None:
        if entry["step"] == step:
            raise KeyboardInterrupt

    return kill


RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"ema": 0.9, "clip": 0.05, "k_anneal": 8, "k_anneal_share": 0.8},
    "batchtopk": {"arch": "batchtopk", "accumulate": 2, "scale": "unit_norm", "prefixes": (16, 64)},
    "steered": {"arch": "relu", "l0_target": 4.0, "sparsity_warmup": 0.5},
    "jumprelu": {"arch": "jumprelu", "scale": "none", "center": "median"},
    "resampled": {"revival": "resample", "dead_after": 300, "resample_every": 700, "k": 1},
    "between entries": {"checkpoint_every": 9, "evaluate_every": 12},
    "patient": {"held_out": 0.2, "early_stop": 3, "log_every": 7},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_resumes_to_the_same_bits(rows: Path, tmp_path: Path, name: str) -> None:
    config = small(**RECIPES[name])
    summary = train(rows, tmp_path / "whole", config, threads=2)
    with pytest.raises(KeyboardInterrupt):
        train(rows, tmp_path / "cut", config, interrupt(30 if name == "patient" else 25), threads=1)
    assert not (tmp_path / "cut" / "sae").exists()
    torch.rand(7)
    assert train(rows, tmp_path / "cut", resume=True, threads=2) == summary
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_a_damaged_last_checkpoint_costs_only_the_steps_since_the_one_before(rows: Path, tmp_path: Path) -> None:
    train(rows, tmp_path / "whole", small(), threads=1)
    with pytest.raises(KeyboardInterrupt):
        train(rows, tmp_path / "cut", small(), interrupt(25), threads=1)
    files = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    files[-1].write_bytes(files[-1].read_bytes()[:1000])
    train(rows, tmp_path / "cut", resume=True, threads=1)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(rows, tmp_path / "lost", small(), interrupt(25), threads=1)
    for file in (tmp_path / "lost" / "checkpoints").iterdir():
        file.write_bytes(b"x" * 100)
    with pytest.raises(TrainError, match=r"checkpoint .* is damaged"):
        train(rows, tmp_path / "lost", resume=True)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "control"])
def test_a_run_that_is_told_to_stop_saves_itself_and_goes_on(rows: Path, tmp_path: Path, how: str) -> None:
    train(rows, tmp_path / "whole", small(), threads=1)
    out, before = tmp_path / "cut", signal.getsignal(signal.SIGINT)

    def ask(entry: dict[str, Any]) -> None:
        if entry["step"] == 15:
            tell(out, "stop") if how == "control" else os.kill(os.getpid(), getattr(signal, how))

    with pytest.raises(StoppedError, match="stopped at step 15 of 40, with a checkpoint"):
        train(rows, out, small(), ask, threads=1)
    assert (out / "checkpoints" / "000000015.safetensors").exists() and not (out / "control").exists()
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(TrainError, match=f"no process trains in {out}"):
        tell(out, "stop")
    (out / "control").write_text("stop\n")  # came too late for the last process, and must not stop the next one
    train(rows, out, resume=True, threads=1)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_checkpoint_on_request(rows: Path, tmp_path: Path) -> None:
    def ask(entry: dict[str, Any]) -> None:
        if entry["step"] == 15:
            tell(tmp_path, "checkpoint")
        if entry["step"] == 20:
            assert (tmp_path / "checkpoints" / "000000015.safetensors").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(rows, tmp_path, small(), ask, threads=1)


def test_a_checkpoint_is_due_after_some_time_too(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(entry: dict[str, Any]) -> None:
        if entry["step"] == 5:
            monkeypatch.setattr("train.trainer.SAVE_SECONDS", 0.0)
        if entry["step"] == 15:
            kept = sorted(int(file.stem) for file in (tmp_path / "checkpoints").iterdir())
            assert kept == [13, 14]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(rows, tmp_path, small(), look, threads=1)


def test_a_disk_that_will_be_full_is_noticed_before_the_first_step(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("train.cost.shutil.disk_usage", lambda path: SimpleNamespace(free=20_000))
        with pytest.raises(TrainError, match=r"would take .* of disk, and 20.0 kB are free") as caught:
            train(rows, tmp_path, small(), threads=1)
    assert "keep=1" in str(caught.value.hint) and not list(tmp_path.glob("checkpoints/*"))
    train(rows, tmp_path, small(keep=1), threads=1)  # as the hint says
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert 20_000 < written < 1.1 * Trainer(rows, tmp_path, small(keep=1)).disk_bytes() + 50_000


def test_a_full_disk_loses_nothing(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(rows, tmp_path / "whole", small(), threads=1)
    calls = 0

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file, metadata)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoints.save_file", full)
        with pytest.raises(TrainError, match=r"checkpoint of step 30 could not be written .*No space left") as caught:
            train(rows, out, small(), threads=1)
    assert "--resume" in str(caught.value.hint)
    assert sorted(file.name for file in (out / "checkpoints").iterdir()) == [
        f"0000000{n}.safetensors" for n in (10, 20)
    ]
    train(rows, out, resume=True, threads=1)
    assert hashes(out) == hashes(tmp_path / "whole")


PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["train.trainer", __name__])


def run_alone(rows: Path, out: Path) -> None:
    """What a process that is killed does."""
    torch.set_num_threads(1)
    train(rows, out, resume=True, threads=1)


def test_a_second_trainer_in_the_folder_is_refused_and_a_killed_one_is_none(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("1 on another-machine\n")  # left behind
    caught: list[TrainError] = []

    def second(entry: dict[str, Any]) -> None:
        if entry["step"] == 15:
            before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
            with pytest.raises(TrainError, match=rf"process {os.getpid()} on .* trains in {tmp_path} already") as error:
                train(rows, tmp_path, resume=True, threads=1)
            caught.append(error.value)
            assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before

    summary = train(rows, tmp_path, small(), second, threads=1)
    assert caught and "steer train stop" in str(caught[0].hint)
    assert train(rows, tmp_path, resume=True) == summary and (tmp_path / "lock").read_text() == ""


def test_a_file_system_without_locks_goes_by_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("train.lock.fcntl.flock", none)
    file = tmp_path / "lock"
    for holder in (f"{os.getppid()} on {socket.gethostname()}", f"1 on {socket.gethostname()}"):
        file.write_text(holder)
        with pytest.raises(TrainError, match=f"process {holder} trains"), only_process(tmp_path):
            pass
    process = PROCESSES.Process(target=int)
    process.start()
    process.join()
    for holder in (f"{process.pid} on {socket.gethostname()}", "1 on elsewhere", "rubbish", ""):
        file.write_text(holder)
        with only_process(tmp_path):
            assert file.read_text() == f"{os.getpid()} on {socket.gethostname()}\n"


def test_kill_9_at_random_moments_leaves_the_hashes_of_an_unbroken_run(tmp_path: Path) -> None:
    rows, out, times = write_rows(tmp_path / "rows"), tmp_path / "cut", int(os.environ.get("STEER_KILLS", "5"))
    steps = 120 * times
    config = small(tokens=128 * steps, checkpoint_every=17, evaluate_every=50, held_out=0.1)
    config = config.resolve(16, open_rows(rows, config).rows)
    train(rows, tmp_path / "whole", config, threads=1)
    digest = open_rows(rows, config).digest
    out.mkdir()
    write_run(out, config, {"activations": str(rows), "activations_sha256": digest})
    rng = random.Random(7)

    def reached() -> int:
        return max((int(entry["step"]) for entry in read_metrics(out / "metrics.jsonl")), default=0)

    for kill in range(times):
        process = PROCESSES.Process(target=run_alone, args=(rows, out))
        process.start()
        until = time.monotonic() + 60
        while reached() < 120 * kill and process.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(rng.random() / 4)
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert reached() == steps
    last = PROCESSES.Process(target=run_alone, args=(rows, out))
    last.start()
    last.join()
    assert last.exitcode == 0 and hashes(out) == hashes(tmp_path / "whole")


def test_members_of_a_sweep_are_the_runs_they_would_be_alone(rows: Path, tmp_path: Path) -> None:
    members = parse_sweep(["k=2,4", "scale=norm"])
    assert [member_name(values) for values in members] == ["k-2_scale-norm", "k-4_scale-norm"]
    source = open_rows(rows, small())
    seen: dict[str, list[int]] = {}

    def watch(name: str) -> Any:
        return lambda entry: seen.setdefault(name, []).append(entry["step"])

    found = sweep(source, tmp_path / "sweep", small(), members, watch)
    assert set(found) == set(seen) and all(steps == list(range(5, 41, 5)) for steps in seen.values())
    train(rows, tmp_path / "alone", small(k=4, scale="norm"), threads=1)
    assert hashes(tmp_path / "sweep" / "k-4_scale-norm") == hashes(tmp_path / "alone")
    with pytest.raises(TrainError, match="already holds a run"):
        sweep(source, tmp_path / "sweep", small(), members)
    assert sweep(source, tmp_path / "sweep", small(), members, resume=True) == found


def test_a_sweep_that_was_killed_between_two_checkpoints_catches_up(rows: Path, tmp_path: Path) -> None:
    members = [{"k": 2}, {"k": 4}]
    whole = sweep(open_rows(rows, small()), tmp_path / "whole", small(), members)
    with pytest.raises(KeyboardInterrupt):
        sweep(open_rows(rows, small()), tmp_path / "cut", small(), members, lambda name: interrupt(25))
    (tmp_path / "cut" / "k-2" / "checkpoints" / "000000020.safetensors").unlink()
    assert sweep(open_rows(rows, small()), tmp_path / "cut", small(), members, resume=True) == whole
    for name in ("k-2", "k-4"):
        assert hashes(tmp_path / "cut" / name) == hashes(tmp_path / "whole" / name)


def test_a_rate_that_is_too_high_is_left_out_and_the_best_one_taken(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(held_out=0.1, tokens=128 * 300, unit_norm=False, project=False)
    monkeypatch.setattr("train.sweep.SHORT_STEPS", 100)
    best, table = search_rate(open_rows(rows, config), tmp_path, config, [1e-6, 4e-3, 1e30])
    assert best == 4e-3 and isinstance(table[1e30], TrainError) and "no longer a number" in str(table[1e30])
    assert load_sae(tmp_path / "lr-0.004" / "sae").manifest["training"]["tokens"] == 128 * 100
    monkeypatch.setattr("train.sweep.SHORT_STEPS", 20)
    best, table = search_rate(open_rows(rows, config), tmp_path / "auto", config, [])
    assert len(table) == 5 and min(table) < best


@pytest.mark.parametrize("at", ["an evaluation", "the end"])
def test_a_member_whose_weights_are_no_numbers_when_it_is_measured_is_left_out(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    config = small(held_out=0.1, evaluate_every=20 if at == "an evaluation" else 1000)
    whole, step_at = Trainer.advance, 20 if at == "an evaluation" else 40

    def spoilt(trainer: Trainer, x_BD: torch.Tensor) -> None:
        whole(trainer, x_BD)
        if trainer.config.k == 4 and trainer.step == step_at:
            trainer.state.weights["W_dec"].fill_(torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", spoilt)
        source = open_rows(rows, config)
        found = sweep(source, tmp_path, config, [{"k": 4}, {"k": 2}])
        with pytest.raises(TrainError, match="cannot be measured"):
            train(rows, tmp_path / "alone", replace(config, k=4), threads=1)
    assert isinstance(found["k-4"], TrainError) and "cannot be measured" in str(found["k-4"])
    assert not isinstance(found["k-2"], TrainError) and (tmp_path / "k-2" / "sae" / "cfg.json").is_file()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["k"], "'k' is not of the form"),
        (["k=2,3", "k=4"], "with a key of its own"),
        (["batch=128,256"], "batch cannot be swept: all members read the same rows"),
        (["prefixes=8,16"], "prefixes cannot be swept: its values have commas"),
        (["kk=1"], "no setting 'kk'"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(texts: list[str], words: str) -> None:
    with pytest.raises(TrainError, match=words):
        parse_sweep(texts)
    assert parse_sweep([]) == []


def run_rank(rank: int, kind: Any, rows: Path, out: Path, config: TrainConfig | None, port: int) -> None:
    """What one of two processes does."""
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    team = join_team(kind)
    train(rows, out, config, resume=True, threads=1, team=team)
    team.leave()


@pytest.mark.parametrize("kind", ["data", "latents"])
def test_two_processes_train_the_sae_of_one_and_resume(rows: Path, tmp_path: Path, kind: str) -> None:
    config = small(dtype="float64", tokens=128 * 60, held_out=0.1, accumulate=2)
    alone = train(rows, tmp_path / "alone", config, threads=1)
    out = tmp_path / kind

    def both(asked: TrainConfig | None) -> list[int | None]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [PROCESSES.Process(target=run_rank, args=(rank, kind, rows, out, asked, port)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]

    assert both(config) == [0, 0]
    together = load_sae(out / "sae").manifest["metrics"]
    assert together["fvu"] == pytest.approx(alone.fvu, rel=1e-6) and together["l0"] == pytest.approx(alone.l0)
    curves = [[entry["loss"] for entry in read_metrics(run / "metrics.jsonl")] for run in (tmp_path / "alone", out)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-9) and len(curves[0]) == 12
    kept = {file.name for file in (out / "checkpoints").iterdir()}
    assert len(kept) == (4 if kind == "latents" else 2)
    first = load_weights(out)
    (out / "sae" / "cfg.json").unlink()
    for file in (out / "checkpoints").glob("000000060*"):
        file.unlink()
    assert both(None) == [0, 0] and load_weights(out) == first
    if kind == "latents":
        (out / "sae" / "cfg.json").unlink()
        with pytest.raises(TrainError, match="spread over 2 processes, not 1"):
            train(rows, out, resume=True)


def load_weights(run: Path) -> str:
    return hashlib.sha256((run / "sae" / "sae.safetensors").read_bytes()).hexdigest()


def test_what_is_logged_elsewhere(rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from train.sinks import Sinks

    for steps in ((5, 10), (10, 15)):  # killed after 10, which is made again
        with Sinks(tmp_path, TrainConfig(), tensorboard=True, first=steps[0]) as sinks:
            for step in steps:
                sinks.write({"step": step, "fvu": 1 / step, "losses": {"aux": 2.0}, "density": {"never": 1}})
        time.sleep(1.1 if steps[0] == 5 else 0)  # the files are read in the order of their seconds
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"fvu", "losses/aux"}
    assert [(event.step, event.value) for event in board.Scalars("fvu")] == [
        (5, pytest.approx(0.2)),
        (10, pytest.approx(0.1)),
        (15, pytest.approx(1 / 15)),
    ]


def test_a_trial_leaves_nothing_behind_and_says_what_a_run_takes(rows: Path, tmp_path: Path) -> None:
    from train.trial import training_cost

    config = small(tokens=10**7)
    cost = training_cost(open_rows(rows, config), config, price_per_hour=3.0, seconds=0.3)
    assert cost.tokens == 10**7 and cost.hours == pytest.approx(10**7 / cost.tokens_per_second / 3600)
    assert cost.money == pytest.approx(3 * cost.hours) and cost.memory_bytes > 1 << 20
    weights = 2 * 64 * 16 * 4
    assert 3 * 3 * weights < cost.disk_bytes < 30 * weights + 5 * 64 * 10**7 / 1280 + 10**6
    append_metrics(tmp_path / "m", {})  # the folder of this test is the only one written to
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
