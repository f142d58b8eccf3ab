"""Capture writes the model's own residuals, resumes to the same bytes, and notices damage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_3.chat_format import ChatFormat
from llama_3.hooks import HookPoint
from sae.model import SAE, SAEConfig
from tests.tiny import byte_tokenizer, tiny_config, tiny_model
from train.capture import CaptureSummary, Progress, capture
from train.errors import TrainError
from train.evaluate import evaluate
from train.lock import only_process
from train.reader import ShardReader
from train.shards import read_manifest, write_json
from train.text import TextPlan

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "t.txt"
    file.write_text("\n<|endoftext|>\n".join("the cat sat " * n for n in range(1, 12)))
    return file


def run(
    text: Path, out: Path, tokens: int = 600, hooks: tuple[str, ...] = (HOOK,), **options: object
) -> CaptureSummary:
    sizes = {"plan": TextPlan(context=40), "batch_tokens": 100, "shard_bytes": 64 * 150} | options
    return capture(tiny_model(), byte_tokenizer(), [text], out, hooks, tokens, **sizes)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_rows_are_the_residuals_of_the_model_without_first_and_special_tokens(text: Path, tmp_path: Path) -> None:
    summary = run(text, tmp_path / "a")
    assert summary.tokens == 600 and summary.shards == len(read_manifest(tmp_path / "a")["shards"]) > 2
    shard = load_file(tmp_path / "a" / "000000.safetensors")
    assert (shard["positions"] >= 1).all() and (shard["tokens"] < 256).all()
    end = int((shard["positions"].diff() <= 0).nonzero()[0]) + 1  # of the first context
    tokens = [256, *shard["tokens"][:end].tolist()]
    resid_BTD = tiny_model()(torch.tensor([tokens]), stop_after=HookPoint.parse(HOOK))
    torch.testing.assert_close(shard["rows"][:end], resid_BTD[0, 1:].bfloat16(), rtol=0.02, atol=0.02)


def test_a_killed_capture_resumes_to_the_bytes_of_an_unbroken_one(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "whole")

    def kill(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(
            tiny_model(), byte_tokenizer(), [text], tmp_path / "b", [HOOK], 600,
            plan=TextPlan(context=40), batch_tokens=100, shard_bytes=64 * 150, on_progress=kill,
        )  # fmt: skip
    assert 0 < len(read_manifest(tmp_path / "b")["shards"]) < len(read_manifest(tmp_path / "whole")["shards"])
    run(text, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


def test_a_second_capture_into_a_folder_is_refused(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    with (
        only_process(tmp_path / "a", "captures"),
        pytest.raises(TrainError, match=r"process .* captures in .* already"),
    ):
        run(text, tmp_path / "a")
    assert run(text, tmp_path / "a").tokens == 600


def test_another_text_is_named_and_not_its_hash(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    other = text.with_name("other.txt")
    other.write_text(text.read_text())
    with pytest.raises(TrainError, match=r"files = \['t.txt'\], not \['other.txt'\]"):
        run(other, tmp_path / "a")
    text.write_text("the dog")
    with pytest.raises(TrainError, match=r"the hash of t.txt = '[0-9a-f]{12}', not '[0-9a-f]{12}'"):
        run(text, tmp_path / "a")


def test_dialogs_in_another_chat_format_are_another_capture(tmp_path: Path) -> None:
    dialog = {"messages": [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on it"}]}
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join([json.dumps(dialog)] * 9))
    run(file, tmp_path / "a", 50, chat=ChatFormat(byte_tokenizer(), "plain"))
    assert read_manifest(tmp_path / "a")["chat_format"] == "plain"
    shard = load_file(tmp_path / "a" / "000000.safetensors")
    assert bytes(shard["tokens"][:18].tolist()) == b"the cat saton it\n\n"
    with pytest.raises(TrainError, match="a capture with chat_format = 'plain', not 'llama-3'"):
        run(file, tmp_path / "a", 50)
    run(file, tmp_path / "b", 50)
    manifest = read_manifest(tmp_path / "b")
    del manifest["chat_format"]  # as it was before formats were recorded
    write_json(tmp_path / "b" / "manifest.json", manifest)
    assert run(file, tmp_path / "b", 50).tokens == 50


def test_a_capture_goes_on_another_day_with_the_date_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join([json.dumps({"messages": [{"role": "user", "content": "the cat sat"}]})] * 9))

    def on(day: int) -> dict[str, bytes]:
        monkeypatch.setattr("llama_3.chat_format._today", lambda: f"0{day} May 2031")
        run(file, tmp_path / "a", 500, chat=ChatFormat(byte_tokenizer(), "llama-3.2"))
        return contents(tmp_path / "a")

    whole = on(1)
    assert read_manifest(tmp_path / "a")["chat_format"] == "llama-3.2 of 01 May 2031"
    damaged = tmp_path / "a" / "000001.safetensors"
    damaged.write_bytes(b"")
    assert on(2) == whole
    with pytest.raises(TrainError, match=r"'llama-3\.2 of 01 May 2031', not 'llama-3\.2 of 02 May 2031'"):
        run(file, tmp_path / "a", 500, chat=ChatFormat(byte_tokenizer(), "llama-3.2", date="02 May 2031"))


def test_a_finished_capture_has_nothing_left_to_do(text: Path, tmp_path: Path) -> None:
    first = run(text, tmp_path / "a")
    before = contents(tmp_path / "a")
    assert run(text, tmp_path / "a") == first and contents(tmp_path / "a") == before


def test_a_damaged_shard_is_named_by_the_reader_and_made_again(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    before, shard = contents(tmp_path / "a"), tmp_path / "a" / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(TrainError, match=r"shard .*000001\.safetensors has \d+ bytes instead"):
        ShardReader(tmp_path / "a", seed=0)
    run(text, tmp_path / "a")
    assert contents(tmp_path / "a") == before


def test_several_hooks_give_a_folder_each_with_the_same_rows(text: Path, tmp_path: Path) -> None:
    later = "blocks.1.hook_resid_mid"
    summary = run(text, tmp_path / "both", hooks=(later, HOOK))
    assert summary.tokens == 600
    run(text, tmp_path / "one", hooks=(later,))
    for name in ("000000.safetensors", "manifest.json"):
        assert (tmp_path / "both" / later / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_another_capture_in_the_same_folder_is_refused(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    with pytest.raises(TrainError, match="holds a capture with max_tokens = 600, not 500"):
        run(text, tmp_path / "a", tokens=500)
    with pytest.raises(TrainError, match=r"no blocks\.7"):
        run(text, tmp_path / "b", hooks=("blocks.7.hook_resid_post",))


def test_every_epoch_reads_every_row_once_in_another_order(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    for mix_bytes in (1, 1 << 30):
        reader = ShardReader(tmp_path / "a", seed=3, mix_bytes=mix_bytes)
        first, second = (torch.cat([reader.batch(e * 600 + i, 75) for i in range(0, 600, 75)]) for e in (0, 1))
        assert not torch.equal(first, second)
        assert sorted(first.tolist()) == sorted(second.tolist())
        assert torch.equal(ShardReader(tmp_path / "a", seed=3, mix_bytes=mix_bytes).batch(550, 100)[:50], first[550:])


def test_a_perfect_sae_costs_nothing_and_an_empty_one_explains_nothing(text: Path) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    perfect = SAE(SAEConfig(d_in=32, d_sae=64, activation="relu", k=0, hook=HOOK))
    for half, sign in ((slice(0, 32), 1.0), (slice(32, 64), -1.0)):
        perfect.W_enc_FD[half], perfect.W_dec_FD[half] = sign * torch.eye(32), sign * torch.eye(32)
    found = evaluate(model, perfect, tokenizer, [text], 300, context=40)
    assert found["fvu"] < 1e-9 and abs(found["delta_ce"]) < 1e-5 and found["l0"] == 32 and found["dead"] < 1
    assert found["tokens"] >= 300 and found["ce_clean"] > 0
    empty = SAE(SAEConfig(d_in=32, d_sae=8, k=2, hook=HOOK))
    nothing = evaluate(model, empty, tokenizer, [text], 300, context=40)
    assert nothing["fvu"] >= 1 and nothing["l0"] == 0 and nothing["dead"] == 1
    assert nothing["ce_clean"] == pytest.approx(found["ce_clean"]) and nothing["delta_ce"] != 0
    with pytest.raises(TrainError, match="reads a width of 8 and the model has 32"):
        evaluate(model, SAE(SAEConfig(d_in=8, d_sae=8, k=2, hook=HOOK)), tokenizer, [text], 10)


def test_a_site_of_another_width_is_captured_and_measured_as_wide_as_it_is(text: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, hooks = tiny_model(config=tiny_config(head_dim=16)), (HOOK, "blocks.1.hook_attn_z")
    capture(model, byte_tokenizer(), [text], tmp_path / "a", hooks, 100, plan=TextPlan(context=40))
    for hook, width in zip(hooks, (32, 64), strict=True):
        reader = ShardReader(tmp_path / "a" / hook, seed=0)
        assert reader.manifest["d_in"] == reader.batch(0, 10).shape[1] == width
    sae = SAE(SAEConfig(d_in=64, d_sae=8, k=2, hook=hooks[1]))
    assert evaluate(model, sae, byte_tokenizer(), [text], 100, context=40)["delta_ce"] != 0
    for hook, why in ((hooks[1], "width of 32 and the model has 64 at"), ("blocks.2.hook_mlp_out", "has 2 layers")):
        with pytest.raises(TrainError, match=why):
            evaluate(model, SAE(SAEConfig(d_in=32, d_sae=8, k=2, hook=hook)), byte_tokenizer(), [text], 10)


@pytest.mark.parametrize("entry", [None, {"rows": 0}, {"bytes": "x"}, {"sha256": None}, {"name": "../x"}])
def test_a_manifest_that_does_not_say_what_its_shards_hold_is_refused(entry: Any, text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a")
    manifest = read_manifest(tmp_path / "a")
    shards = entry and [manifest["shards"][0] | entry]
    write_json(tmp_path / "a" / "manifest.json", manifest | {"shards": shards})
    with pytest.raises(TrainError, match="is damaged"):
        ShardReader(tmp_path / "a", seed=0)
