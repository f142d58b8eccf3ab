"""The sparse algebra of a TopK SAE, in plain PyTorch operations.

With K of F latents on, decoding and all weight gradients cost K/F of the dense product; only the encoder stays dense.
What makes it fast on a CPU:

- `topk_indices`: exact top-k by maxima over strided groups, so that `torch.topk` only ever sees short rows;
- `Encoder`: where the CPU multiplies bfloat16 fast, the product in bfloat16 keeps a few candidates more than k, and
  only these are scored again in float32, so that the set kept is the one of float32;
- `decode_sparse` and `gather_dot`: an embedding bag with weights and its gradient by these weights;
- `TokensByLatent`: the kept latents sorted by latent, which makes a weight gradient a CSR matrix times a dense one,
  for any range of latents: no gradient as large as a weight matrix need exist.

Each function has a dense reference in the tests. Nothing here uses autograd.

Shapes: B tokens, D width of the residual stream, F latents, K kept latents, C candidates (K plus a margin), R latents
of a range.
"""

import threading
import warnings

import torch
from torch import Tensor

# Said at the first CSR tensor of a process; the one product used here is tested against a dense one.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

GROUPS = 8
"""Members of a strided group in `topk_indices`; a power of two."""

BIAS_COLUMNS = 32
"""Input columns that carry the encoder bias in `ScreenedEncoder`; a multiple of 32 keeps bfloat16 tiles full."""


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


def gather_dot(x_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """Dot product of each row of x with the K rows of W it names, (B, K), without gathering those rows."""
    rows, k = indices_BK.shape
    offsets_B = torch.arange(0, rows * k, k, device=x_BD.device)
    bag_of = torch.arange(rows, device=x_BD.device).repeat_interleave(k)
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_BD, W_FD, indices_BK.reshape(-1), offsets_B, bag_of, 0
    )
    return dots.view(rows, k)


class TokensByLatent:
    """The (token, latent) pairs of a batch sorted by latent: rows of `A_FB` in CSR form, for weight gradients."""

    def __init__(self, indices_BK: Tensor, d_sae: int):
        self.tokens, k = indices_BK.shape
        flat = indices_BK.reshape(-1)
        self._latent_of, self._order = flat.int().sort(stable=True)
        self._token_of = (self._order // k).int()
        self.counts_F = torch.bincount(flat, minlength=d_sae)
        self._starts = torch.zeros(d_sae + 1, dtype=torch.int32, device=flat.device)
        self._starts[1:] = self.counts_F.cumsum(0)

    def sort(self, values_BK: Tensor) -> Tensor:
        """The values of the pairs in this order, flat."""
        return values_BK.reshape(-1)[self._order]

    def latents(self, chosen: Tensor) -> Tensor:
        """The latents of the sorted pairs that `chosen` (bool) marks, with repetitions."""
        return self._latent_of[chosen]

    def edges(self, size: int) -> list[int]:
        """Where ranges of `size` latents begin among the sorted pairs, and where the last one ends."""
        marks = torch.arange(0, len(self.counts_F) + size, size, device=self._starts.device)
        return [int(edge) for edge in self._starts[marks.clamp_(max=len(self.counts_F))].tolist()]

    def product(self, sorted_values: Tensor, dense_BD: Tensor, first: int, out_RD: Tensor, low: int, high: int) -> None:
        """Writes rows `first`.. of `A^T dense` into `out_RD`, A holding `sorted_values`; low and high from `edges`."""
        starts = self._starts[first : first + len(out_RD) + 1] - low
        matrix = torch.sparse_csr_tensor(
            starts,
            self._token_of[low:high],
            sorted_values[low:high],
            (len(out_RD), self.tokens),
            check_invariants=False,
        )
        torch.addmm(out_RD, matrix, dense_BD, beta=0, out=out_RD)


class Encoder:
    """The k largest pre-activations of each token, exact in float32, at the price of a product in `screen`.

    With bfloat16 it keeps a copy of the encoder, refreshed by the owner after each update, finds `margin` candidates
    more than k with it and scores only these in float32. With float32 it uses the weights as they are. Calls may come
    from several threads at once; each has its own buffers.
    """

    def __init__(self, W_enc_FD: Tensor, b_enc_F: Tensor, *, screen: torch.dtype, margin: int = 8):
        self.W_enc_FD, self.b_enc_F = W_enc_FD, b_enc_F
        self.screen, self.margin = screen, margin
        self._own = threading.local()
        if screen != torch.float32:
            self._copy = torch.zeros(len(b_enc_F), W_enc_FD.shape[1] + BIAS_COLUMNS, dtype=screen)
            self.refresh(0, len(b_enc_F))

    def refresh(self, first: int, last: int) -> None:
        """Takes over changes of the latents from `first` up to `last`. The bias becomes two columns, whose sum keeps
        twice the digits of one."""
        if self.screen == torch.float32:
            return
        width = self.W_enc_FD.shape[1]
        copy, bias_R = self._copy[first:last], self.b_enc_F[first:last]
        copy[:, :width].copy_(self.W_enc_FD[first:last])
        copy[:, width].copy_(bias_R)
        copy[:, width + 1].copy_(bias_R - copy[:, width].float())

    def topk(self, x_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(indices, values), each (B, k), unordered: the largest `W_enc x + b_enc`, possibly negative."""
        rows, width = x_BD.shape
        if self.screen == torch.float32:
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

    def _buffer(self, name: str, rows: int, width: int) -> Tensor:
        """A (rows, width) piece of this thread's buffer: large allocations are the dearest part of a small product."""
        kept: Tensor | None = getattr(self._own, name, None)
        if kept is None or len(kept) < rows:
            kept = torch.empty(rows, width, dtype=self.screen)
            setattr(self._own, name, kept)
        return kept[:rows]
