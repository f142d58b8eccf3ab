"""What `steer doctor` says of the machine and of a model, before anyone waits for it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_3.tokenizer import load_tokenizer
from sae.checkpoint import save_sae
from sae.model import SAE, SAEConfig
from steer.analysis.checkup import Finding
from steer.analysis.prose import PARAGRAPH
from steer.cli import main
from steer.config import DEMO_MODEL, DEMO_SAE
from tests.tiny import hf_config, tiny_config, write_tiny_checkpoint

Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Exit code and checks by name; `model` in the working folder is a tiny real one."""
    torch.set_num_threads(1)
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_tiny_checkpoint(tmp_path / "model")

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = main(["doctor", "--json", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        checks = {entry["check"]: entry for entry in map(json.loads, out.splitlines())}
        assert all(set(entry) == {"check", "ok", "value", "message"} for entry in checks.values())
        assert code == (0 if all(entry["ok"] for entry in checks.values()) else 1)
        return code, checks

    return run


def test_the_machine_and_the_shipped_model_are_well(doctor: Doctor, tmp_path: Path) -> None:
    code, checks = doctor()
    assert code == 0, checks
    assert checks["data"]["value"] == str(tmp_path / "home")
    assert "huggingface_hub" in checks["packages"]["value"] and "downloads are" in checks["hub"]["value"]
    assert checks["model"]["value"].startswith("the demo: Llama, 8 layers of 384, 6 heads on 2, 14.2 M parameters")
    assert checks["tokenizer"]["value"].endswith("4,096 tokens of the model's 4,096")
    assert "llama-3" in checks["chat"]["value"]
    assert "GiB free (weights " in checks["fit"]["value"] and "SAE " in checks["fit"]["value"]
    assert "4,096 latents at blocks." in checks["sae"]["value"]
    assert "quantize" not in checks
    assert checks["settings"]["value"].startswith("none typed")
    assert doctor("--threads", "1", "--dtype", "float32")[1]["settings"]["value"] == "dtype float32, threads 1"


def test_what_does_not_ship_is_found(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("steer.cli.doctor.DEMO_MODEL", tmp_path / "gone")
    code, checks = doctor()
    assert code == 1 and not checks["shipped"]["ok"]


def test_the_checks_are_of_the_model_that_is_named(doctor: Doctor) -> None:
    code, checks = doctor("--model", "model", "--dtype", "bfloat16", "--device", "cpu", "--chat-format", "plain")
    assert code == 0, checks
    assert checks["model"]["value"] == (
        "model: Llama, 2 layers of 32, 4 heads on 2, 0.0 M parameters, safetensors, float32"
    )
    assert checks["tokenizer"]["value"] == "Tiktoken, 272 tokens of the model's 272"
    assert "plain, as asked for" in checks["chat"]["value"]
    assert checks["placement"]["value"] == "cpu, bfloat16 (as asked for)"


@pytest.mark.parametrize(
    ("flags", "check", "why", "left_out"),
    [
        (
            ("--model", "gone"),
            "model",
            "there is no model folder gone; hint: ",
            {"tokenizer", "chat", "placement", "fit"},
        ),
        (("--device", "cuda:99"), "placement", "cuda:99", {"fit"}),
        (("--dtype", "int3"), "placement", "`int3` is no dtype", {"fit"}),
        (("--chat-format", "nope"), "chat", "nope", set()),
    ],
)
def test_a_check_whose_ground_is_missing_is_left_out(
    flags: tuple[str, ...], check: str, why: str, left_out: set[str], doctor: Doctor
) -> None:
    code, checks = doctor(*flags)
    assert code == 1 and not checks[check]["ok"] and why in checks[check]["message"]
    assert {"model", "tokenizer", "chat", "placement", "fit"} - set(checks) == left_out


def test_a_tokenizer_of_another_model_is_told(doctor: Doctor, tmp_path: Path) -> None:
    config = hf_config(tiny_config(vocab_size=264))
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:264].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps(
            {"added_tokens_decoder": {"256": {"content": "<|begin_of_text|>"}, "290": {"content": "<|eot_id|>"}}}
        )
    )
    code, checks = doctor("--model", "model")
    assert code == 1
    assert not checks["tokenizer"]["ok"] and "ids go up to 290 and the model's to 263" in checks["tokenizer"]["message"]
    assert "chat" not in checks and checks["fit"]["ok"]


def test_the_sae_must_be_one_of_this_model(doctor: Doctor, tmp_path: Path) -> None:
    code, checks = doctor("--model", "model", "--sae", str(DEMO_SAE))
    assert code == 1 and "at blocks.3.hook_resid_post and the model has 2 layers" in checks["sae"]["message"]
    assert "fit" not in checks
    write_tiny_checkpoint(tmp_path / "model", config=tiny_config(head_dim=16))
    for width, ok in ((64, True), (32, False)):
        save_sae(tmp_path / "sae", SAE(SAEConfig(width, 8, k=2, hook="blocks.1.hook_attn_z")))
        code, checks = doctor("--model", "model", "--sae", "sae")
        assert checks["sae"]["ok"] == ok
    assert "reads a width of 32 and the model has 64 at blocks.1.hook_attn_z" in checks["sae"]["message"]
    code, checks = doctor("--sae", "gone")
    assert code == 1 and "there is no SAE folder gone" in checks["sae"]["message"]


def test_a_model_that_does_not_fit_fails_the_check(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.device.available_memory", lambda device: 1000)
    code, checks = doctor("--model", "model")
    assert (
        code == 1
        and checks["fit"]["message"].startswith("model needs 0.00 GiB on cpu")
        and "hint: " in checks["fit"]["message"]
    )


def test_one_report_has_one_figure_of_what_is_free(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, memory, fit in ((3 << 30, r"3\.0 of [\d.]+ GiB free", "of 3.0 GiB free"), (None, "unknown", "unknown")):
        monkeypatch.setattr("steer.device.available_memory", lambda device, free=free: free)
        _, checks = doctor("--model", "model", "--device", "cpu")
        assert re.fullmatch(memory, checks["memory"]["value"]) and fit in checks["fit"]["value"]


def test_what_quantising_costs(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--model", "model", "--device", "cpu", "--quantize")
    tokens = len(load_tokenizer(tmp_path / "model").encode(PARAGRAPH, bos=True))
    found = {}
    for scheme in ("int8", "int4"):
        code, checks = doctor(*flags, scheme)
        assert code == 0, checks
        numbers = re.match(
            rf"{scheme}: KL (\S+) nats a token on average, (\S+) at most, the same likeliest token at (\S+)% of (\d+)",
            checks["quantize"]["value"],
        )
        assert numbers is not None, checks["quantize"]
        found[scheme] = [float(number) for number in numbers.groups()]
        assert found[scheme][0] <= found[scheme][1] and found[scheme][3] == min(256, tokens)
    assert 0 < found["int8"][0] < 0.01 < found["int4"][0]
    (tmp_path / "short.txt").write_text("A text.")
    code, checks = doctor(*flags, "int8", "--text", "short.txt")
    assert code == 0 and checks["quantize"]["value"].endswith("of 8")
    for name, content, why in (
        ("empty.txt", b"", "no text to measure on"),
        ("raw.txt", b"\xff\xfe", "no text in UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        code, checks = doctor(*flags, "int8", "--text", name)
        assert code == 1 and why in checks["quantize"]["message"]
    assert "No such file" in doctor(*flags, "int8", "--text", "gone.txt")[1]["quantize"]["message"]


def test_a_text_with_nothing_to_measure_is_refused(
    doctor: Doctor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--model", "model", "--text", "short.txt"]) == 1
    assert "add `--sae DIR` or `--quantize int8`" in capsys.readouterr().err


def test_the_paragraph_is_about_200_tokens(doctor: Doctor) -> None:
    assert 180 <= len(load_tokenizer(DEMO_MODEL).encode(PARAGRAPH)) <= 300


def test_each_of_several_saes_is_looked_at(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, latents, hook in (("a", 8, "blocks.0.hook_resid_post"), ("b", 16, "blocks.1.hook_resid_post")):
        save_sae(tmp_path / name, SAE(SAEConfig(32, latents, k=2, hook=hook)))
    examined: list[int] = []

    def examine(model: Any, sae: SAE, *rest: Any, **given: Any) -> tuple[Finding, ...]:
        examined.append(sae.config.d_sae)
        return (Finding("hook", sae.config.d_sae == 8, 1.0, "it reads"),)

    monkeypatch.setattr("steer.analysis.checkup.examine", examine)
    sizes: dict[str, int] = {}
    monkeypatch.setattr("steer.device.sae_bytes", lambda config, device: sizes.setdefault(config.hook, 1 << 30))
    both = ("--model", "model", "--device", "cpu", "--sae", "a", "--sae", "b")
    code, checks = doctor(*both)
    assert code == 1 and examined == [8, 16]
    assert checks["sae"]["value"] == "8 latents at blocks.0.hook_resid_post; 16 latents at blocks.1.hook_resid_post"
    assert checks["hook"]["message"] == "blocks.1.hook_resid_post: it reads" and not checks["hook"]["ok"]
    assert "SAE 2.0" in checks["fit"]["value"] and len(sizes) == 2
    assert "2 of 2 layers kept" in doctor(*both, "--quantize", "int8")[1]["quantize"]["value"]
