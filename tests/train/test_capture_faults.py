"""What ends a capture is one sentence and loses nothing that is listed; the same call goes on to the same bytes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from llama_3.model import Transformer
from llama_3.quantize import quantize_model
from tests.tiny import byte_tokenizer, tiny_model
from train.capture import Job, Progress, batches, capture, capture_cost, fewest_tokens
from train.cost import Cost, duration, estimate, readable, trial
from train.errors import TrainError
from train.shards import Background, check_shards, read_manifest, shard_fault, write_json
from train.text import Row, TextPlan

HOOK = "blocks.0.hook_resid_post"
SIZES = {"plan": TextPlan(context=40), "batch_tokens": 100, "shard_bytes": 64 * 150}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    file = tmp_path / "t.txt"
    file.write_text("\n<|endoftext|>\n".join(f"{n} cats sat " * n for n in range(1, 16)))
    return file


def run(text: Path, out: Path, model: Transformer | None = None, **options: object) -> list[str]:
    """Captures everything; the notices of damage."""
    notices: list[str] = []
    sizes = SIZES | {"on_notice": notices.append} | options
    capture(model or tiny_model(), byte_tokenizer(), [text], out, [HOOK], 10_000, **sizes)  # type: ignore[arg-type]
    return [notice for notice in notices if "of disk more" not in notice]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_killed_at_random_moments_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.train.killing", str(tmp_path), "--kills", "5"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0 and ran.stdout.startswith("5 kills"), ran.stdout + ran.stderr


def test_a_shard_is_what_safetensors_would_have_written(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    for shard in read_manifest(tmp_path / "a")["shards"]:
        file = tmp_path / "a" / shard["name"]
        assert file.read_bytes() == save(load_file(file))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_it_in_one_sentence_and_it_goes_on(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "whole")
    out = tmp_path / "a"
    out.mkdir()
    (out / "000003.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(TrainError, match=r"shard .*000003\.safetensors cannot be written: No space left") as raised:
        run(text, out)
    assert raised.value.hint
    manifest = read_manifest(out)
    assert len(manifest["shards"]) == 3 and not manifest["done"]
    check_shards(out, manifest, hashes=True)
    run(text, out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_for_the_manifest_is_named_too(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    out.mkdir()
    (out / "manifest.json.tmp").symlink_to("/dev/full")
    with pytest.raises(TrainError, match=r"manifest\.json cannot be written: No space left") as raised:
        run(text, out)
    assert raised.value.hint and [file.name for file in out.iterdir()] == ["lock"]


def test_weights_in_fewer_bits_are_another_capture(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    model = tiny_model()
    quantize_model(model, "int8", keep=1)
    with pytest.raises(TrainError, match="dtype = 'float32', not 'float32, int8 from block 1'"):
        run(text, tmp_path / "a", model=model)


def test_the_disk_that_is_needed_is_told_before_anything_runs(text: Path, tmp_path: Path) -> None:
    told: list[str] = []
    for _ in range(2):
        run(text, tmp_path / "a", on_notice=told.append)
    (sentence,) = told
    assert re.search(r"a takes at most [\d.,]+ kB of disk more; .* are free", sentence)


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone", "fewer rows"])
def test_damaged_shards_are_named_and_made_again_alone(damage: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert run(text, out) == []
    before, shards = contents(out), read_manifest(out)["shards"]
    assert len(shards) >= 6
    chosen = [out / shards[number]["name"] for number in (1, 3, len(shards) - 1)]
    for file in chosen:
        whole = file.read_bytes()
        if damage == "flipped":
            file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        elif damage == "shorter":
            file.write_bytes(whole[:-3])
        elif damage == "gone":
            file.unlink()
        else:
            save_file({name: tensor[:-1].contiguous() for name, tensor in load_file(file).items()}, file)
    untouched = {file: file.stat().st_mtime_ns for file in out.iterdir() if file not in chosen and file.name != "lock"}
    ran: list[int] = []
    model = tiny_model()
    model.register_forward_pre_hook(lambda model, tokens: ran.append(1))
    notices = run(text, out, model)
    assert [str(file) in notice for file, notice in zip(chosen, notices, strict=True)] == [True] * 3
    assert contents(out) == before
    del untouched[out / "manifest.json"]
    assert all(file.stat().st_mtime_ns == written for file, written in untouched.items())
    batches = sum(shards[number]["batches"] - shards[number]["first"] for number in (1, 3, len(shards) - 1))
    assert len(ran) <= batches  # and no others; one without a kept token is not run


def test_a_shard_of_other_rows_than_its_entry_says_is_found(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    manifest = read_manifest(tmp_path / "a")
    shard = manifest["shards"][0]
    assert shard_fault(tmp_path / "a", shard, 32, hashes=False) is None
    assert "has rows of shape" in str(shard_fault(tmp_path / "a", shard | {"rows": 9999}, 32, hashes=False))
    before = contents(tmp_path / "a")
    shard["rows"] += 7
    write_json(tmp_path / "a" / "manifest.json", manifest)
    with pytest.raises(TrainError, match=r"000000\.safetensors has rows of shape"):
        check_shards(tmp_path / "a", manifest, hashes=False)
    run(text, tmp_path / "a")
    assert contents(tmp_path / "a") == before


def test_a_last_shard_that_was_cut_at_the_limit_is_made_again_as_short(text: Path, tmp_path: Path) -> None:
    def limited() -> dict[str, bytes]:
        capture(tiny_model(), byte_tokenizer(), [text], tmp_path / "a", [HOOK], 400, **SIZES)  # type: ignore[arg-type]
        return contents(tmp_path / "a")

    before, shards = limited(), read_manifest(tmp_path / "a")["shards"]
    assert sum(shard["rows"] for shard in shards) == 400 and shards[-1]["rows"] < shards[0]["rows"]
    (tmp_path / "a" / shards[-1]["name"]).write_bytes(b"")
    assert limited() == before


def test_a_resumed_capture_with_damage_makes_both_what_is_damaged_and_what_is_missing(
    text: Path, tmp_path: Path
) -> None:
    run(text, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.tokens > 600:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "a", on_progress=stop)
    assert not read_manifest(tmp_path / "a")["done"]
    (tmp_path / "a" / "000000.safetensors").unlink()
    assert len(run(text, tmp_path / "a")) == 1
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_a_capture_made_before_there_were_plans_goes_on(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    before = contents(tmp_path / "a")
    manifest = read_manifest(tmp_path / "a")
    for name in ("text", "keep_special"):
        del manifest[name]
    for shard in manifest["shards"]:
        del shard["first"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_json(tmp_path / "b" / "manifest.json", manifest | {"context": 40})
    (tmp_path / "b" / "000002.safetensors").unlink()
    assert len(run(text, tmp_path / "b")) == 1
    assert {**contents(tmp_path / "b"), "manifest.json": b""} == {**before, "manifest.json": b""}
    write_json(tmp_path / "b" / "manifest.json", manifest | {"context": 41})
    with pytest.raises(TrainError, match="a capture with context = 41, not 40"):
        run(text, tmp_path / "b")


def test_special_tokens_and_the_first_are_kept_when_asked_for(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    run(text, tmp_path / "b", keep_special=True)
    rows, all_rows = (sum(s["rows"] for s in read_manifest(tmp_path / name)["shards"]) for name in "ab")
    shard = load_file(tmp_path / "b" / "000000.safetensors")
    first = shard["positions"] == 0
    assert first.any() and (shard["tokens"][first] == 256).all()
    contexts = sum(
        int((load_file(file)["positions"] == 0).sum()) for file in (tmp_path / "b").glob("*.safetensors")
    )  # fmt: skip
    assert all_rows == rows + contexts


def test_packed_contexts_tell_the_document_of_every_row(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a", plan=TextPlan(unit="packed", context=64))
    shards = [load_file(file) for file in sorted((tmp_path / "a").glob("*.safetensors"))]
    for number, document in enumerate(f"{n} cats sat " * n for n in range(1, 16)):
        found = b"".join(bytes(s["tokens"][s["documents"] == number].tolist()) for s in shards)
        assert set(found) <= set(document.strip().encode()) and (len(found) > 5 or number < 2)


def test_batches_are_alike_in_length_and_their_order_never_changes() -> None:
    rows = [Row(number, 0, [1] * length) for number, length in enumerate((9, 2, 7, 3, 8, 2, 9, 4, 6, 5))]
    cut = list(batches(iter(rows), [], 20))
    # Written down: folders on disk are gone on with in this order.
    assert [batch.documents_B.tolist() for batch in cut] == [[2, 4], [1, 5, 3, 7], [9, 8], [0, 6]]
    assert [batch.lengths for batch in cut] == [[7, 8], [2, 2, 3, 4], [5, 6], [9, 9]]


def test_a_document_begins_at_its_first_token() -> None:
    (batch,) = batches(iter([Row(3, 0, [5] * 6, later=((2, 4), (5, 7))), Row(8, 0, [5] * 6)]), [], 20)
    kept_NT = torch.ones(2, 6).nonzero()
    assert batch.documents_at(kept_NT).tolist() == [3, 3, 4, 4, 4, 7] + [8] * 6


def test_what_is_not_finite_is_refused_and_named(text: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.embedding_VD[ord("1")] = torch.nan
    with pytest.raises(TrainError, match=rf"{HOOK} holds a number that is not finite in document \d+ at position"):
        capture(model, byte_tokenizer(), [text], tmp_path / "a", [HOOK], 500, **SIZES)  # type: ignore[arg-type]


def test_an_empty_folder_and_an_empty_file_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(TrainError, match="nothing holds no text"):
        run(tmp_path / "nothing", tmp_path / "a")
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(TrainError, match=r"e\.txt holds no token"):
        run(tmp_path / "e.txt", tmp_path / "b")


def test_a_disk_that_clearly_does_not_suffice_is_refused_before_anything_runs(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=5000))
    with pytest.raises(TrainError, match=r"a would take 1\d\.\d kB of disk, and 5\.0 kB are free") as raised:
        run(text, tmp_path / "a")
    assert "--max-tokens" in str(raised.value.hint)
    assert not list((tmp_path / "a").glob("*.safetensors"))
    run(text, tmp_path / "b", plan=TextPlan(context=40, dedupe=True))  # which may be a single document
    fewest = fewest_tokens([text])
    assert fewest is not None and 0 < fewest < text.stat().st_size and fewest_tokens(["hf:some/where"]) is None


def test_the_background_raises_what_went_wrong_and_does_nothing_after() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"), Background() as background:
        background.give(lambda: done.append(1))
        background.give(fail)
        background.give(lambda: done.append(2))
    assert done == [1]
    with pytest.raises(KeyboardInterrupt), Background() as background:
        background.give(lambda: done.append(3))
        raise KeyboardInterrupt
    assert done == [1, 3]


def test_the_cost_of_a_capture_is_counted_where_the_text_is_short(text: Path, tmp_path: Path) -> None:
    job = Job(tiny_model(), byte_tokenizer(), [text], TextPlan(context=40), None, batch_tokens=100)
    hooks = [HOOK, "blocks.1.hook_mlp_out"]
    cost = capture_cost(job, hooks, 100_000, seconds=0.2, price_per_hour=2.0, processes=2)
    summary = capture(job.model, job.tokenizer, [text], tmp_path / "a", [HOOK], 100_000, **SIZES)  # type: ignore[arg-type]
    assert cost.tokens == summary.tokens and cost.disk_bytes == 2 * summary.tokens * (2 * 32 + 12)
    assert cost.hours == pytest.approx(cost.tokens / cost.tokens_per_second / 3600) and cost.memory_bytes > 1 << 26
    assert cost.money == pytest.approx(2 * cost.hours)
    assert capture_cost(job, hooks, 50, seconds=0.1).tokens == 50


def test_costs_are_told_in_units_for_people() -> None:
    cost = estimate(7_200_000, 1000, disk_bytes=3_500_000_000, memory_bytes=2_000, price_per_hour=3.0)
    assert cost == Cost(7_200_000, 1000, 3_500_000_000, 2_000, 2.0, 6.0)
    assert [line.split(maxsplit=1)[1] for line in cost.lines()] == [
        "7,200,000 at 1,000 a second", "3.5 GB", "2.0 kB", "2 h 00 min", "6.00",
    ]  # fmt: skip
    assert len(estimate(1, 1, disk_bytes=0, memory_bytes=0).lines()) == 4
    assert (duration(5), duration(200), readable(12), readable(5e15)) == ("5 s", "3 min 20 s", "12 bytes", "5,000.0 TB")
    pieces = iter([100, 10, 10, 0])
    rate, memory = trial(lambda: next(pieces), 60)
    assert rate > 0 and memory > 1 << 20
