"""Commands on a model of the Hub: fetched once, then from the cache; what goes wrong on the way is one sentence."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from llama_3.checkpoint import state_tensors
from steer.cli import main
from steer.cli.capture import hashes
from tests.llama_3 import layouts
from tests.llama_3.fake_hub import SECRET, Hub, serve_hub
from tests.tiny import tiny_model, write_tiny_checkpoint

Steer = Callable[..., tuple[int, list[Any], str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    torch.set_num_threads(1)
    write_tiny_checkpoint(tmp_path / "written")
    with serve_hub(tmp_path, monkeypatch) as hub:
        hub.repos["org/tiny"] = {file.name: file.read_bytes() for file in (tmp_path / "written").iterdir()}
        yield hub


@pytest.fixture
def steer(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Steer:
    """Exit code, JSON lines and stderr of a command."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))

    def run(*arguments: str) -> tuple[int, list[Any], str]:
        code = main([*arguments, "--json"])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and SECRET not in out + err
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


def test_a_model_of_the_hub_completes_as_the_folder_does(
    steer: Steer, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("complete", "The cat", "--seed", "3", "--max-tokens", "8", "--device", "cpu")
    code, (from_hub,), err = steer(*asked, "--model", "org/tiny")
    assert code == 0 and len(hub.fetched()) == 3, err
    code, (from_folder,), _ = steer(*asked, "--model", str(tmp_path / "written"))
    assert code == 0 and from_hub["tokens"] == from_folder["tokens"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "steer.toml").write_text('model = "org/tiny"')
    code, (from_cache,), _ = steer(*asked)
    assert code == 0 and from_cache["tokens"] == from_hub["tokens"] and len(hub.fetched()) == 3


@pytest.mark.parametrize(
    ("write", "weights"),
    [
        (layouts.write_sharded_safetensors, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        (layouts.write_sharded_bin, ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]),
        (layouts.meta_writer(2, original=True), ["original/consolidated.01.pth", "original/consolidated.00.pth"]),
        (layouts.meta_writer(2), ["consolidated.01.pth", "consolidated.00.pth"]),
    ],
)
def test_every_layout_on_the_hub_is_the_same_model(
    write: layouts.Writer, weights: list[str], steer: Steer, hub: Hub, tmp_path: Path
) -> None:
    model = tiny_model()
    write(tmp_path / "other", model.config, state_tensors(model))
    files = [file for file in (tmp_path / "other").rglob("*") if file.is_file()]
    hub.repos["org/other"] = {file.relative_to(tmp_path / "other").as_posix(): file.read_bytes() for file in files}
    beside = weights[0].rpartition("/")[0]
    hub.repos["org/other"][f"{beside}/tokenizer.model".lstrip("/")] = hub.repos["org/tiny"]["tokenizer.model"]
    asked = ("complete", "The cat", "--temperature", "0", "--max-tokens", "8", "--device", "cpu", "--model")
    code, (reply,), err = steer(*asked, "org/other")
    assert code == 0 and hub.fetched()[-2:] == weights, err
    assert reply["tokens"] == steer(*asked, "org/tiny")[1][0]["tokens"]
    fetched = len(hub.fetched())
    assert steer(*asked, "org/other")[0] == 0 and len(hub.fetched()) == fetched


def test_a_capture_says_which_files_of_the_hub_it_was_made_with(steer: Steer, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 20)
    code, _, err = steer("capture", "text.txt", "--out", "acts", "--model", "org/tiny")
    assert code == 0, err
    manifest = (tmp_path / "acts" / "manifest.json").read_text()
    assert all(name in manifest for name in ("config.json", "model.safetensors", "tokenizer.model"))


def test_what_a_model_is_known_by(tmp_path: Path) -> None:
    original = tmp_path / "model" / "original"
    original.mkdir(parents=True)
    for file in (tmp_path / "a.gguf", original / "consolidated.00.pth", original / "params.json"):
        file.write_bytes(file.name.encode())
    (tmp_path / "model" / "README.md").touch()
    for model, names in (
        (tmp_path / "a.gguf", ["a.gguf"]),
        (tmp_path / "model", ["consolidated.00.pth", "params.json"]),
    ):
        assert hashes(model) == {name: hashlib.sha256(name.encode()).hexdigest() for name in names}


def test_the_doctor_names_a_model_of_the_hub(steer: Steer) -> None:
    code, checks, _ = steer("doctor", "--model", "org/tiny")
    named = {entry["check"]: entry["value"] for entry in checks}
    assert code == 0 and named["model"].startswith("org/tiny: Llama, 2 layers of 32")


def test_what_goes_wrong_on_the_way_is_one_sentence(steer: Steer, hub: Hub) -> None:
    hub.gated.add("org/tiny")
    for model, why in (("org/tiny", "is gated"), ("org/gone", "no such model on the Hub"), ("gone", "no model folder")):
        code, lines, err = steer("complete", "hi", "--model", model)
        assert (code, lines) == (1, []) and err.count("error: ") == 1 and why in err and "\n\nhint: " in err


def test_a_traceback_shows_nothing_of_what_the_library_says(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for model, status in (("org/gone", 0), ("org/tiny", 403), ("org/tiny", 500)):
        hub.status = status
        assert main(["complete", "hi", "--model", model, "--debug"]) == 1
        out, err = capsys.readouterr()
        assert "Traceback" in err and "hub.py" in err and SECRET not in out + err
