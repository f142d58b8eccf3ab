"""Gradients against autograd, a known dictionary found again, and runs that survive a kill."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.checkpoint import load_sae
from sae.losses import auxk_target, normalised_mse, total_variance
from train.errors import TrainError
from train.metrics import read_metrics
from train.shards import FORMAT, VERSION, ShardReader, write_json, write_shard
from train.step import Recipe, SparseStep
from train.trainer import TrainConfig, TrainSummary, default_rate, train


def reference_gradients(step: SparseStep, x_BD: Tensor) -> dict[str, Tensor]:
    """Dense autograd in float64 of the loss in the module docstring of `train.step`, decoder gradient projected."""
    recipe = step.recipe
    w = {name: weight.double().requires_grad_() for name, weight in step.weights.items()}
    x_BD = x_BD.double()
    pre_BF = (x_BD - w["b_dec"]) @ w["W_enc"].t() + w["b_enc"]

    def keep(pre: Tensor, k: int) -> Tensor:
        values, indices = pre.topk(k)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    y_BD = keep(pre_BF, recipe.k) @ w["W_dec"] + w["b_dec"]
    loss = normalised_mse(x_BD, y_BD, recipe.variance)
    dead_F = step.silent_F >= recipe.dead_after
    if dead_F.any():
        target_BD = auxk_target(x_BD, y_BD)
        aux_BD = keep(pre_BF[:, dead_F], min(recipe.k_aux, int(dead_F.sum()))) @ w["W_dec"][dead_F]
        loss = loss + recipe.aux_coefficient * normalised_mse(target_BD, aux_BD, total_variance(target_BD))
    loss.backward()
    found = {name: weight.grad for name, weight in w.items() if weight.grad is not None}
    unit_FD = w["W_dec"].detach()
    found["W_dec"] -= (found["W_dec"] * unit_FD).sum(1, keepdim=True) * unit_FD
    return found


@pytest.mark.parametrize("dead", [0, 5, 40])
def test_one_update_is_adam_on_the_gradients_of_autograd(dead: int) -> None:
    generator = torch.Generator().manual_seed(dead)
    x_BD = torch.randn(300, 12, generator=generator)
    recipe = Recipe(k=4, k_aux=6, aux_coefficient=0.5, dead_after=100, variance=12.0)
    with SparseStep.begin(96, x_BD.mean(0), recipe, seed=1, threads=2) as step:
        step.weights["b_enc"].normal_(std=0.1, generator=generator)
        step.weights["W_enc"].add_(torch.randn(96, 12, generator=generator), alpha=0.1)
        step.silent_F[3 : 3 + dead] = 100
        expected = reference_gradients(step, x_BD)
        gradient = step.gradient(x_BD)
        step.update(gradient, lr=1e-3)
    torch.testing.assert_close(gradient.b_enc_F.double(), expected["b_enc"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.b_dec_D.double(), expected["b_dec"], rtol=1e-4, atol=1e-6)
    for name, wanted in expected.items():  # the first moment after one step is a tenth of the gradient
        torch.testing.assert_close(10 * step.first_moments[name].double(), wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(1000 * step.second_moments[name].double(), wanted**2, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(step.weights["W_dec"].norm(dim=1), torch.ones(96))


def make_activations(folder: Path, rows: int, d: int = 16, atoms: int = 32) -> Tensor:
    """Rows that are sums of 3 of `atoms` unit directions around a mean far from 0; the directions come back."""
    generator = torch.Generator().manual_seed(0)
    atoms_FD = torch.nn.functional.normalize(torch.randn(atoms, d, generator=generator), dim=1)
    chosen = torch.stack([torch.randperm(atoms, generator=generator)[:3] for _ in range(rows)])
    strengths = 5 + 5 * torch.rand(rows, 3, generator=generator)
    rows_ND = (atoms_FD[chosen] * strengths[..., None]).sum(1) + 20
    folder.mkdir()
    count = torch.arange(rows)
    shards = [
        write_shard(folder, i, rows_ND[i::4].contiguous(), count[i::4], count[i::4], count[i::4]) for i in range(4)
    ]
    manifest = {"hook": "blocks.0.hook_resid_post", "d_in": d, "shards": shards, "done": True}
    write_json(folder / "manifest.json", {"format": FORMAT, "version": VERSION} | manifest)
    return atoms_FD


SMALL = TrainConfig(
    latents=64, k=3, tokens=20_000, batch=256, lr=3e-3, checkpoint_every=20, dead_after=4000, stats_rows=4000
)


def test_a_known_dictionary_is_found_again(tmp_path: Path) -> None:
    atoms_FD = make_activations(tmp_path / "a", 12_000, d=24, atoms=24)
    config = TrainConfig(latents=48, k=3, tokens=250_000, batch=512, lr=4e-3, dead_after=20_000, stats_rows=4000)
    summary = train(tmp_path / "a", tmp_path / "run", config, threads=1)
    sae = load_sae(tmp_path / "run" / "sae")
    best = (atoms_FD @ sae.W_dec_FD.t()).max(1).values
    assert best.median() > 0.97 and summary.fvu < 0.1
    assert sae.stats is not None and sae.stats.tokens == 4000
    norms_N = ShardReader(tmp_path / "a", config.seed).batch(0, 4000).norm(dim=1)
    assert sae.stats.resid_norm == pytest.approx(float(norms_N.median())), "in the model's own units"
    assert sae.manifest["metrics"]["fvu"] == summary.fvu and sae.config.hook == "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, TrainSummary]:
    folder = tmp_path_factory.mktemp("whole")
    make_activations(folder / "a", 6000)
    return folder / "a", folder / "run", train(folder / "a", folder / "run", SMALL, threads=2)


def test_a_killed_run_resumes_to_the_same_bits(whole: tuple[Path, Path, TrainSummary], tmp_path: Path) -> None:
    activations, unbroken, summary = whole

    def kill(entry: dict[str, object]) -> None:
        if entry["step"] == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(activations, tmp_path, SMALL, kill, threads=1)
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == [
        "000000020.safetensors",
        "000000040.safetensors",
    ]
    torch.rand(7)
    assert train(activations, tmp_path, resume=True, threads=2) == summary
    for name in ("sae.safetensors", "stats.safetensors", "cfg.json", "manifest.json"):
        assert (tmp_path / "sae" / name).read_bytes() == (unbroken / "sae" / name).read_bytes(), name
    steps = [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [entry["step"] for entry in read_metrics(unbroken / "metrics.jsonl")] == sorted(set(steps))


def test_a_damaged_last_checkpoint_costs_only_the_steps_since_the_one_before(
    whole: tuple[Path, Path, TrainSummary], tmp_path: Path
) -> None:
    activations, unbroken, _ = whole

    def kill(entry: dict[str, object]) -> None:
        if entry["step"] == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(activations, tmp_path, SMALL, kill, threads=2)
    file = tmp_path / "checkpoints" / "000000040.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    train(activations, tmp_path, resume=True, threads=2)
    assert (tmp_path / "sae/sae.safetensors").read_bytes() == (unbroken / "sae/sae.safetensors").read_bytes()


def test_a_folder_with_a_run_is_refused_and_resume_reads_a_finished_one(whole: tuple[Path, Path, TrainSummary]) -> None:
    activations, unbroken, summary = whole
    with pytest.raises(TrainError, match="already holds a run"):
        train(activations, unbroken, SMALL)
    assert train(activations, unbroken, SMALL, resume=True) == summary
    with pytest.raises(TrainError, match="has k = 3, not 4"):
        train(activations, unbroken, TrainConfig(latents=64, k=4), resume=True)


def test_the_summary_is_what_the_sae_on_disk_does(whole: tuple[Path, Path, TrainSummary]) -> None:
    activations, unbroken, summary = whole
    sae = load_sae(unbroken / "sae")
    x_ND = ShardReader(activations, SMALL.seed).batch(0, 4000)
    latents = sae.encode(x_ND)
    fvu = (x_ND - sae.decode(latents)).pow(2).sum() / (x_ND - x_ND.mean(0)).pow(2).sum()
    assert float(fvu) == pytest.approx(summary.fvu, rel=1e-3)
    assert float((latents.values > 0).sum(1).float().mean()) == pytest.approx(summary.l0)
    assert sae.stats is not None
    torch.testing.assert_close(sae.stats.max_F.max(), latents.values.max(), rtol=1e-4, atol=1e-4)
    assert summary.steps == 79 and summary.tokens == 79 * 256
    assert json.loads((unbroken / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 79


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TrainConfig(latents=8, k=9), "k is 9, more than the 8 latents"),
        (TrainConfig(batch=0), "batch is 0"),
        (TrainConfig(lr=-1.0), "learning rate is -1"),
        (TrainConfig(screen="int3"), "screen is 'int3'"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(tmp_path: Path, config: TrainConfig, words: str) -> None:
    make_activations(tmp_path / "a", 100)
    with pytest.raises(TrainError, match=words):
        train(tmp_path / "a", tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_every_default_is_chosen_for_a_quick_run() -> None:
    config = TrainConfig.quick().resolve(384, quick=True)
    assert config.latents == 3072 and config.k_aux == 192 and config.dead_after == 70_000
    assert config.lr == pytest.approx(10 * 2e-4 / (3072 / 2**14) ** 0.5) and config.screen in ("bfloat16", "float32")
    assert (
        config.rate(0) < config.lr == config.rate(config.steps // 2)
        and 0 < config.rate(config.steps - 1) < config.lr / 50
    )


def test_the_default_rate_is_the_published_law_in_long_runs_and_higher_in_short_ones() -> None:
    assert default_rate(2**14, 10**9) == pytest.approx(2e-4)
    assert default_rate(2**16, 25_000_000) == pytest.approx(2e-4)
    assert default_rate(2**14, 1000) == pytest.approx(2e-3)
