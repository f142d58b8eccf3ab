"""Several processes capture documents of their own; together they hold the rows of one, and they end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_3.chat_format import ChatFormat
from tests.tiny import byte_tokenizer, tiny_model, write_tiny_checkpoint
from train.capture import capture, summarise
from train.errors import TrainError
from train.reader import open_source
from train.shards import check_shards, read_manifest, write_json
from train.text import TextPlan

ROOT = Path(__file__).parents[2]
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    file = tmp_path / "t.txt"
    file.write_text("\n<|endoftext|>\n".join(f"{n} cats sat " * n for n in range(1, 16)))
    return file


def run(text: Path, out: Path, rank: int, ranks: int, tokens: int = 10_000) -> int:
    return capture(
        tiny_model(), byte_tokenizer(), [text], out, [HOOK], tokens, plan=TextPlan(context=40), batch_tokens=100,
        shard_bytes=64 * 150, rank=rank, ranks=ranks,
    ).tokens  # fmt: skip


def places(folder: Path) -> set[tuple[int, int, int]]:
    """(document, position, token) of every row."""
    found: set[tuple[int, int, int]] = set()
    for entry in read_manifest(folder)["shards"]:
        shard = load_file(folder / entry["name"])
        found |= set(zip(*(shard[name].tolist() for name in ("documents", "positions", "tokens")), strict=True))
    return found


def test_the_shares_of_two_are_the_rows_of_one(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "one", 0, 1)
    for rank in (1, 0):
        run(text, tmp_path / "two", rank, 2)
    manifest = read_manifest(tmp_path / "two")
    assert manifest["done"] and {entry["name"].partition("/")[0] for entry in manifest["shards"]} == {
        "rank-00",
        "rank-01",
    }
    check_shards(tmp_path / "two", manifest, hashes=True)
    assert places(tmp_path / "two") == places(tmp_path / "one")
    for rank in (0, 1):
        assert {document % 2 for document, _, _ in places(tmp_path / "two" / f"rank-{rank:02}")} == {rank}
    one, two = open_source(tmp_path / "one", 0), open_source(tmp_path / "two", 0)
    assert one.rows == two.rows == summarise(tmp_path / "two", [HOOK]).tokens
    sums = [source.batch(0, source.rows).double().sum(0) for source in (one, two)]
    torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-2)


def test_a_process_that_begins_late_takes_the_day_of_the_first(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, day in ((0, "01 May 2031"), (1, "02 May 2031")):
        monkeypatch.setattr("llama_3.chat_format._today", lambda day=day: day)
        chat = ChatFormat(byte_tokenizer(), "llama-3.2")
        capture(tiny_model(), byte_tokenizer(), [text], tmp_path / "a", [HOOK], 500, chat=chat, rank=rank, ranks=2)
    assert read_manifest(tmp_path / "a")["chat_format"] == "llama-3.2 of 01 May 2031"


def test_rows_are_shared_out_and_another_number_of_processes_is_another_capture(text: Path, tmp_path: Path) -> None:
    assert [run(text, tmp_path / "a", rank, 3, tokens=100) for rank in range(3)] == [34, 33, 33]
    assert summarise(tmp_path / "a", [HOOK]).tokens == 100
    with pytest.raises(TrainError, match="a capture with ranks = 3, not 2"):
        run(text, tmp_path / "a", 0, 2, tokens=100)
    with pytest.raises(TrainError, match="a capture with ranks = 3, not None"):
        run(text, tmp_path / "a", 0, 1, tokens=100)
    manifest = json.loads((tmp_path / "a" / "rank-01" / "manifest.json").read_text())
    write_json(tmp_path / "a" / "rank-01" / "manifest.json", manifest | {"dtype": "bfloat16"})
    with pytest.raises(TrainError, match="rank-01 holds another capture than the rest"):
        read_manifest(tmp_path / "a")
    (tmp_path / "a" / "rank-02" / "manifest.json").unlink()
    write_json(tmp_path / "a" / "rank-01" / "manifest.json", manifest)
    with pytest.raises(TrainError, match="rank-02 holds no activations"):
        read_manifest(tmp_path / "a")


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "steer"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STEER_HOME": str(folder / "home")}
    return subprocess.Popen(
        [*command, *arguments], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_is_killed_the_other_ends_with_one_sentence_and_all_go_on(killed: int, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"{n} cats sat " * 60 for n in range(160)))
    ask = ["capture", "t.txt", "--model", "model", "--device", "cpu", "--hook", HOOK, "--context", "40"]
    ask += ["--batch-tokens", "200", "--shard-mb", "1", "--out", "a", "--json"]
    first = tmp_path / "a" / f"rank-0{1 - killed}" / "000000.safetensors"
    with torchrun(tmp_path, *ask) as process:
        until = time.monotonic() + 60
        while not first.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        ranks = {}
        for child in children(process.pid):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks.update({int(entry[5:]): child for entry in environment if entry.startswith(b"RANK=")})
        os.kill(ranks[killed], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode and told == [
        "error: another process of this capture is gone, so all end; what is listed is kept"
    ]
    if killed:
        return
    with torchrun(tmp_path, *ask) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    last = json.loads(out.splitlines()[-1])
    manifest = read_manifest(tmp_path / "a")
    check_shards(tmp_path / "a", manifest, hashes=True)
    assert last["tokens"] == sum(shard["rows"] for shard in manifest["shards"]) > 80_000


def test_what_stops_one_process_is_told_by_the_first(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"{n} cats sat " * 60 for n in range(10)))
    broken = tmp_path / "a" / "rank-01"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    ask = ["capture", "t.txt", "--model", "model", "--device", "cpu", "--hook", HOOK, "--out", "a"]
    with torchrun(tmp_path, *ask) as process:
        _, err = process.communicate(timeout=60)
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode and len(told) == 1
    assert told[0].startswith("error: process 1 of this capture stopped: a/rank-01/manifest.json is not readable JSON")
