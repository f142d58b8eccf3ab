"""Where a model runs, in what and why; and what is said about one that will not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_3.checkpoint import load_model, parameter_count
from llama_3.config import ModelConfig, read_config
from sae.model import SAE, SAEConfig
from sae.screen import available as screening_available
from steer import device
from steer.device import Fit, Placement, check_fit, choose_device, choose_placement, estimate, sae_bytes
from steer.errors import SteerError
from tests.tiny import tiny_config, write_tiny_checkpoint

GIB = 2**30
LLAMA_8B = tiny_config(
    vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336, tied=False,
    max_context=131072,
)  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_checkpoint(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine without accelerators; give it `cuda` or `mps` devices."""
    has: dict[str, int] = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: has.get("cuda", 0) > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: has.get("cuda", 0))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: has.get("mps", 0) > 0)
    return has


def test_auto_takes_the_fastest_device(machine: dict[str, int]) -> None:
    assert choose_device("auto") == "cpu"
    machine["mps"] = 1
    assert choose_device("auto") == "mps"
    machine["cuda"] = 2
    assert choose_device("auto") == "cuda"
    assert [choose_device(name) for name in ("cpu", "mps", "cuda", "cuda:1")] == ["cpu", "mps", "cuda", "cuda:1"]


@pytest.mark.parametrize(
    ("wanted", "why", "hint"),
    [
        ("cuda:99", "there is no device `cuda:99`", "cuda:0 to cuda:1"),
        ("cuda:2", "there is no device `cuda:2`", "cuda:0 to cuda:1"),
        ("cpu:1", "there is no device `cpu:1`", "here is cpu"),
        ("mps", "`mps` is not available here", "--device cpu"),
        ("gpu", "`gpu` is no device", "choose auto"),
        ("cuda:x", "`cuda:x` is no device", "choose auto"),
        ("cuda:-1", "`cuda:-1` is no device", "choose auto"),
        ("", "`` is no device", "choose auto"),
    ],
)
def test_a_device_that_is_not_here_is_refused(wanted: str, why: str, hint: str, machine: dict[str, int]) -> None:
    machine["cuda"] = 2
    with pytest.raises(SteerError, match=why) as caught:
        choose_device(wanted)
    assert hint in (caught.value.hint or "")


