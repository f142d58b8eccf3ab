"""A model shared out over two processes is the model of one: logits, tokens, hooks, errors, and the command.

One torchrun measures every model: its processes run this very file, and leave what they find in files. The tests
measure the same in their own process, and compare.
"""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_3 import parallel
from llama_3.checkpoint import load_model, state_tensors
from llama_3.generate import rerun, stream_steps
from llama_3.hooks import HookPoint, Hooks, Span
from llama_3.linear import Linear
from llama_3.model import Transformer
from llama_3.sampling import Sampling
from sae.checkpoint import save_sae
from steer.cli import main
from steer.engine import Engine
from steer.errors import SteerError
from tests.llama_3.layouts import gguf_writer, meta_writer, write_safetensors
from tests.steer.test_engine import tiny_sae
from tests.tiny import tiny_config, tiny_model, write_tiny_checkpoint

ROOT = Path(__file__).parents[2]
SIZES = dict(d_model=64, n_heads=8, head_dim=8, d_ff=96)
MODELS = {
    "tied, two key heads": (tiny_config(), write_safetensors),
    "untied, four key heads": (tiny_config(tied=False, n_kv_heads=4), write_safetensors),
    "untied, odd vocabulary": (tiny_config(tied=False, vocab_size=275), write_safetensors),
    "tied, odd vocabulary": (tiny_config(vocab_size=275), write_safetensors),
    "heads wider than the model": (tiny_config(head_dim=16, tied=False), write_safetensors),
    "Meta's layout in two files": (tiny_config(**SIZES, n_kv_heads=4, tied=False), meta_writer(2)),
    "GGUF": (tiny_config(**SIZES, n_kv_heads=2), gguf_writer()),
}
"""Config and writer by name."""
PROMPTS = [[1, 5, 9, 200, 33, 7, 101], [2, 4, 8], [100, 90, 80, 70, 60]]
PUSHED = HookPoint(0, "resid_post")
TIMEOUT = 120


def push(x_BTD: torch.Tensor, span: Span) -> torch.Tensor:
    """A push that depends on the stream, the position and the row: a rank that saw something else would differ."""
    step = span.positions_BT.clamp(min=0)[..., None] / 10 + torch.tensor(span.rows)[:, None, None]
    return x_BTD + 0.3 * x_BTD.roll(1, -1) + 0.1 * step * torch.linspace(-1, 1, x_BTD.shape[-1])


def measure(model: Transformer) -> dict[str, Any]:
    """Tensors and tokens of a model, by what they are of."""
    longest = max(map(len, PROMPTS))
    tokens_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in PROMPTS])
    lengths, hooks, found = [len(prompt) for prompt in PROMPTS], Hooks(), {}
    hooks.add(PUSHED, push)
    with torch.inference_mode():
        found["plain"] = model(tokens_BT[:1])
        found["hooked"] = model(tokens_BT[:1], hooks=hooks)
        found["inside"] = model.forward(tokens_BT[:1], hooks=hooks, stop_after=HookPoint(1, "mlp_out"))
        cache = model.new_cache(3, 16)
        found["ragged"] = model(tokens_BT, lengths_B=lengths, cache=cache, hooks=hooks, last_only=True)
        found["ragged step"] = model(tokens_BT[:, :1], cache=cache, hooks=hooks)
        cache = model.new_cache(1, 16)
        cache.keep(PUSHED)
        model(tokens_BT[:1], cache=cache)
    for _ in rerun(model, cache, PROMPTS[0], 2, prompt_length=longest, hooks=hooks):
        pass
    with torch.inference_mode():
        found["rerun"] = model(tokens_BT[:1, :1], cache=cache, hooks=hooks)
    written: list[list[int]] = [[] for _ in PROMPTS]
    greedy = dict(sampling=Sampling(temperature=0.0), seeds=[0] * 3, max_tokens=20, stop_ids=frozenset[int]())
    for steps in stream_steps(model, PROMPTS, hooks=hooks, **greedy):  # type: ignore[arg-type]  # a plain dict
        for step in steps:
            written[step.row].append(step.token)
    found["tokens"] = torch.tensor(written)
    return {name: value.clone() for name, value in found.items()}


def stream(folder: Path) -> list[Any]:
    """What an engine with an SAE streams while it steers, and reads."""
    engine = Engine.load(folder / "model", folder / "sae", device="cpu")
    done = engine.complete("Once", ["3 +4", "ablate 5"], seed=7, max_tokens=12)
    read = engine.inspect("The cat sat")
    report = done.finished.report
    found: list[Any] = [list(done.tokens), report.applied, [edit.positions for edit in report.edits]]
    seen = ((event.token, {hit.latent: hit.activation for hit in event.hits}) for event in (*done.events, *read))
    return [*found, *seen]


def said(work: Callable[[], object]) -> tuple[str, str | None]:
    """The sentence and the hint of what `work` raises."""
    try:
        work()
    except (ValueError, SteerError) as error:
        return str(error), getattr(error, "hint", None)
    raise AssertionError("nothing was raised")


