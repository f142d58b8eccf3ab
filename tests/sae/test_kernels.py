"""Every kernel against a dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.kernels import Encoder, TokensByLatent, decode_pairs, decode_sparse, dot_pairs, gather_dot, topk_indices


@settings(max_examples=30, deadline=None)
@given(width=st.sampled_from([7, 64, 512, 2048, 4096]), k=st.integers(1, 7), seed=st.integers(0, 99))
def test_topk_finds_what_sorting_whole_rows_finds(width: int, k: int, seed: int) -> None:
    x_BF = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    found_BK = topk_indices(x_BF, k)
    assert (found_BK.sort(1).values == x_BF.topk(k).indices.sort(1).values).all()


def test_topk_with_ties_names_k_different_entries() -> None:
    found_BK = topk_indices(torch.zeros(3, 4096), 32)
    assert all(len(set(row)) == 32 for row in found_BK.tolist())


def test_decode_and_gather_dot_equal_dense_products() -> None:
    W_FD, x_BD = torch.randn(50, 8), torch.randn(6, 8)
    indices_BK, values_BK = torch.randn(6, 50).topk(5).indices, torch.rand(6, 5)
    dense_BF = torch.zeros(6, 50).scatter_(1, indices_BK, values_BK)
    torch.testing.assert_close(decode_sparse(indices_BK, values_BK, W_FD), dense_BF @ W_FD)
    torch.testing.assert_close(gather_dot(x_BD, W_FD, indices_BK), (x_BD @ W_FD.t()).gather(1, indices_BK))


@pytest.mark.parametrize("size", [16, 50, 64])
def test_weight_gradients_range_by_range_equal_the_dense_product(size: int) -> None:
    indices_BK, values_BK, x_BD = torch.randn(6, 50).topk(5).indices, torch.rand(6, 5), torch.randn(6, 8)
    pairs = TokensByLatent(indices_BK.reshape(-1), torch.arange(6).repeat_interleave(5), 50)
    sorted_P, edges = values_BK.reshape(-1)[pairs.order_P], pairs.edges(size)
    start_FD = torch.randn(50, 8)
    out_FD = start_FD.clone()
    for number, first in enumerate(range(0, 50, size)):
        low, high = edges[number], edges[number + 1]
        pairs.add_product(sorted_P, x_BD, first, out_FD[first : first + size], low, high, pairs.token_P)
    dense_BF = torch.zeros(6, 50).scatter_(1, indices_BK, values_BK)
    torch.testing.assert_close(out_FD - start_FD, dense_BF.t() @ x_BD, atol=1e-6, rtol=1e-5)
    assert torch.bincount(pairs.latent_P, minlength=50).tolist() == (dense_BF > 0).sum(0).tolist()


def test_decoding_pairs_and_their_dots_equal_dense_products_also_for_rows_with_none() -> None:
    W_FD, x_BD = torch.randn(50, 8), torch.randn(4, 8)
    dense_BF = (torch.rand(4, 50) - 0.8).relu()
    dense_BF[1] = 0
    row_P, latent_P = dense_BF.nonzero(as_tuple=True)
    count_B = (dense_BF > 0).sum(1)
    decoded_BD = decode_pairs(latent_P, dense_BF[row_P, latent_P], count_B.cumsum(0) - count_B, W_FD)
    torch.testing.assert_close(decoded_BD, dense_BF @ W_FD)
    torch.testing.assert_close(dot_pairs(x_BD, W_FD, latent_P, row_P), (x_BD @ W_FD.t())[row_P, latent_P])


@pytest.mark.parametrize("screen", [torch.float32, torch.bfloat16])
def test_screening_keeps_the_latents_of_float32(screen: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    W_FD, b_F, x_BD = (torch.randn(*shape, generator=generator) for shape in [(512, 32), (512,), (40, 32)])
    encoder = Encoder(W_FD, b_F, screen=screen, margin=24)
    W_FD[100:200] *= 2
    encoder.refresh(100, 200)
    indices_BK, values_BK = encoder.topk(x_BD, 8)
    pre_BF = x_BD @ W_FD.t() + b_F
    assert (indices_BK.sort(1).values == pre_BF.topk(8).indices.sort(1).values).all()
    torch.testing.assert_close(values_BK, pre_BF.gather(1, indices_BK), rtol=1e-4, atol=1e-4)
