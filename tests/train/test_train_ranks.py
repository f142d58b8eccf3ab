"""`steer train` under torchrun: whichever process dies or fails, a person reads one sentence, and all can go on."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.train.known_rows import write_rows
from tests.train.test_capture_ranks import children, torchrun
from train.metrics import read_metrics

SMALL = ("--latents", "64", "--k", "3", "--batch", "32", "--threads", "1", "--device", "cpu", "--set", "log_every=1")
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(("killed", "shard"), [(0, "data"), (1, "latents")])
def test_a_killed_process_is_one_sentence_and_all_go_on(killed: int, shard: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows")
    ask = ["train", "rows", "--out", "run", *SMALL, "--tokens", "4800", "--shard", shard, "--resume", "--json"]
    ask += ["--checkpoint-every", "10"]
    with torchrun(tmp_path, *ask) as process:
        until = time.monotonic() + 60
        while len(list(read_metrics(tmp_path / "run" / "metrics.jsonl"))) < 25 and time.monotonic() < until:
            time.sleep(0.02)
        ranks = {}
        for child in children(process.pid):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks.update({int(entry[5:]): child for entry in environment if entry.startswith(b"RANK=")})
        os.kill(ranks[killed], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode and len(errors(err)) == 1, err
    assert errors(err)[0].startswith("error: another process of this run is gone") and "--resume" in err
    with torchrun(tmp_path, *ask) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["steps"] == 150


def test_what_stops_the_second_process_is_told_by_the_first(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows")
    (tmp_path / "run" / "checkpoints" / "000000010.1.safetensors" / "in the way").mkdir(parents=True)
    ask = ["train", "rows", "--out", "run", *SMALL, "--tokens", "4800", "--shard", "latents", "--resume"]
    with torchrun(tmp_path, *ask, "--checkpoint-every", "10") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode and len(errors(err)) == 1, err
    assert errors(err)[0].startswith("error: process 1 of this run stopped: the checkpoint of step 10 could not be")
