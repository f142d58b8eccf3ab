"""The sparse algebra of an SAE, in plain PyTorch operations.

With K of F latents on, decoding and all weight gradients cost K/F of the dense product; only the encoder stays dense.
Latents come as (B, K) where each token has as many, else as P pairs of a token and a latent, sorted by token.
What makes it fast on a CPU:

- `topk_indices`: exact top-k by maxima over strided groups, so that `torch.topk` only ever sees short rows;
- `Encoder`: where the CPU multiplies bfloat16 fast, the product in bfloat16 keeps a few candidates more than k, and
  only these are scored again in float32, so that the set kept is the one of float32;
- `decode_pairs` and `dot_pairs`: an embedding bag with weights and its gradient by these weights;
- `TokensByLatent`: the pairs sorted by latent, which makes a weight gradient a CSR matrix times a dense one,
  for any range of latents: no gradient as large as a weight matrix need exist.

On a GPU the same functions go to `sae/triton_kernels.py`, for weights in float32 and where Triton is installed.
Each function has a dense reference in the tests. Nothing here uses autograd.

Shapes: B tokens, D width of the residual stream, F latents, K kept latents, P pairs, C candidates (K plus a margin), R
latents of a range.
"""

import threading
import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# Said at the first CSR tensor of a process; the one product used here is tested against a dense one.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

GROUPS = 8
"""Members of a strided group in `topk_indices`; a power of two."""

BIAS_COLUMNS = 32
"""Input columns that carry the encoder bias in `ScreenedEncoder`; a multiple of 32 keeps bfloat16 tiles full."""


def triton_kernels(weight: Tensor) -> Any:
    """The module with the Triton versions where this weight is one for them, else None."""
    if not weight.is_cuda or weight.dtype != torch.float32:
        return None
    try:
        return import_module("sae.triton_kernels")
    except ImportError:
        return None


def topk_indices(x_BF: Tensor, k: int) -> Tensor:
    """Indices (B, k), int64, unordered, of the k largest entries of each row; exact, ties broken arbitrarily.

    The k largest entries lie in the k groups with the largest maxima, so the search goes over the maxima first.
    """
    rows, width = x_BF.shape
    stride = width // GROUPS
    if width % GROUPS or stride < 2 * k:
        return x_BF.topk(k, sorted=False).indices
    maxima = x_BF
    while maxima.shape[1] > stride:  # halves rather than one amax: these are long vector operations on any CPU
        half = maxima.shape[1] // 2
        maxima = torch.maximum(maxima[:, :half], maxima[:, half:])
    best_BK = topk_indices(maxima, k)
    members_G = torch.arange(0, width, stride, device=x_BF.device)
    members = (best_BK[:, None] + members_G[None, :, None]).view(rows, GROUPS * k)
    return members.gather(1, x_BF.gather(1, members).topk(k, sorted=False).indices)


