"""A known dictionary found again, SAEs on disk that do what was measured, and what the trainer refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.checkpoint import load_sae
from tests.train.known_rows import HOOK, known_rows, small, write_activations, write_rows
from train.activity import read_activity
from train.config import TrainConfig
from train.errors import TrainError
from train.metrics import read_metrics
from train.preprocess import make_plan, write_plan
from train.reader import ShardReader
from train.trainer import Trainer, density, run_together, train


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


def test_a_known_dictionary_is_found_again_in_the_models_own_units(tmp_path: Path) -> None:
    rows_ND, atoms_FD = known_rows(12_000, d=24, atoms=24)
    write_activations(tmp_path / "a", rows_ND)
    config = TrainConfig(latents=48, k=3, tokens=200_000, batch=512, lr=4e-3, dead_after=20_000, stats_rows=4000)
    summary = train(tmp_path / "a", tmp_path / "run", config, threads=1)
    sae = load_sae(tmp_path / "run" / "sae")
    best = (atoms_FD @ sae.W_dec_FD.t()).max(1).values
    assert best.median() > 0.97 and summary.fvu < 0.1
    assert sae.stats is not None and sae.stats.tokens == 4000
    norms_N = ShardReader(tmp_path / "a", config.seed).batch(0, 4000).norm(dim=1)
    assert sae.stats.resid_norm == pytest.approx(float(norms_N.median()))
    assert sae.manifest["metrics"]["fvu"] == summary.fvu and sae.config.hook == HOOK
    assert sae.manifest["input_scale"]["mode"] == "variance" and sae.manifest["preset"] == "default"


SCALES = [("topk", scale) for scale in ("none", "norm", "layer_norm", "unit_norm")]
KINDS = [(arch, "auto") for arch in ("topk", "batchtopk", "relu", "jumprelu", "gated", "prolu")]


@pytest.mark.parametrize(("arch", "scale"), SCALES + KINDS)
def test_the_summary_is_what_the_sae_on_disk_does(rows: Path, tmp_path: Path, arch: Any, scale: Any) -> None:
    config = small(arch=arch, scale=scale, held_out=0.2, tokens=20_480)
    trainer = Trainer(rows, tmp_path, config)
    (summary,) = run_together([trainer])
    sae = load_sae(tmp_path / "sae")
    x_ND = ShardReader(rows, 0, held_out=0.2).held_out(1000)
    assert x_ND is not None and sae.manifest["measured_on"] == "held-out rows"
    latents = sae.encode(x_ND)
    fvu = (x_ND - sae.decode(latents, x_ND)).pow(2).sum() / (x_ND - x_ND.mean(0)).pow(2).sum()
    assert float(fvu) == pytest.approx(summary.fvu, rel=1e-3) and summary.fvu < 0.6
    assert float((latents.values > 0).sum(1).float().mean()) == pytest.approx(summary.l0)
    assert sae.stats is not None
    torch.testing.assert_close(sae.stats.max_F.max(), latents.values.max(), rtol=1e-4, atol=1e-4)
    y_ND = _as_trained(trainer, x_ND)
    torch.testing.assert_close(sae.decode(latents, x_ND), y_ND, rtol=1e-3, atol=2e-2)


def _as_trained(trainer: Trainer, x_ND: Tensor) -> Tensor:
    """What the SAE in training makes of x, from its error on scaled inputs, for comparison with the one on disk."""
    z_ND = trainer.scale.apply(x_ND)
    if trainer.config.arch == "batchtopk":  # chooses among all tokens of a batch, not by a threshold
        return load_sae(trainer.out / "sae").decode(load_sae(trainer.out / "sae").encode(x_ND))
    with trainer.state:
        y_ND = z_ND + trainer.state.gradient(z_ND).error_BD
    if trainer.scale.mode in ("layer_norm", "unit_norm"):
        mean_N1 = x_ND.mean(1, keepdim=True)
        centred_ND = x_ND - mean_N1
        size_N1 = (
            centred_ND.std(1, keepdim=True) if trainer.scale.mode == "layer_norm" else centred_ND.norm(dim=1)[:, None]
        )
        return y_ND * size_N1 + mean_N1
    return y_ND * trainer.scale.factor


def test_the_metrics_say_all_that_is_measured(rows: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    train(rows, tmp_path, small(held_out=0.2, arch="gated", revival="none"), seen.append, threads=1)
    entries = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert entries == seen and [entry["step"] for entry in entries] == list(range(5, 41, 5))
    last = entries[-1]
    assert {"loss", "losses", "fvu", "l0", "dead", "grad_norm", "lr", "tokens_per_second", "loader_wait"} <= set(last)
    assert last["loss"] == pytest.approx(sum(last["losses"].values())) and set(last["losses"]) >= {"gate", "sparsity"}
    assert 0 <= last["loader_wait"] < 1 and last["grad_norm"] > 0 and last["tokens"] == 5120
    told = [entry for entry in entries if "density" in entry]
    assert [entry["step"] for entry in told] == [10, 20, 30, 40] and all("held_out_fvu" in entry for entry in told)
    for entry in told:
        assert sum(entry["density"]["counts"]) + entry["density"]["never"] == 64
    shots = list(read_activity(tmp_path / "activity"))
    assert [(shot.step, shot.tokens) for shot in shots] == [(10, 1280), (20, 2560), (30, 3840), (40, 5120)]


def test_a_density_histogram_counts_each_latent_once() -> None:
    found = density(torch.tensor([0, 1, 10, 99, 100, 0]), 100)
    assert found["never"] == 2
    edges, counts = found["edges"], found["counts"]
    assert isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1
    assert dict(zip(edges, counts, strict=False))[-2.0] == 1 and counts[-1] == 2 and sum(counts) == 4


@pytest.mark.parametrize("arch", ["topk", "gated"])
def test_a_step_in_parts_is_the_step(rows: Path, tmp_path: Path, arch: Any) -> None:
    losses = []
    for parts in (1, 4):
        config = small(arch=arch, accumulate=parts, dtype="float64")
        train(rows, tmp_path / str(parts), config, threads=1)
        losses.append([entry["loss"] for entry in read_metrics(tmp_path / str(parts) / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_dead_latents_are_resampled_each_time_so_many_tokens_are_done(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("train.step.SparseStep.resample", lambda step, x_BD, seed: asked.append(int(step.updates)) or 0)
    train(rows, tmp_path, small(revival="resample", resample_every=700), threads=1)
    assert asked == [-(-700 * n // 128) for n in range(1, 8)]


def test_epochs_read_every_row_as_often(rows: Path, tmp_path: Path) -> None:
    trainer = Trainer(rows, tmp_path, small(epochs=2, tokens=0, batch=1000))
    assert trainer.config.tokens == 8000 and trainer.config.steps == 8
    first, second = (torch.cat([trainer.source.batch(e * 4000 + i, 500) for i in range(0, 4000, 500)]) for e in (0, 1))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(1).sort().values, second.sum(1).sort().values)


def test_a_plan_decides_what_is_left_open(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a")
    plan = make_plan(ShardReader(rows, 0, held_out=0.1, use_plan=False), scale="norm", center="median")
    write_plan(rows, plan)
    trainer = Trainer(rows, tmp_path / "run", small())
    assert (trainer.config.scale, trainer.config.center) == ("norm", "median") and trainer.scale == plan.scale
    torch.testing.assert_close(trainer.state.weights["b_dec"], plan.center_D())
    assert trainer.held_out_ND is not None
    other = Trainer(rows, tmp_path / "other", small(scale="variance", center="mean"))
    assert other.scale.mode == "variance" and other.scale.factor != plan.scale.factor


def test_a_run_ends_when_held_out_rows_are_reconstructed_no_better(rows: Path, tmp_path: Path) -> None:
    config = small(held_out=0.2, early_stop=2, lr=1e-12, tokens=128 * 400)
    summary = train(rows, tmp_path, config, threads=1)
    assert summary.steps == 30, "one best evaluation and two that are not better"
    assert train(rows, tmp_path, resume=True, threads=1) == summary
    with pytest.raises(TrainError, match="early_stop needs held-out rows"):
        train(rows, tmp_path / "none", small(early_stop=1))


def test_checkpoints_are_kept_by_policy(rows: Path, tmp_path: Path) -> None:
    train(rows, tmp_path, small(checkpoint_every=4, keep=2, keep_every=12), threads=1)
    kept = sorted(int(file.stem) for file in (tmp_path / "checkpoints").iterdir())
    assert kept == [12, 24, 36, 40]


def test_a_folder_with_a_run_is_refused_and_resume_reads_a_finished_one(rows: Path, tmp_path: Path) -> None:
    summary = train(rows, tmp_path, small(), threads=1)
    with pytest.raises(TrainError, match="already holds a run"):
        train(rows, tmp_path, small())
    assert train(rows, tmp_path, small(), resume=True) == summary
    with pytest.raises(TrainError, match="has k = 3, not 4"):
        train(rows, tmp_path, small(k=4), resume=True)
    with pytest.raises(TrainError, match="are not those with which the run"):
        train(write_rows(tmp_path / "others", rows=3999), tmp_path, resume=True)


@pytest.mark.parametrize("what", ["an SAE", "a training run", "nothing", "no folder", "NaN", "one row"])
def test_a_source_that_is_none_is_one_sentence(rows: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "source"
    if what in ("an SAE", "a training run"):
        train(rows, folder, small(tokens=1280), threads=1)
        folder, words = (folder / "sae" if what == "an SAE" else folder), f"holds {what}, not activations"
    elif what == "no folder":
        words = "there is no folder"
    else:
        write_rows(folder, rows=500)
        words = {"nothing": "holds no activations", "NaN": "holds nan", "one row": "are the same|cannot be scaled"}[
            what
        ]
        bad = np.load(folder / "rows.npy")
        bad[17, 3] = np.nan
        np.save(folder / "rows.npy", bad if what == "NaN" else bad[:1])
        if what == "nothing":
            (folder / "rows.npy").unlink()
    with pytest.raises(TrainError, match=words):
        train(folder, tmp_path / "run", small())
    assert not (tmp_path / "run").exists(), "nothing is begun"


def test_a_checkpoint_of_another_config_is_one_sentence(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(rows, tmp_path, small(), _kill_at(25), threads=1)
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace("k_aux = 8", "k_aux = 9"))
    with pytest.raises(TrainError, match="is of a run with another config"):
        train(rows, tmp_path, resume=True)


def test_a_loss_that_is_no_longer_a_number_ends_the_run_with_its_step(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"no longer a number.*at step \d+ of"):
        train(rows, tmp_path, small(lr=1e30, unit_norm=False), threads=1)


def _kill_at(step: int) -> Any:
    def kill(entry: dict[str, Any]) -> None:
        if entry["step"] == step:
            raise KeyboardInterrupt

    return kill


def test_the_manifest_says_how_the_sae_was_made(rows: Path, tmp_path: Path) -> None:
    config = replace(small(), preset="quick")
    train(rows, tmp_path, config, threads=1)
    manifest = json.loads((tmp_path / "sae" / "manifest.json").read_text())
    assert manifest["training"]["k"] == 3 and manifest["preset"] == "quick" and manifest["hook"] == ""
    assert manifest["data"]["rows"] == 4000 and len(manifest["data"]["activations_sha256"]) == 64
    assert manifest["input_scale"]["factor"] > 0 and manifest["versions"]["torch"] == torch.__version__
