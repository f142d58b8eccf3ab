"""Figures of a finished SAE are the same whoever measures them: one process, readers of shares, holders of slices."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.model import SAE, SAEConfig
from tests.sae.reference import KINDS, D, F, make_sae
from tests.train.thread_team import play
from train.distributed import Team
from train.errors import LossError
from train.statistics import Measured, measure


def sliced(sae: SAE, team: Team) -> SAE:
    own = team.part(F)
    config: SAEConfig = replace(sae.config, d_sae=own.stop - own.start, k=min(sae.config.k, own.stop - own.start))
    return SAE.of(config, {name: w if name == "b_dec" else w[own] for name, w in sae.weights.items()})


@pytest.mark.parametrize("normalise", ["none", "layer_norm"])
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("kind", ["data", "latents"])
def test_processes_measure_what_one_measures(kind: Any, activation: str, normalise: str) -> None:
    sae = make_sae(activation, normalise)
    x_ND = 2 * torch.randn(501, D, generator=torch.Generator().manual_seed(1))
    x_ND[7] *= 100  # a median, unlike a mean, does not see it
    parts = [x_ND[:300], x_ND[300:500], x_ND[500:]]
    alone = measure(sae, parts)

    def one(team: Team) -> Measured:
        return measure(sliced(sae, team) if kind == "latents" else sae, parts, 2, team, sae.config.k)

    found = play(kind, one, 3)
    for each in found:
        assert each.fvu == pytest.approx(alone.fvu, rel=1e-5) and each.l0 == pytest.approx(alone.l0)
        assert each.stats.tokens == 501 and each.stats.resid_norm == alone.stats.resid_norm
    for name in ("max_F", "mean_on_F", "density_F"):
        values: list[Tensor] = [getattr(each.stats, name) for each in found]
        whole = torch.cat(values) if kind == "latents" else values[0]
        torch.testing.assert_close(whole, getattr(alone.stats, name), rtol=1e-5, atol=1e-6)


def test_numbers_that_are_none_are_one_sentence_for_all() -> None:
    sae = make_sae()
    sae.W_dec_FD[0, 0] = torch.nan
    x_ND = torch.randn(40, D)
    with pytest.raises(LossError, match="cannot be measured on 40 rows"):
        measure(sae, [x_ND])
    with pytest.raises(LossError, match="cannot be measured on 0 rows"):
        measure(sae, [])

    def fails(team: Team) -> bool:
        with pytest.raises(LossError):
            measure(sliced(sae, team), [x_ND], 1, team, sae.config.k)
        return True

    assert play("latents", fails) == [True, True]


def test_an_sae_of_given_weights_does_not_copy_them() -> None:
    sae = make_sae("jumprelu")
    again = SAE.of(sae.config, dict(sae.weights))
    assert all(again.weights[name].data_ptr() == weight.data_ptr() for name, weight in sae.weights.items())
    x_ND = torch.randn(9, D)
    assert torch.equal(again.decode(again.encode(x_ND)), sae.decode(sae.encode(x_ND)))
