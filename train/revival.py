"""What brings latents back that have long been silent: AuxK, ghost gradients, or resampling.

    auxk      the k_aux largest dead latents of a token reconstruct what the live ones missed; this error, over the
              variance of what was missed, times a coefficient          Gao et al. 2024, appendix A.2
    ghost     all dead latents do, with exp instead of an activation function, scaled to half the length of what was
              missed; the error is weighted to be as large as the loss  Jermyn and Templeton 2024
    resample  now and then dead latents start again at inputs that are badly reconstructed, drawn with the squared
              loss; the encoder (and a threshold) at a fifth of the mean of live ones, biases at 0, Adam forgets them
                                                                        Bricken et al. 2023

Shapes: B tokens, C tokens of a chunk, D width, F latents, K kept latents, M dead latents (of this process's slice).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.kernels import Encoder, TokensByLatent, decode_sparse, gather_dot
from train.distributed import Team
from train.recipe import Recipe

Chunks = Callable[[Callable[[slice], object], int], list[object]]
"""Runs a function on each chunk of so many tokens."""
FEW = 4
"""Dead latents over k_aux up to which AuxK's weight gradients are dense products."""
RESTART = 0.2
"""Length of a resampled encoder row, as a share of the mean length of live ones."""


@dataclass(frozen=True)
class Dense:
    """Activations and gradients of all dead latents at all tokens, (B, M): right for a few latents."""

    acts_BM: Tensor
    d_pre_BM: Tensor

    def bias(self) -> Tensor:
        """Gradient by the encoder's bias, (M,)."""
        return self.d_pre_BM.sum(0)

    def products(self, begin: int, end: int, input_BD: Tensor, miss_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of encoder and decoder for the dead latents `begin` to `end`."""
        return self.d_pre_BM[:, begin:end].t() @ input_BD, self.acts_BM[:, begin:end].t() @ miss_BD


@dataclass(frozen=True)
class Kept:
    """The same for the kept latents of each token alone, as pairs sorted by latent."""

    by_latent: TokensByLatent
    acts_P: Tensor
    d_pre_P: Tensor
    dead: int

    def bias(self) -> Tensor:
        """Gradient by the encoder's bias, (M,)."""
        return self.d_pre_P.new_zeros(self.dead).index_add_(0, self.by_latent.latent_P.long(), self.d_pre_P)

    def products(self, begin: int, end: int, input_BD: Tensor, miss_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of encoder and decoder for the dead latents `begin` to `end`."""
        enc_RD, dec_RD = input_BD.new_zeros(2, end - begin, input_BD.shape[1])
        pairs = self.by_latent
        low, high = pairs.span(begin, end)
        pairs.add_product(self.d_pre_P, input_BD, begin, enc_RD, low, high, pairs.token_P)
        pairs.add_product(self.acts_P, miss_BD, begin, dec_RD, low, high, pairs.token_P)
        return enc_RD, dec_RD


@dataclass(frozen=True)
class Revival:
    """What dead latents did on a batch; gradients are for the loss over 2 (tokens are summed), before `factor`."""

    dead_M: Tensor
    found: Dense | Kept
    miss_BD: Tensor
    """gradient by the reconstruction of what the live latents missed"""
    missed: Tensor
    """number of tokens, sum of squares, then the sum over tokens, (2 + D,): of what the live latents missed"""
    loss: Tensor
    """squared length of `miss_BD`, summed"""

    def add_weights(self, first: int, factor: float, input_BD: Tensor, enc_RD: Tensor, dec_RD: Tensor) -> None:
        """Adds the gradients of both matrices for the latents from `first` on."""
        bounds = torch.tensor([first, first + len(enc_RD)], device=self.dead_M.device)
        begin, end = torch.searchsorted(self.dead_M, bounds).tolist()
        if begin < end:
            enc_MD, dec_MD = self.found.products(begin, end, input_BD, self.miss_BD)
            enc_RD.index_add_(0, self.dead_M[begin:end] - first, enc_MD, alpha=factor)
            dec_RD.index_add_(0, self.dead_M[begin:end] - first, dec_MD, alpha=factor)


def revive(
    recipe: Recipe,
    k_aux: int,
    weights: dict[str, Tensor],
    dead_M: Tensor,
    centred_BD: Tensor,
    error_BD: Tensor,
    for_chunks: Chunks,
    team: Team,
) -> Revival | None:
    """The part of the gradient that `recipe.revival` asks of the dead latents; None where it asks nothing now."""
    dead = int(team.sum_(torch.tensor(len(dead_M)), "shards"))
    wanted = recipe.revival == "ghost" or (recipe.revival == "auxk" and recipe.aux_coefficient > 0)
    if not wanted or dead == 0 or dead < recipe.aux_min_dead:
        return None
    miss_BD = torch.empty_like(error_BD)
    if recipe.revival == "ghost":
        found: Dense | Kept = _ghost(weights, dead_M, centred_BD, error_BD, miss_BD, for_chunks, team)
    else:
        found = _auxk(k_aux, dead, weights, dead_M, centred_BD, error_BD, miss_BD, for_chunks, team)
    squares = torch.linalg.vector_norm(error_BD).pow(2)
    missed = torch.cat([torch.stack([squares.new_tensor(len(error_BD)), squares]), error_BD.sum(0)])
    return Revival(dead_M, found, miss_BD, missed, torch.linalg.vector_norm(miss_BD).pow(2))


def _auxk(
    k_aux: int,
    dead: int,
    weights: dict[str, Tensor],
    dead_M: Tensor,
    centred_BD: Tensor,
    error_BD: Tensor,
    miss_BD: Tensor,
    for_chunks: Chunks,
    team: Team,
) -> Dense | Kept:
    """AuxK with `dead` latents among all processes; `miss_BD` is filled."""
    tokens, k = len(centred_BD), min(k_aux, len(dead_M))
    W_dec_FD, dtype = weights["W_dec"], weights["W_enc"].dtype
    encoder = Encoder(weights["W_enc"][dead_M], weights["b_enc"][dead_M], screen=dtype)
    indices_BK = torch.zeros(tokens, k, dtype=torch.int64, device=error_BD.device)
    acts_BK, d_pre_BK = error_BD.new_zeros(2, tokens, k)

    def activate(chunk: slice) -> None:
        if k:
            indices_BK[chunk], acts_BK[chunk] = encoder.topk(centred_BD[chunk], k)

    def reconstruct(chunk: slice) -> None:
        # A process may have no dead latent of its own and still learn what those of others miss.
        miss_BD[chunk] = decode_sparse(dead_M[indices_BK[chunk]], acts_BK[chunk], W_dec_FD) if k else 0

    def differentiate(chunk: slice) -> None:
        miss_BD[chunk] += error_BD[chunk]  # what was missed is -error
        if not k:
            return
        d_acts_CK = gather_dot(miss_BD[chunk], W_dec_FD, dead_M[indices_BK[chunk]])
        d_pre_BK[chunk] = d_acts_CK.mul_(acts_BK[chunk] > 0)

    for_chunks(activate, tokens)
    if team.shards > 1 and dead > k_aux:
        floor_B1 = team.gather(acts_BK, 1).topk(k_aux, 1).values[:, -1:]
        acts_BK.masked_fill_(acts_BK < floor_B1, 0)
    acts_BK.relu_()
    for_chunks(reconstruct, tokens)
    team.sum_(miss_BD, "shards")
    for_chunks(differentiate, tokens)
    if len(dead_M) <= FEW * k_aux:  # a dense product of a few latents is quicker than a sparse one of most of them
        acts_BM, d_pre_BM = error_BD.new_zeros(2, tokens, len(dead_M))
        return Dense(acts_BM.scatter_(1, indices_BK, acts_BK), d_pre_BM.scatter_(1, indices_BK, d_pre_BK))
    token_P = torch.arange(tokens, device=error_BD.device).repeat_interleave(k)
    grouped = TokensByLatent(indices_BK.flatten(), token_P, len(dead_M))
    return Kept(grouped, acts_BK.flatten()[grouped.order_P], d_pre_BK.flatten()[grouped.order_P], len(dead_M))


def _ghost(
    weights: dict[str, Tensor],
    dead_M: Tensor,
    centred_BD: Tensor,
    error_BD: Tensor,
    miss_BD: Tensor,
    for_chunks: Chunks,
    team: Team,
) -> Dense:
    """Ghost gradients; `miss_BD` is filled. All dead latents act at all tokens: this is dense by nature."""
    W_enc_MD, W_dec_MD, b_enc_M = (weights[name][dead_M] for name in ("W_enc", "W_dec", "b_enc"))
    acts_BM, d_pre_BM = error_BD.new_zeros(2, len(error_BD), len(dead_M))

    def reconstruct(chunk: slice) -> None:
        pre_CM = torch.addmm(b_enc_M, centred_BD[chunk], W_enc_MD.t())
        acts_BM[chunk] = pre_CM.clamp_(max=30).exp_()
        torch.mm(acts_BM[chunk], W_dec_MD, out=miss_BD[chunk])

    def differentiate(chunk: slice) -> None:
        length_C1 = torch.linalg.vector_norm(error_BD[chunk], dim=1, keepdim=True)
        scale_C1 = length_C1 / (2 * torch.linalg.vector_norm(miss_BD[chunk], dim=1, keepdim=True) + 1e-30)
        acts_BM[chunk] *= scale_C1
        miss_BD[chunk] *= scale_C1
        miss_BD[chunk] += error_BD[chunk]  # what was missed is -error
        torch.mm(miss_BD[chunk], W_dec_MD.t(), out=d_pre_BM[chunk]).mul_(acts_BM[chunk])

    for_chunks(reconstruct, len(error_BD))
    team.sum_(miss_BD, "shards")
    for_chunks(differentiate, len(error_BD))
    return Dense(acts_BM, d_pre_BM)


def revival_factor(recipe: Recipe, parts: list[Revival], variance: float, team: Team) -> tuple[float, float]:
    """(by what the gradients of `parts` are multiplied beside the main loss, the loss itself over the tokens)."""
    missed = team.sum_(torch.stack([part.missed for part in parts]).sum(0), "readers")
    loss = float(team.sum_(torch.stack([part.loss for part in parts]).sum(), "readers"))
    tokens, squares = float(missed[0]), float(missed[1])
    if recipe.revival == "ghost":
        factor = squares / max(loss, 1e-30)
    else:
        spread = (squares - float(missed[2:].pow(2).sum()) / tokens) / tokens
        factor = recipe.aux_coefficient * variance / max(spread, 1e-30)
    return factor, factor * loss / (tokens * variance)


def restart(
    weights: dict[str, Tensor],
    moments: list[dict[str, Tensor]],
    dead_F: Tensor,
    centred_BD: Tensor,
    error_BD: Tensor,
    seed: int,
    team: Team,
) -> int:
    """Gives every dead latent (`dead_F`, bool) a new start; how many there are among all processes."""
    centred_BD, error_BD = (
        (team.gather(centred_BD), team.gather(error_BD)) if team.readers > 1 else (centred_BD, error_BD)
    )
    rows_M = dead_F.nonzero().squeeze(1)
    of_each = team.gather(torch.tensor([len(rows_M)])) if team.shards > 1 else torch.tensor([len(rows_M)])
    total, before = int(of_each.sum()), int(of_each[: team.rank].sum()) if team.shards > 1 else 0
    if not total:
        return 0
    live_F = ~dead_F
    logs_F = weights.get("log_threshold", torch.zeros_like(weights["b_enc"]))
    of_live = [torch.linalg.vector_norm(weights["W_enc"], dim=1)[live_F].sum(), logs_F[live_F].sum(), live_F.sum()]
    length, log, live = team.sum_(torch.stack([total.to(error_BD.dtype) for total in of_live]), "shards").tolist()
    losses_B = error_BD.double().pow(2).sum(1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial((losses_B**2).clamp_(min=1e-300).cpu(), total, replacement=True, generator=generator)
    chosen_MD = centred_BD[drawn[before : before + len(rows_M)].to(centred_BD.device)]
    unit_MD = chosen_MD / torch.linalg.vector_norm(chosen_MD, dim=1, keepdim=True).clamp_(min=1e-12)
    weights["W_dec"][rows_M] = unit_MD
    weights["W_enc"][rows_M] = unit_MD * (RESTART * length / max(live, 1.0) if live else 1.0)
    for name in {"b_enc", "r_mag", "b_mag"} & set(weights):
        weights[name][rows_M] = 0
    if "log_threshold" in weights and live:
        weights["log_threshold"][rows_M] = log / live + math.log(RESTART)  # as short as the rows that must pass it
    for held in moments:
        for name, moment in held.items():
            if name != "b_dec":
                moment[rows_M] = 0
    return total
