"""An SAE folder reads back as it was written, and each kind of damage is one sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.checkpoint import SAEFileError, Stats, load_sae, save_sae, write_stats
from sae.model import SAE, SAEConfig
from tests.sae.reference import KINDS, make_sae


@pytest.fixture
def sae() -> SAE:
    made = SAE(SAEConfig(d_in=6, d_sae=16, k=4, hook="blocks.1.hook_resid_post"))
    for weight in made.parameters():
        weight.copy_(torch.randn_like(weight))
    return made


def stats_of(sae: SAE) -> Stats:
    n = sae.config.d_sae
    return Stats(torch.rand(n), torch.rand(n), torch.rand(n), resid_norm=12.5, tokens=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_reads_back_as_it_was_written(tmp_path: Path, sae: SAE, dtype: torch.dtype) -> None:
    stats = stats_of(sae)
    save_sae(tmp_path / "s", sae, stats, {"hook": sae.config.hook}, dtype)
    read = load_sae(tmp_path / "s")
    assert read.config == sae.config and read.manifest == {"hook": sae.config.hook}
    for ours, theirs in zip(read.parameters(), sae.parameters(), strict=True):
        assert ours.dtype == torch.float32 and (ours == theirs.to(dtype).float()).all()
    assert read.stats is not None and (read.stats.max_F == stats.max_F).all()
    assert (read.stats.resid_norm, read.stats.tokens) == (12.5, 1000)
    assert (
        (tmp_path / "s" / "cfg.json").read_text().replace("\n ", "").startswith('{ "format": "steer-sae", "version": 1')
    )
    assert not list((tmp_path / "s").glob("*.tmp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_back_as_it_was_written(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    made = make_sae(kind, "layer_norm")
    made.config = replace(made.config, prefixes=(8, 40))
    save_sae(tmp_path, made, dtype=dtype)
    read, stored = load_sae(tmp_path), load_file(tmp_path / "sae.safetensors")
    assert read.config == made.config
    assert set(stored) == {"W_enc", "b_enc", "W_dec", "b_dec", *made.config.function.extra} == set(read.weights)
    for name, weight in made.weights.items():
        assert stored[name].dtype == dtype and (read.weights[name] == weight.to(dtype).float()).all()
    x_BD = torch.randn(4, 12)
    if dtype == torch.float32:
        latents = read.encode(x_BD)
        assert (latents.indices == made.encode(x_BD).indices).all()
        assert (read.decode(latents, x_BD) == made.decode(latents, x_BD)).all()


def test_a_folder_from_before_later_settings_reads_with_their_defaults(tmp_path: Path, sae: SAE) -> None:
    save_sae(tmp_path, sae)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg.keys() - {"format", "version", "d_in", "d_sae", "activation", "k", "hook"} == {
        "normalise",
        "prefixes",
        "prolu_plain",
    }
    for name in ("normalise", "prefixes", "prolu_plain"):
        del cfg[name]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert load_sae(tmp_path).config == sae.config


THRESHOLD_DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "gone": (lambda w: w.pop("threshold"), "no tensor threshold, which an SAE of kind jumprelu has"),
    "NaN": (lambda w: w["threshold"].fill_(float("nan")), "NaN or infinite values in threshold"),
    "another size": (lambda w: w.update(threshold=torch.ones(3)), r"threshold of shape \(3,\), expected \(40,\)"),
}


@pytest.mark.parametrize("name", THRESHOLD_DAMAGE)
def test_a_bad_threshold_is_one_sentence(tmp_path: Path, name: str) -> None:
    save_sae(tmp_path, make_sae("jumprelu"))
    damage, words = THRESHOLD_DAMAGE[name]
    edit_weights(tmp_path, damage)
    with pytest.raises(SAEFileError, match=words):
        load_sae(tmp_path)


def test_statistics_can_be_written_later_and_do_not_outlive_their_sae(tmp_path: Path, sae: SAE) -> None:
    save_sae(tmp_path, sae)
    assert load_sae(tmp_path).stats is None and load_sae(tmp_path).manifest == {}
    write_stats(tmp_path, stats_of(sae))
    assert load_sae(tmp_path).stats is not None
    save_sae(tmp_path, sae)
    assert load_sae(tmp_path).stats is None


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "sae.safetensors")
    change(weights)
    save_file(weights, folder / "sae.safetensors")


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def truncate(folder: Path) -> None:
    file = folder / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "sae.safetensors").unlink(), "is missing"),
    "no config": (lambda f: (f / "cfg.json").unlink(), "cfg.json is missing"),
    "truncated": (truncate, "damaged"),
    "not safetensors": (lambda f: (f / "sae.safetensors").write_bytes(b"hello"), "damaged"),
    "not JSON": (lambda f: (f / "cfg.json").write_text("{"), "not readable JSON"),
    "foreign": (lambda f: (f / "cfg.json").write_text('{"num_latents": 4}'), "not the cfg.json of a steer-sae"),
    "newer": (lambda f: edit_config(f, version=2), "version 2"),
    "k of text": (lambda f: edit_config(f, k="4"), "k = '4'"),
    "unknown normalisation": (lambda f: edit_config(f, normalise="rms"), "normalises by 'rms'"),
    "normalisation of number": (lambda f: edit_config(f, normalise=1), "normalise = 1, which is not text"),
    "prefixes of text": (lambda f: edit_config(f, prefixes=["4"]), "not a list of whole numbers"),
    "flag of number": (lambda f: edit_config(f, prolu_plain=1), "prolu_plain = 1, which is not true or false"),
    "k too large": (lambda f: edit_config(f, k=400), "k is 400"),
    "other width": (lambda f: edit_config(f, d_in=7), r"W_enc of shape \(16, 6\), expected \(16, 7\)"),
    "tensor gone": (lambda f: edit_weights(f, lambda w: w.pop("b_dec")), "no tensor b_dec"),
    "NaN": (
        lambda f: edit_weights(f, lambda w: w["W_dec"].fill_(float("nan"))),
        "NaN or infinite values in W_dec",
    ),
    "bad statistics": (lambda f: (f / "stats.safetensors").write_bytes(b"x" * 9), "stats.safetensors is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_one_sentence(tmp_path: Path, sae: SAE, name: str) -> None:
    save_sae(tmp_path, sae, stats_of(sae))
    damage, words = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(SAEFileError, match=words) as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SAEFileError, match="no SAE folder"):
        load_sae(tmp_path / "nowhere")