def hooked_at(model: Transformer, point: HookPoint) -> object:
    hooks = Hooks()
    hooks.add(point, lambda x, span: x)
    return model(torch.tensor([PROMPTS[1]]), hooks=hooks)


def work(folder: Path) -> None:
    """One process of torchrun: measures the models in `folder`, and leaves what it found there."""
    torch.set_num_threads(1)
    rank, tied = int(os.environ["RANK"]), folder / "tied, two key heads"
    found: dict[str, Any] = {"agreed": parallel.agree([rank, rank + 10])}
    found["models"] = {name: measure(parallel.load_parallel(folder / name, "float32")) for name in MODELS}
    stopped, unheard = threading.Event(), threading.Event()
    (unheard if rank else stopped).set()
    found["stops"] = [parallel.AgreedStop(stopped).is_set(), parallel.AgreedStop(unheard).is_set()]
    model = parallel.load_parallel(tied, "bfloat16")
    found["bfloat16"] = model(torch.tensor(PROMPTS[:1]))
    found["share"] = [part.weight.shape for part in model.blocks[1].modules() if isinstance(part, Linear)]
    found["cache"] = model.new_cache(1, 8).layers[1].keys.nbytes
    found["events"] = stream(folder)

    def full() -> None:
        if rank:
            raise ValueError("the second card is full")

    def write() -> None:
        time.sleep(0 if rank else 0.3)
        with (folder / "turns").open("a") as file:
            file.write(str(rank))

    parallel.main_first(write)
    found["errors"] = {
        "heads": said(lambda: parallel.load_parallel(folder / "one key head")),
        "dtype": said(lambda: parallel.load_parallel(tied, "int8")),
        "nan": said(lambda: parallel.load_parallel(folder / "nan")),
        "hook": said(lambda: hooked_at(model, HookPoint(1, "attn_z"))),
        "compile": said(model.compile_blocks),
        "alone": said(lambda: parallel.together(full)),
        "quantize": said(lambda: Engine.load(tied, device="cpu", quantize="int8")),
    }
    torch.save(found, folder / f"rank{rank}.pt")


