"""What batchtopk settles among processes whose first guesses differ, and what it does where nothing is active."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sae.kernels import Encoder
from tests.train.thread_team import play
from train.distributed import ALONE, Team
from train.objectives import BatchTopK
from train.recipe import Recipe
from train.revival import RESTART
from train.start import first_weights
from train.step import SparseStep

D, F, B, K = 8, 64, 96, 3


def rows(seed: int = 0) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["data", "latents"])
@pytest.mark.parametrize("guesses", [(0.01, 3.0), (3.0, 0.01), (0.0, 50.0), (50.0, 60.0)])
def test_processes_that_guess_differently_choose_the_pairs_of_one(kind: Any, guesses: tuple[float, float]) -> None:
    x_BD, weight_FD = rows(), torch.nn.functional.normalize(torch.randn(F, D, dtype=torch.float64), dim=1)

    def chosen(team: Team, guess: float) -> set[tuple[int, int]]:
        own, part = team.part(F), team.rows(B)
        encoder = Encoder(weight_FD[own], torch.zeros(F)[own].double(), screen=torch.float64)
        objective = BatchTopK()
        objective.guess = guess
        while True:
            found = [objective.pairs(encoder, x_BD[part], {}, K)]
            if (settled := objective.settle(found, {}, K, B, team)) is not None:
                break
        tokens, latents = settled[0].token_P + part.start, settled[0].latent_P + own.start
        return set(zip(tokens.tolist(), latents.tolist(), strict=True))

    alone = chosen(ALONE, 0.5)
    assert len(alone) == K * B
    first, second = play(kind, lambda team: chosen(team, guesses[team.rank]))
    assert first | second == alone and not first & second


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "relu"])
@pytest.mark.parametrize("kind", ["data", "latents"])
def test_processes_start_at_the_weights_of_one(arch: Any, kind: Any) -> None:
    recipe = Recipe(arch=arch, k=K, initial_l0=6.0, dtype="float64")

    def start(team: Team) -> Tensor:
        return first_weights(F, rows().mean(0), recipe, 1, float(D), team, rows(), "cpu")["W_enc"]

    found = play(kind, start)
    whole = found[0] if kind == "data" else torch.cat(found)
    torch.testing.assert_close(whole, start(ALONE), rtol=1e-12, atol=0)


def test_a_batch_without_an_active_latent_leaves_the_threshold_alone() -> None:
    step = SparseStep.begin(F, torch.zeros(D), Recipe(arch="batchtopk", k=K), 0, variance=float(D))
    step.weights["threshold"].fill_(0.25)
    step.weights["b_enc"].fill_(-1e3)
    with step:
        gradient = step.gradient(rows().float())
        assert gradient.active == 0
        step.update(gradient, 1e-3)
    assert step.weights["threshold"].tolist() == [0.25] * F


def test_a_resampled_latent_can_be_active_again_whatever_its_threshold_was() -> None:
    step = SparseStep.begin(
        F,
        torch.zeros(D),
        Recipe(arch="jumprelu", initial_l0=8.0, dead_after=100),
        0,
        variance=float(D),
        sample_ND=rows(),
    )
    step.weights["log_threshold"][:4] = 9.0
    step.silent_F[:4] = 100
    live = step.weights["log_threshold"][4:].exp().log().mean()
    with step:
        assert step.resample(rows(), seed=0) == 4
        assert step.weights["log_threshold"][:4].exp().tolist() == pytest.approx([float(RESTART * live.exp())] * 4)
        gradient = step.gradient(rows().float())
    assert (torch.bincount(gradient.by_latent.latent_P[gradient.f_P > 0], minlength=F)[:4] > 0).all()