def decode_sparse(indices_BK: Tensor, values_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Sum over K of `values * W_dec[indices]`, (B, D)."""
    return torch.nn.functional.embedding_bag(indices_BK, W_dec_FD, per_sample_weights=values_BK, mode="sum")


def decode_pairs(latent_P: Tensor, values_P: Tensor, starts_B: Tensor, W_dec_FD: Tensor) -> Tensor:
    """The same for pairs sorted by token, the first of each token at `starts_B`; 0 for a token without one."""
    if fast := triton_kernels(W_dec_FD):
        summed: Tensor = fast.decode_pairs(latent_P, values_P, starts_B, W_dec_FD)
        return summed
    return torch.nn.functional.embedding_bag(latent_P, W_dec_FD, starts_B, per_sample_weights=values_P, mode="sum")


def gather_dot(x_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """Dot product of each row of x with the K rows of W it names, (B, K), without gathering those rows."""
    rows, k = indices_BK.shape
    bag_of = torch.arange(rows, device=x_BD.device).repeat_interleave(k)
    return dot_pairs(x_BD, W_FD, indices_BK.reshape(-1), bag_of).view(rows, k)


def dot_pairs(x_BD: Tensor, W_FD: Tensor, latent_P: Tensor, row_P: Tensor) -> Tensor:
    """Dot product of row `row_P` of x with row `latent_P` of W, (P,)."""
    if fast := triton_kernels(W_FD):
        found: Tensor = fast.dot_pairs(x_BD, W_FD, latent_P, row_P)
        return found
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(x_BD, W_FD, latent_P, row_P[:0], row_P, 0)
    return dots


class TokensByLatent:
    """The (token, latent) pairs of a batch sorted by latent: rows of `A_FB` in CSR form, for weight gradients."""

    def __init__(self, latent_P: Tensor, token_P: Tensor, d_sae: int):
        self.latent_P, self.order_P = latent_P.int().sort(stable=True)
        """the latent of each pair, and where it stood before"""
        self.token_P = token_P[self.order_P].int()
        self._starts = torch.zeros(d_sae + 1, dtype=torch.int32, device=latent_P.device)
        self._starts[1:] = torch.bincount(latent_P, minlength=d_sae).cumsum(0)

    def edges(self, size: int) -> list[int]:
        """Where ranges of `size` latents begin among the sorted pairs, and where the last one ends."""
        d_sae = len(self._starts) - 1
        marks = torch.arange(0, d_sae + size, size, device=self._starts.device)
        return [int(edge) for edge in self._starts[marks.clamp_(max=d_sae)].tolist()]

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Where the sorted pairs of the latents from `first` up to `last` begin and end."""
        return int(self._starts[first]), int(self._starts[last])

    def add_product(
        self, sorted_P: Tensor, dense_ND: Tensor, first: int, out_RD: Tensor, low: int, high: int, column_P: Tensor
    ) -> None:
        """Adds rows `first`.. of `A^T dense` to `out_RD`, A holding `sorted_P` in the columns `column_P`, the row of
        `dense` of each sorted pair, int32; low and high from `edges` or `span`."""
        if fast := triton_kernels(out_RD):
            fast.add_product(self._starts, sorted_P, dense_ND, first, out_RD, column_P)
            return
        starts = self._starts[first : first + len(out_RD) + 1] - low
        shape = (len(out_RD), len(dense_ND))
        matrix = torch.sparse_csr_tensor(starts, column_P[low:high], sorted_P[low:high], shape, check_invariants=False)
        torch.addmm(out_RD, matrix, dense_ND, out=out_RD)


class Encoder:
    """The largest pre-activations of each token, exact in the dtype of the weights, at the price of one in `screen`.

    With bfloat16 it keeps a copy of the encoder, refreshed by the owner after each update, finds `margin` candidates
    more than k with it and scores only these in float32. In their own dtype it uses the weights as they are. Calls may
    come from several threads at once; each has its own buffers.
    """

    def __init__(self, W_enc_FD: Tensor, b_enc_F: Tensor, *, screen: torch.dtype, margin: int = 8):
        self.W_enc_FD, self.b_enc_F = W_enc_FD, b_enc_F
        self.screen, self.margin = screen, margin
        self._screens = screen != W_enc_FD.dtype
        self._own = threading.local()
        self._fast = triton_kernels(W_enc_FD) if self._screens else None
        if self._screens:
            width = W_enc_FD.shape[1] + (0 if self._fast else BIAS_COLUMNS)
            self._copy = torch.zeros(len(b_enc_F), width, dtype=screen, device=W_enc_FD.device)
            self.refresh(0, len(b_enc_F))

    def refresh(self, first: int, last: int) -> None:
        """Takes over changes of the latents from `first` up to `last`. The bias becomes two columns, whose sum keeps
        twice the digits of one."""
        if not self._screens:
            return
        width = self.W_enc_FD.shape[1]
        copy, bias_R = self._copy[first:last], self.b_enc_F[first:last]
        copy[:, :width].copy_(self.W_enc_FD[first:last])
        if self._fast:
            return
        copy[:, width].copy_(bias_R)
        copy[:, width + 1].copy_(bias_R - copy[:, width].float())

    def topk(self, x_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(indices, values), each (B, k), unordered: the largest `W_enc x + b_enc`, possibly negative."""
        if self._fast:
            screened: tuple[Tensor, Tensor] = self._fast.encode_topk(
                x_BD, self.W_enc_FD, self.b_enc_F, k, screen_FD=self._copy, margin=self.margin
            )
            return screened
        rows, width = x_BD.shape
        if not self._screens:
            pre_BF = self._buffer("pre", rows, len(self.b_enc_F))
            torch.addmm(self.b_enc_F, x_BD, self.W_enc_FD.t(), out=pre_BF)
            found_BK = topk_indices(pre_BF, k)
            return found_BK, pre_BF.gather(1, found_BK)
        padded = self._buffer("x", rows, width + BIAS_COLUMNS)
        padded[:, :width].copy_(x_BD)
        padded[:, width:] = 1
        pre_BF = self._buffer("pre", rows, len(self.b_enc_F))
        torch.mm(padded, self._copy.t(), out=pre_BF)
        found_BC = topk_indices(pre_BF, min(k + self.margin, len(self.b_enc_F)))
        pre_BC = gather_dot(x_BD, self.W_enc_FD, found_BC).add_(self.b_enc_F[found_BC])
        values_BK, kept_BK = pre_BC.topk(k, sorted=False)
        return found_BC.gather(1, kept_BK), values_BK

    def above(self, x_BD: Tensor, floor_F: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, latents, values), each (P,), sorted by row: where `W_enc x` (`bias`: plus b_enc) lies above a floor,
        (F,) or a scalar. The product is made with the weights as they are."""
        pre_BF = self._buffer("all", len(x_BD), len(self.b_enc_F), self.W_enc_FD.dtype)
        if bias:
            torch.addmm(self.b_enc_F, x_BD, self.W_enc_FD.t(), out=pre_BF)
        else:
            torch.mm(x_BD, self.W_enc_FD.t(), out=pre_BF)
        row_P, latent_P = (pre_BF > floor_F).nonzero(as_tuple=True)
        return row_P, latent_P, pre_BF[row_P, latent_P]

    def _buffer(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """A (rows, width) piece of this thread's buffer: large allocations are the dearest part of a small product."""
        kept: Tensor | None = getattr(self._own, name, None)
        if kept is None or len(kept) < rows:
            kept = torch.empty(rows, width, dtype=dtype or self.screen, device=self.W_enc_FD.device)
            setattr(self._own, name, kept)
        return kept[:rows]
