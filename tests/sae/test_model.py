"""The SAE against the golden numbers of its normal form, and against dense algebra."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae.activations import dense
from sae.losses import (
    auxk,
    cosine,
    fvu,
    l0,
    l1,
    mse,
    normalise_rows_,
    normalised_mse,
    project_gradient_,
    total_variance,
)
from sae.model import SAE, Latents, SAEConfig
from tests.sae.reference import KINDS, NORMALISE, D, F, Reference, make_sae


def golden(config: SAEConfig, **extra: list[float] | float) -> SAE:
    """A fixture with exact dyadic weights: d 4, 8 latents."""
    sae = SAE(config)
    latents, inputs = range(8), range(4)
    sae.W_enc_FD.copy_(torch.tensor([[((5 * j + 4 * i + j * j * i) % 11 - 5) / 4 for i in inputs] for j in latents]))
    sae.W_dec_FD.copy_(torch.tensor([[((2 * j + 3 * i + 2 * j * i * i) % 9 - 4) / 4 for i in inputs] for j in latents]))
    sae.b_enc_F.copy_(torch.tensor([(j % 3 - 1) / 8 for j in latents]))
    sae.b_dec_D.copy_(torch.tensor([(i % 4 - 1) / 4 for i in inputs]))
    for name, values in extra.items():
        sae.weights[name].copy_(torch.tensor(values))
    return sae


X = torch.tensor([1, -0.5, 2, 0.25])
TOPK = golden(SAEConfig(4, 8, "topk", 3))
THRESHOLDS = [0.5, 0.5, 1.25, 0.25, 2, 0.5, 0.5, 1]
GATES = {"r_mag": [0, math.log(2)] * 4, "b_mag": [(1 - j % 3) / 8 for j in range(8)]}
ALL = {2: 1.25, 3: 0.4375, 4: 1.125, 7: 1.3125}
GOLDEN = {
    "relu": (golden(SAEConfig(4, 8, "relu", 0)), ALL, [1.421875, -1.25, 0.21875, 2.171875]),
    "topk": (TOPK, {2: 1.25, 4: 1.125, 7: 1.3125}, [1.203125, -1.46875, 0.65625, 1.953125]),
    "more than are positive": (golden(SAEConfig(4, 8, "topk", 6)), ALL, [1.421875, -1.25, 0.21875, 2.171875]),
    "batchtopk": (
        golden(SAEConfig(4, 8, "batchtopk", 3), threshold=1.1875),
        {2: 1.25, 7: 1.3125},
        [0.078125, -0.625, 1.5, 0.828125],
    ),
    "a latent equal to its threshold is off": (
        golden(SAEConfig(4, 8, "jumprelu", 0), threshold=THRESHOLDS),
        {3: 0.4375, 7: 1.3125},
        [0.296875, 0.21875, -0.1875, 1.046875],
    ),
    "gated": (
        golden(SAEConfig(4, 8, "gated", 0), **GATES),
        {2: 1, 3: 1.25, 4: 1.125, 7: 2.625},
        [2.15625, -0.71875, -0.84375, 2.90625],
    ),
    "layer norm": (
        golden(SAEConfig(4, 8, "topk", 3, normalise="layer_norm")),
        {0: 1.118551, 2: 0.91222, 7: 1.507001},
        [-0.371743, -0.098279, 2.526058, 0.429257],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_latents_and_reconstructions(name: str) -> None:
    sae, f, y = GOLDEN[name]
    x = X.expand(2, 3, 4)
    latents = sae.encode(x)
    wanted = torch.tensor([f.get(latent, 0.0) for latent in range(8)]).expand(2, 3, 8)
    torch.testing.assert_close(dense(latents, 8), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(sae.decode(latents, x), torch.tensor(y).expand(2, 3, 4), atol=1e-6, rtol=0)
    assert (latents.values.diff(dim=-1) <= 0).all(), "strongest first"
    assert latents.values.shape[-1] == (sae.config.k if sae.config.activation == "topk" else len(f))


def test_a_bias_too_small_for_the_race_changes_nothing_and_a_large_one_evicts() -> None:
    sae, _, _ = GOLDEN["layer norm"]
    pre_F = sae.pre_activations(X)
    small, large = (dense(sae.activate(pre_F + v * torch.eye(8)[1]), 8) for v in (3.0, 6.0))
    assert (small == dense(sae.encode(X), 8)).all()
    assert large[1] > 3.4 and large[2] == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20), normalise=st.sampled_from(NORMALISE), rows=st.integers(1, 4), size=st.floats(0.01, 100)
)
def test_every_kind_encodes_and_decodes_as_a_float64_loop(
    kind: str, seed: int, normalise: str, rows: int, size: float
) -> None:
    sae = make_sae(kind, normalise, seed % 11)
    x_BD = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * size
    of, latents = Reference(sae), sae.encode(x_BD)
    encoded = [of.encode(x_D) for x_D in x_BD.double().tolist()]
    assume(min(each.gap for each in encoded) > 1e-5 * max(size, 1))
    f_BF = torch.tensor([each.f for each in encoded])
    y_BD = torch.tensor([of.decode(each.f, x_D) for each, x_D in zip(encoded, x_BD.double().tolist(), strict=True)])
    close = {"atol": 1e-5 * max(size, 1), "rtol": 1e-4}
    torch.testing.assert_close(dense(latents, F), f_BF.float(), **close)
    torch.testing.assert_close(sae.decode(latents, x_BD), y_BD.float(), **close)
    assert (latents.values.diff(dim=-1) <= 0).all(), "strongest first"
    if kind != "topk":
        assert latents.values.shape[-1] == max(1, int((f_BF > 0).sum(1).max()))
        read_BF = torch.stack([sae.read(x_BD, latent) for latent in range(F)], -1)
        torch.testing.assert_close(read_BF, f_BF.float(), **close)


def test_a_position_that_lights_nothing_is_the_decoder_bias_and_no_rows_are_no_rows() -> None:
    sae = make_sae("jumprelu")
    sae.threshold_F.fill_(1e6)
    x_BD = torch.randn(3, D)
    latents = sae.encode(x_BD)
    assert latents.values.shape == (3, 1) and not latents.values.any()
    assert (sae.decode(latents) == sae.b_dec_D).all()
    nothing = sae.encode(x_BD[:0])
    assert nothing.values.shape == (0, 1) and sae.decode(nothing).shape == (0, D)


@pytest.mark.parametrize("normalise", ["layer_norm", "unit_norm"])
def test_normalising_forgets_mean_and_size_and_decoding_asks_for_them(normalise: str) -> None:
    sae, x_BD = make_sae("jumprelu", normalise), torch.randn(6, D, generator=torch.Generator().manual_seed(1))
    moved_BD = 50 * x_BD + 7
    f, moved = sae.encode(x_BD), sae.encode(moved_BD)
    assert (f.indices == moved.indices).all()
    torch.testing.assert_close(f.values, moved.values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.decode(moved, moved_BD), 50 * sae.decode(f, x_BD) + 7, atol=2e-2, rtol=1e-4)
    with pytest.raises(AssertionError, match=normalise):
        sae.decode(f)
    flat = sae.encode(torch.full((1, D), 3.0))
    assert flat.values.isfinite().all() and (sae.decode(flat, torch.full((1, D), 3.0)) == 3.0).all()
    norm = float((x_BD[0] - x_BD[0].mean()).norm())
    assert sae.scale_at(norm) == pytest.approx(float(sae.scale(x_BD)[0]), rel=1e-5)


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
    sae = TOPK
    one = Latents(torch.tensor([5]), torch.tensor([1.0]))
    assert (sae.decode(one) - sae.b_dec_D == sae.decoder_direction(5)).all()
    with pytest.raises(ValueError, match=r"no latent 8; this SAE has latents 0 to 7"):
        sae.decoder_direction(8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"k": 9}, "k is 9"),
        ({"activation": "gelu"}, "gelu"),
        ({"activation": "relu", "k": 3}, "relu takes no k"),
        ({"activation": "batchtopk", "k": 0}, "k is 0"),
        ({"normalise": "rms"}, "normalises by 'rms'"),
        ({"d_in": 1, "normalise": "layer_norm"}, "at least 2"),
        ({"prefixes": (4, 2)}, r"prefixes \[4, 2\]"),
        ({"prefixes": (2, 9)}, r"prefixes \[2, 9\]"),
        ({"prolu_plain": True}, "is topk"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SAEConfig(**({"d_in": 4, "d_sae": 8, "k": 2} | values))


def test_fvu_is_zero_for_a_perfect_copy_and_one_for_the_mean() -> None:
    x_BD = torch.randn(50, 4)
    assert fvu(x_BD, x_BD) == 0
    torch.testing.assert_close(fvu(x_BD, x_BD.mean(0).expand(50, 4)), torch.tensor(1.0))
    assert l0(torch.tensor([[1.0, 0.0], [2.0, 3.0]])) == 1.5


def test_losses_are_their_formulas() -> None:
    x_BD, y_BD = (torch.randn(30, 5, generator=torch.Generator().manual_seed(seed)).double() for seed in (1, 2))
    rows = list(zip(x_BD.tolist(), y_BD.tolist(), strict=True))
    distance = sum(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in rows) / 30
    angles = [sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y) for x, y in rows]
    assert float(mse(x_BD, y_BD)) == pytest.approx(distance)
    assert float(normalised_mse(x_BD, y_BD, 4.0)) == pytest.approx(distance / 4)
    assert float(cosine(x_BD, y_BD)) == pytest.approx(sum(angles) / 30)
    assert float(total_variance(x_BD)) == pytest.approx(float(x_BD.var(0, correction=0).sum()))
    assert float(auxk(x_BD, y_BD)) == pytest.approx(distance / float(total_variance(x_BD)))
    assert float(auxk(x_BD, x_BD.mean(0).expand_as(x_BD))) == pytest.approx(1)
    assert auxk(torch.ones(3, 2), torch.ones(3, 2)) == 0
    values_BK = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    assert l1(values_BK) == 3 and l1(values_BK, torch.tensor([[2.0, 9.0], [1.0, 2.0]])) == 5


def test_a_projected_gradient_is_orthogonal_to_its_decoder_row() -> None:
    W_FD, grad_FD = normalise_rows_(torch.randn(9, 6)), torch.randn(9, 6)
    torch.testing.assert_close(W_FD.norm(dim=1), torch.ones(9))
    torch.testing.assert_close((project_gradient_(grad_FD, W_FD) * W_FD).sum(1), torch.zeros(9), atol=1e-6, rtol=0)