def torchrun(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STEER_HOME": str(cwd / "home")}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes) as process:
        try:
            out, err = process.communicate(stdin, TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes; killed, it would leave them
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, and `rank0.pt` and `rank1.pt` with what two processes found."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parallel")
    for name, (config, write) in MODELS.items():
        state = {key: value.half().float() for key, value in state_tensors(tiny_model(3, config)).items()}
        write(folder / name, config, state)
    write_tiny_checkpoint(folder / "one key head", config=tiny_config(n_kv_heads=1))
    write_tiny_checkpoint(folder / "model")
    save_sae(folder / "sae", tiny_sae(), tiny_sae().stats)
    broken = state_tensors(tiny_model())
    broken["model.layers.1.self_attn.v_proj.weight"][-1, 0] = torch.nan  # a row that only the second process reads
    write_safetensors(folder / "nan", tiny_config(), broken)
    ran = torchrun("-m", "tests.llama_3.test_parallel", str(folder), cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_compute_what_one_does(folder: Path, ranks: list[dict[str, Any]], name: str) -> None:
    alone = measure(load_model(folder / name, "float32"))
    first, second = (found["models"][name] for found in ranks)
    assert first.keys() == alone.keys()
    for what, expected in alone.items():
        assert torch.allclose(first[what], expected, rtol=1e-5, atol=1e-5), what
        assert torch.equal(first[what], second[what]), what
    assert alone["tokens"].shape == (3, 20)
    assert not torch.allclose(alone["hooked"], alone["plain"], atol=0.1)


def test_half_precision_and_shares(folder: Path, ranks: list[dict[str, Any]]) -> None:
    whole = load_model(folder / "tied, two key heads", "bfloat16")
    expected = whole(torch.tensor(PROMPTS[:1]))
    for found in ranks:
        assert found["bfloat16"].dtype == torch.bfloat16
        torch.testing.assert_close(found["bfloat16"], expected, rtol=0, atol=0.15)
        assert torch.equal(found["bfloat16"], ranks[0]["bfloat16"])
        assert found["share"] == [(32, 32), (32, 16), (64, 32), (32, 32)]  # of (64, 32), (32, 32), (128, 32), (32, 64)
        assert found["cache"] * 2 == whole.new_cache(1, 8).layers[1].keys.nbytes


def test_an_engine_steers_and_reads_as_in_one_process(folder: Path, ranks: list[dict[str, Any]]) -> None:
    expected = stream(folder)
    assert expected[1] > 4 and len(expected[2]) == 2  # steered at every step, by two edits
    for found in ranks:
        events = found["events"]
        assert events[:3] == expected[:3] and len(events) == len(expected)
        for (token, hits), (other, others) in zip(events[3:], expected[3:], strict=True):
            assert token == other and hits == pytest.approx(others, rel=1e-4, abs=1e-4)


def test_processes_agree_and_take_turns(folder: Path, ranks: list[dict[str, Any]]) -> None:
    assert [found["agreed"] for found in ranks] == [[0, 10], [0, 10]]
    assert [found["stops"] for found in ranks] == [[True, False]] * 2  # what the first was told
    assert (folder / "turns").read_text() == "01"


def test_what_cannot_be_shared_out_is_told_by_every_process(folder: Path, ranks: list[dict[str, Any]]) -> None:
    v = "model.layers.1.self_attn.v_proj.weight"
    nan = f"{v} in {folder / 'nan'} holds numbers that are NaN or infinite in torch.float32"
    expected = {
        "heads": (
            "1 key-value heads cannot be shared out evenly over 2 processes",
            "start it without torchrun",
        ),
        "dtype": ("weights are not loaded in 'int8'", "use auto, bfloat16, float16, float32"),
        "nan": (nan, "download the file again"),
        "hook": (
            "there is no hook at blocks.1.hook_attn_z in a model shared out over processes: "
            "each has its own heads there",
            "use attn_out, or one process",
        ),
        "compile": ("a model shared out over processes is not compiled", "leave out `--compile`"),
        "alone": ("the second card is full", None),
        "quantize": ("a model shared out over processes is not quantised", "leave out `--quantize`"),
    }
    for found in ranks:
        assert found["errors"] == expected


def test_shares_divide_heads_and_columns() -> None:
    local = parallel.share(tiny_config(n_heads=8, n_kv_heads=4, d_ff=96), 4)
    assert (local.n_heads, local.n_kv_heads, local.d_ff, local.d_model) == (2, 1, 24, 32)
    with pytest.raises(ValueError, match="8 key-value heads cannot be shared out evenly over 6 processes") as caught:
        parallel.share(tiny_config(n_heads=8, n_kv_heads=8, d_ff=96), 6)
    assert getattr(caught.value, "hint", "") == "start torchrun with `--nproc-per-node 4`"
    with pytest.raises(
        ValueError, match="62 feed-forward columns cannot be shared out evenly over 4 processes"
    ) as caught:
        parallel.share(tiny_config(n_heads=4, n_kv_heads=4, d_ff=62), 4)
    assert getattr(caught.value, "hint", "") == "start torchrun with `--nproc-per-node 2`"


def started(monkeypatch: pytest.MonkeyPatch, rank: int, processes: int) -> None:
    """What torchrun tells a process."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(processes))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")


def test_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    started(monkeypatch, 1, 2)
    assert parallel.own_device("cpu") == "cpu"
    assert (parallel.own_device("cuda"), chosen) == ("cuda:1", [1])
    with pytest.raises(ValueError, match="cuda:0 is one card, and 2 processes share the model"):
        parallel.own_device("cuda:0")
    with pytest.raises(ValueError, match="on mps"):
        parallel.own_device("mps")
    started(monkeypatch, 1, 3)
    with pytest.raises(ValueError, match="torchrun started 3 processes, and this machine has 2 cards") as caught:
        parallel.own_device("cuda")
    assert getattr(caught.value, "hint", "") == "start torchrun with `--nproc-per-node 2`"


def test_without_torchrun_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, 1, 2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # other launchers set the rest too
    assert (parallel.world(), parallel.is_main()) == (1, True)
    assert parallel.agree([3, 4]) == [3, 4] and parallel.together(lambda: 5) == parallel.main_first(lambda: 5) == 5
    assert not torch.distributed.is_initialized()


def test_one_process_reads_and_speaks_for_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon\n"))
    ask = ["complete", "--model", str(folder / "model"), "--device", "cpu", "--seed", "1", "--json"]
    ran = torchrun("-m", "steer", *ask, cwd=folder, stdin="Once upon\n")
    assert ran.returncode == 0, ran.stderr
    assert main(ask) == 0
    alone = capsys.readouterr()
    assert ran.stdout == alone.out and len(ran.stdout.splitlines()) == 1
    assert json.loads(ran.stdout)["prompt"] == "Once upon"
    assert ran.stderr.count("no SAE for this model") == 1


def test_the_chat_is_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        started(monkeypatch, rank, 2)
        for arguments in (["chat", "--plain"], [], ["split", "text.txt", "--out", "text.parquet"]):
            assert main(arguments) == 1
            out, err = capsys.readouterr()
            name = arguments[0] if arguments else "chat"
            told = (
                f"error: `steer {name}` is for one process, and torchrun started 2\n\n"
                "hint: several run `steer complete`, `inspect`, `capture` and `train`\n"
            )
            assert (out, err) == ("", "" if rank else told)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_write_what_one_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["complete", "Once upon", "--model", str(folder / "model"), "--dtype", "float32", "--seed", "1", "--json"]
    ran = torchrun("-m", "steer", *ask, "--device", "cuda", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert main([*ask, "--device", "cuda:0"]) == 0
    assert ran.stdout == capsys.readouterr().out


if __name__ == "__main__":
    work(Path(sys.argv[1]))
