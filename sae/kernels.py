"""The sparse algebra of a TopK SAE, in plain PyTorch operations.

With K of F latents on, decoding and all weight gradients cost K/F of the dense product; only the encoder stays dense.
What makes it fast on a CPU:

- `topk_indices`: exact top-k by maxima over strided groups, twice, so that `torch.topk` only ever sees short rows;
- `ScreenedEncoder`: the encoder product in bfloat16, one chunk of tokens at a time into one reused buffer, keeps a few
  candidates more than k; only these are scored again in float32, so that the set kept is the one of float32;
- `decode_sparse` and `gather_dot`: an embedding bag with weights and its gradient by these weights;
- `TokensByLatent`: the kept latents sorted by latent, which makes a weight gradient a CSR matrix times a dense one,
  for any range of latents: no gradient as large as a weight matrix need exist.

Each function has a dense reference in the tests. Nothing here uses autograd.

Shapes: B tokens, D width of the residual stream, F latents, K kept latents, C candidates (K plus a margin), R latents
of a range.
"""

import torch
from torch import Tensor

GROUPS = 8
"""Width of a strided group in `topk_indices`."""

BIAS_COLUMNS = 32
"""Input columns that carry the encoder bias in `ScreenedEncoder`; a multiple of 32 keeps bfloat16 tiles full."""


def topk_indices(x_BF: Tensor, k: int) -> Tensor:
    """Indices (B, k), int64, unordered, of the k largest entries of each row; exact, ties broken arbitrarily.

    The k largest entries lie in the k groups with the largest maxima, so the search goes over the maxima first.
    """
    rows, width = x_BF.shape
    stride = width // GROUPS
    if width % GROUPS or stride < k:
        return x_BF.topk(k, sorted=False).indices
    grouped = x_BF.view(rows, GROUPS, stride)
    best_BK = topk_indices(grouped.amax(1), k)
    candidates = grouped.gather(2, best_BK[:, None].expand(-1, GROUPS, -1)).view(rows, GROUPS * k)
    winner_BK = candidates.topk(k, sorted=False).indices
    return (winner_BK // k) * stride + best_BK.gather(1, winner_BK % k)


def decode_sparse(indices_BK: Tensor, values_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Sum over K of `values * W_dec[indices]`, (B, D)."""
    return torch.nn.functional.embedding_bag(indices_BK, W_dec_FD, per_sample_weights=values_BK, mode="sum")


def gather_dot(x_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """Dot product of each row of x with the K rows of W it names, (B, K), without gathering those rows."""
    rows, k = indices_BK.shape
    offsets_B = torch.arange(0, rows * k, k, device=x_BD.device)
    bag_of = torch.arange(rows, device=x_BD.device).repeat_interleave(k)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_BD, W_FD, indices_BK.reshape(-1), offsets_B, bag_of, 0
    )
    return dots.view(rows, k)


class TokensByLatent:
    """The (token, latent) pairs of a batch sorted by latent: rows of `A_FB` in CSR form, for weight gradients."""

    def __init__(self, indices_BK: Tensor, d_sae: int):
        self.tokens, k = indices_BK.shape
        flat = indices_BK.reshape(-1)
        _, self._order = flat.int().sort(stable=True)
        self._token_of = (self._order // k).int()
        self.counts_F = torch.bincount(flat, minlength=d_sae)
        self._starts = torch.zeros(d_sae + 1, dtype=torch.int32, device=flat.device)
        self._starts[1:] = self.counts_F.cumsum(0)

    def sort(self, values_BK: Tensor) -> Tensor:
        """The values of the pairs in this order, flat."""
        return values_BK.reshape(-1)[self._order]

    def edges(self, size: int) -> list[int]:
        """Where ranges of `size` latents begin among the sorted pairs, and where the last one ends."""
        marks = torch.arange(0, len(self.counts_F) + size, size, device=self._starts.device)
        return [int(edge) for edge in self._starts[marks.clamp_(max=len(self.counts_F))].tolist()]

    def product(self, sorted_values: Tensor, dense_BD: Tensor, first: int, out_RD: Tensor, low: int, high: int) -> None:
        """Writes rows `first`.. of `A^T dense` into `out_RD`, A holding `sorted_values`; low and high from `edges`."""
        starts = self._starts[first : first + len(out_RD) + 1] - low
        matrix = torch.sparse_csr_tensor(
            starts, self._token_of[low:high], sorted_values[low:high], (len(out_RD), self.tokens)
        )
        torch.addmm(out_RD, matrix, dense_BD, beta=0, out=out_RD)


class ScreenedEncoder:
    """The k largest pre-activations of each token as float32 finds them, at the price of a bfloat16 product.

    Holds a low-precision copy of the encoder and its bias, which the owner refreshes after each update, and buffers.
    """

    def __init__(self, W_enc_FD: Tensor, b_enc_F: Tensor, *, margin: int, chunk: int, dtype: torch.dtype):
        d_sae, self.width = W_enc_FD.shape
        self.margin, self.chunk = margin, chunk
        self._W = torch.zeros(d_sae, self.width + BIAS_COLUMNS, dtype=dtype, device=W_enc_FD.device)
        self._pre = torch.empty(chunk, d_sae, dtype=dtype, device=W_enc_FD.device)
        self._x = torch.zeros(chunk, self.width + BIAS_COLUMNS, dtype=dtype, device=W_enc_FD.device)
        self._x[:, self.width :] = 1
        self.refresh(0, W_enc_FD)
        self.refresh_bias(b_enc_F)

    def refresh(self, first: int, W_RD: Tensor) -> None:
        """Takes over rows `first`.. of the encoder."""
        self._W[first : first + len(W_RD), : self.width].copy_(W_RD)

    def refresh_bias(self, b_enc_F: Tensor) -> None:
        """Takes over the bias, as two columns whose sum keeps twice the digits of one."""
        self._W[:, self.width].copy_(b_enc_F)
        self._W[:, self.width + 1].copy_(b_enc_F - self._W[:, self.width].float())

    def topk(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(indices, values), each (B, k): the largest `W_enc x + b_enc`, values in float32 and possibly negative."""
        candidates = min(k + self.margin, len(b_enc_F))
        found = []
        for chunk_BD in x_BD.split(self.chunk):
            rows = len(chunk_BD)
            self._x[:rows, : self.width].copy_(chunk_BD)
            torch.mm(self._x[:rows], self._W.t(), out=self._pre[:rows])
            found.append(topk_indices(self._pre[:rows], candidates))
        found_BC = torch.cat(found)
        pre_BC = gather_dot(x_BD, W_enc_FD, found_BC).add_(b_enc_F[found_BC])
        values_BK, kept_BK = pre_BC.topk(k, sorted=False)
        return found_BC.gather(1, kept_BK), values_BK
