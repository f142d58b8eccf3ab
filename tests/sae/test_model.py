"""The SAE against the golden numbers of its normal form, and against dense algebra."""

import pytest
import torch

from sae.activations import dense
from sae.losses import fvu, l0, normalise_rows_, project_gradient_
from sae.model import SAE, Latents, SAEConfig


def golden(activation: str, k: int) -> SAE:
    """A fixture with exact dyadic weights: d 4, 8 latents."""
    sae = SAE(SAEConfig(d_in=4, d_sae=8, activation=activation, k=k))
    latents, inputs = range(8), range(4)
    sae.W_enc_FD.copy_(torch.tensor([[((5 * j + 4 * i + j * j * i) % 11 - 5) / 4 for i in inputs] for j in latents]))
    sae.W_dec_FD.copy_(torch.tensor([[((2 * j + 3 * i + 2 * j * i * i) % 9 - 4) / 4 for i in inputs] for j in latents]))
    sae.b_enc_F.copy_(torch.tensor([(j % 3 - 1) / 8 for j in latents]))
    sae.b_dec_D.copy_(torch.tensor([(i % 4 - 1) / 4 for i in inputs]))
    return sae


X = torch.tensor([1, -0.5, 2, 0.25])
ALL_POSITIVE = [0, 0, 1.25, 0.4375, 1.125, 0, 0, 1.3125]


@pytest.mark.parametrize(
    ("activation", "k", "f", "y"),
    [
        ("relu", 0, ALL_POSITIVE, [1.421875, -1.25, 0.21875, 2.171875]),
        ("topk", 3, [0, 0, 1.25, 0, 1.125, 0, 0, 1.3125], [1.203125, -1.46875, 0.65625, 1.953125]),
        ("topk", 6, ALL_POSITIVE, [1.421875, -1.25, 0.21875, 2.171875]),
    ],
)
def test_golden_latents_and_reconstructions(activation: str, k: int, f: list[float], y: list[float]) -> None:
    sae = golden(activation, k)
    latents = sae.encode(X.expand(2, 3, 4))
    assert (dense(latents, 8) == torch.tensor(f)).all()
    assert (sae.decode(latents) == torch.tensor(y)).all()
    assert (latents.values.diff(dim=-1) <= 0).all(), "strongest first"


def test_a_bfloat16_copy_and_bfloat16_input_give_the_latents_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = SAE(SAEConfig(d_in=16, d_sae=128, k=8), dtype=torch.bfloat16)
    for weight in stored.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    full = SAE(stored.config)
    full.load_state_dict(stored.state_dict())
    x_BD = torch.randn(20, 16, generator=generator).bfloat16()
    assert (stored.encode(x_BD).indices == full.encode(x_BD.float()).indices).all()
    assert (stored.encode(x_BD).values == full.encode(x_BD.float()).values).all()


def test_a_decoder_direction_is_the_reconstruction_of_one_unit_of_a_latent() -> None:
    sae = golden("topk", 3)
    one = Latents(torch.tensor([5]), torch.tensor([1.0]))
    assert (sae.decode(one) - sae.b_dec_D == sae.decoder_direction(5)).all()
    with pytest.raises(ValueError, match=r"no latent 8; this SAE has latents 0 to 7"):
        sae.decoder_direction(8)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"k": 9}, "k is 9"), ({"activation": "gelu"}, "gelu"), ({"activation": "relu", "k": 3}, "relu takes no k")],
)
def test_a_config_that_cannot_be_is_refused(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SAEConfig(**({"d_in": 4, "d_sae": 8, "k": 2} | values))


def test_fvu_is_zero_for_a_perfect_copy_and_one_for_the_mean() -> None:
    x_BD = torch.randn(50, 4)
    assert fvu(x_BD, x_BD) == 0
    torch.testing.assert_close(fvu(x_BD, x_BD.mean(0).expand(50, 4)), torch.tensor(1.0))
    assert l0(torch.tensor([[1.0, 0.0], [2.0, 3.0]])) == 1.5


def test_a_projected_gradient_is_orthogonal_to_its_decoder_row() -> None:
    W_FD, grad_FD = normalise_rows_(torch.randn(9, 6)), torch.randn(9, 6)
    torch.testing.assert_close(W_FD.norm(dim=1), torch.ones(9))
    torch.testing.assert_close((project_gradient_(grad_FD, W_FD) * W_FD).sum(1), torch.zeros(9), atol=1e-6, rtol=0)