def test_auto_is_the_fastest_device_and_the_dtype_as_stored(
    machine: dict[str, int], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = choose_placement("auto", "auto", tiny)
    assert placed == Placement("cpu", "auto", "cpu: there is no other device; float32: as stored")
    monkeypatch.setattr(device, "stored_dtype", lambda path: torch.bfloat16)
    assert choose_placement("cpu", "auto", tiny) == Placement("cpu", "auto", "bfloat16: as stored")
    machine["cuda"] = 1
    placed = choose_placement("auto", "auto", tiny)
    assert placed == Placement("cuda", "auto", "cuda: the fastest device here; bfloat16: as stored")


def test_what_was_asked_for_needs_no_reason(machine: dict[str, int], tiny: Path) -> None:
    assert choose_placement("cpu", "bfloat16", tiny) == Placement("cpu", torch.bfloat16)
    with pytest.raises(SteerError, match="`int3` is no dtype"):
        choose_placement("cpu", "int3", tiny)


def test_the_estimate_counts_the_weights_of_a_model_exactly(tiny: Path) -> None:
    config = read_config(tiny)
    loaded = sum(weight.numel() for weight in load_model(tiny).parameters())
    parts = estimate(config, torch.float32)
    assert parts["weights"] == 4 * loaded == 4 * parameter_count(config)
    assert parts["cache of 256 tokens"] == 2 * 2 * 2 * 8 * 256 * 4


def test_the_estimate_of_a_known_model() -> None:
    parts = estimate(LLAMA_8B, torch.bfloat16)
    assert parts["weights"] == 8_030_261_248 * 2
    assert parts["cache of 8,192 tokens"] == GIB
    assert parts["working memory"] < GIB / 4
    assert estimate(replace(LLAMA_8B, max_context=1024), torch.bfloat16)["cache of 1,024 tokens"] == GIB // 8
    int8, int4 = (estimate(LLAMA_8B, torch.bfloat16, scheme)["weights"] for scheme in ("int8", "int4"))
    assert 8.0 < int8 / GIB < 9.0 and 5.0 < int4 / GIB < 6.0
    whole, half, none = (
        estimate(LLAMA_8B, torch.bfloat16, "int8", kept_layers=kept)["weights"] for kept in (0, 16, 32)
    )
    assert whole == int8 and none - half == pytest.approx(half - whole, abs=1)
    head = LLAMA_8B.vocab_size * LLAMA_8B.d_model
    assert parts["weights"] - none == pytest.approx(0.99 * head, abs=1)
    tied = replace(LLAMA_8B, tied=True)
    saved = [
        estimate(config, torch.bfloat16)["weights"] - estimate(config, torch.bfloat16, "int8")["weights"]
        for config in (LLAMA_8B, tied)
    ]
    assert saved[0] - saved[1] == pytest.approx(2 * head, abs=1)


def refusal(
    monkeypatch: pytest.MonkeyPatch, free: dict[str, float], placement: Placement, **more: object
) -> SteerError:
    """What is said about an 8B model where so many GiB are free."""
    monkeypatch.setattr(device, "available_memory", lambda name: int(free[name.split(":")[0]] * GIB))
    with pytest.raises(SteerError) as caught:
        check_fit(LLAMA_8B, Path("llama-8b"), placement, **more)  # type: ignore[arg-type]  # quantize or sae_bytes
    return caught.value


@pytest.mark.parametrize(
    ("free", "dtype", "hint"),
    [
        (20.0, torch.float32, "with `--dtype bfloat16` it fits"),
        (12.0, torch.bfloat16, "with `--quantize int8` it fits"),
        (8.0, torch.bfloat16, "with `--quantize int4` it fits"),
        (14.0, torch.float32, "with `--quantize int8` it fits"),
        (7.0, torch.float32, "with `--dtype bfloat16 --quantize int4` it fits"),
        (3.0, torch.float32, "choose a smaller model"),
    ],
)
def test_the_hint_is_the_first_option_that_fits(
    free: float, dtype: torch.dtype, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(monkeypatch, {"cpu": free}, Placement("cpu", dtype))
    assert error.hint == hint
    assert f"and {free:.1f} GiB are free" in str(error) and "llama-8b needs " in str(error)


def test_a_card_that_is_too_small(machine: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    machine["cuda"] = 1
    error = refusal(monkeypatch, {"cuda": 3.0, "cpu": 64.0}, Placement("cuda:0", torch.bfloat16))
    assert str(error) == "llama-8b needs 16.1 GiB on cuda:0 (weights: 15.0), and 3.0 GiB are free"
    assert error.hint == "with `--device cpu` it fits"
    error = refusal(monkeypatch, {"cuda": 3.0, "cpu": 4.0}, Placement("cuda:0", torch.bfloat16))
    assert error.hint == "choose a smaller model"
    machine["cuda"] = 4
    error = refusal(monkeypatch, {"cuda": 3.0, "cpu": 4.0}, Placement("cuda:0", torch.bfloat16))
    assert error.hint == "choose a smaller model, or spread this one over 4 cards with torchrun"


def test_what_several_processes_are_refused_is_not_advised(
    machine: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "world", lambda: 4)
    error = refusal(monkeypatch, {"cpu": 12.0}, Placement("cpu", torch.bfloat16))
    assert error.hint == "choose a smaller model"
    error = refusal(monkeypatch, {"cpu": 7.0}, Placement("cpu", torch.float32))
    assert error.hint == "choose a smaller model"
    for machine["cuda"], hint in ((4, ""), (8, ", or spread this one over 8 cards with torchrun")):
        error = refusal(monkeypatch, {"cuda": 3.0, "cpu": 4.0}, Placement("cuda:0", torch.bfloat16))
        assert error.hint == "choose a smaller model" + hint


@pytest.mark.parametrize(("d_in", "screened"), [(8192, True), (8191, False)])
def test_an_sae_is_counted_with_the_copy_of_its_encoder(d_in: int, screened: bool) -> None:
    config = SAEConfig(d_in, 1024, k=8)
    sae = SAE(config)
    sae.prepare()
    weights = 4 * sum(weight.numel() for weight in sae.parameters())
    assert (sae._screen is not None) == (screened and screening_available())
    assert sae_bytes(config) == weights + (d_in * 1024 if sae._screen else 0)
    assert sae_bytes(config, "cuda:0") == weights


def test_what_is_quantised_already_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(monkeypatch, {"cpu": 8.0}, Placement("cpu", torch.bfloat16), quantize="int8")
    assert error.hint == "with `--quantize int4` it fits"
    error = refusal(monkeypatch, {"cpu": 3.0}, Placement("cpu", torch.bfloat16), quantize="int4")
    assert error.hint == "choose a smaller model"
    error = refusal(monkeypatch, {"cpu": 30.0}, Placement("cpu", torch.bfloat16), sae_bytes=20 * GIB)
    assert "(SAE: 20.0)" in str(error) and error.hint == "with `--quantize int8` it fits"


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    config: ModelConfig = read_config(tiny)
    fit = check_fit(config, tiny, Placement("cpu", "auto"))
    assert fit.fits and 0 < fit.needed < GIB
    monkeypatch.setattr(device, "available_memory", lambda name: None)
    assert check_fit(replace(LLAMA_8B, n_layers=9999), tiny, Placement("cpu", "auto")).fits
    assert Fit({"weights": 5}, 5).fits and not Fit({"weights": 6}, 5).fits


def test_memory_is_read_from_where_the_system_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device._meminfo(tmp_path / "none") is None and device._cgroup(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:     64 kB\n")
    assert device._meminfo(tmp_path / "meminfo") == 64 * 1024
    for name, text in (("memory.max", "max"), ("memory.current", "700"), ("memory.stat", "anon 1\ninactive_file 200")):
        (tmp_path / name).write_text(text)
    assert device._cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert device._cgroup(tmp_path) == 500
    monkeypatch.setattr(device, "_meminfo", lambda: 900)
    monkeypatch.setattr(device, "_cgroup", lambda: 500)
    assert device.available_memory("cpu") == 500
    monkeypatch.setattr(device, "_meminfo", lambda: None)
    monkeypatch.setattr(device, "_cgroup", lambda: None)
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    assert device.available_memory("cpu") == 1_000_000
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda where: (7, 9))
    assert device.available_memory("cuda:1") == 7
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 9)
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 4)
    assert device.available_memory("mps") == 5
