"""The screened encoder finds the latents of the whole product, or says that it cannot tell."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import model as sae_model
from sae.activations import topk
from sae.model import SAE, SAEConfig
from sae.screen import Screen, available

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not available(), reason="this machine has no int8 kernel")

D, F, K = 48, 700, 12


def weights(seed: int, spread: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale_F1 = torch.exp(spread * torch.randn(F, 1, generator=generator))
    return torch.randn(F, D, generator=generator) * scale_F1, torch.randn(F, generator=generator) * 0.1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    size=st.sampled_from([1e-6, 1.0, 3e4]),
    outlier=st.sampled_from([1.0, 30.0, 1000.0]),
    rows=st.integers(1, 4),
    spread=st.sampled_from([0.0, 1.0]),
)
def test_latents_are_those_of_the_whole_product(
    seed: int, size: float, outlier: float, rows: int, spread: float
) -> None:
    W_enc_FD, b_enc_F = weights(seed, spread)
    x_BD = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed + 1))
    x_BD[:, 5] *= outlier
    x_BD *= size
    found = Screen(W_enc_FD).topk(x_BD, W_enc_FD, b_enc_F, K)
    if found is None:  # it may refuse where numbers lie close; the callers then compute all
        assert outlier > 1 or spread > 0
        return
    exact_BF = x_BD.double() @ W_enc_FD.double().T + b_enc_F.double()
    best = exact_BF.topk(K, 1)
    torch.testing.assert_close(found[1].double(), best.values, rtol=1e-5, atol=float(1e-5 * exact_BF.abs().max()))
    kth = best.values[:, -1:]
    assert (exact_BF.gather(1, found[0]) >= kth - 1e-5 * exact_BF.abs().max()).all()


def test_what_estimates_cannot_tell_apart_is_refused() -> None:
    row_D = torch.randn(D, generator=torch.Generator().manual_seed(0))
    W_enc_FD = row_D + 1e-4 * torch.randn(F, D, generator=torch.Generator().manual_seed(1))
    assert Screen(W_enc_FD).topk(row_D[None] * 2, W_enc_FD, torch.zeros(F), K) is None


def test_an_sae_gives_the_same_latents_with_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae_model, "LARGE", 1000)
    sae = SAE(SAEConfig(D, F, "topk", K, "blocks.0.hook_resid_post"))
    W_enc_FD, b_enc_F = weights(7)
    sae.W_enc_FD.copy_(W_enc_FD)
    sae.b_enc_F.copy_(b_enc_F)
    sae.b_dec_D.copy_(torch.randn(D, generator=torch.Generator().manual_seed(3)))
    calls: list[int] = []
    real = Screen.topk
    monkeypatch.setattr(Screen, "topk", lambda self, x, *rest: calls.append(len(x)) or real(self, x, *rest))  # type: ignore[func-returns-value]
    x_BTD = torch.randn(2, 2, D, generator=torch.Generator().manual_seed(4))
    whole = sae.encode(x_BTD)
    assert not calls
    sae.prepare()
    assert sae._screen is not None
    screened = sae.encode(x_BTD)
    assert calls == [4]
    assert real(sae._screen, x_BTD.view(4, D) - sae.b_dec_D, sae.W_enc_FD, sae.b_enc_F, K) is not None
    assert torch.equal(screened.indices, whole.indices)
    torch.testing.assert_close(screened.values, whole.values)
    sae.encode(torch.randn(1, 17, D))  # many tokens: the whole product
    assert calls == [4]


def test_small_and_other_encoders_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SAE(SAEConfig(D, F, "topk", K, "blocks.0.hook_resid_post"))
    small.prepare()
    monkeypatch.setattr(sae_model, "LARGE", 1000)
    relu = SAE(SAEConfig(D, F, "relu", 0, "blocks.0.hook_resid_post"))
    relu.prepare()
    assert small._screen is None and relu._screen is None
    assert topk(torch.randn(1, F), K).indices.shape == (1, K)
