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

from sae.kernels import topk_indices
from train.distributed import Team
from train.recipe import Recipe

Chunks = Callable[[Callable[[slice], object], int], list[object]]
"""Runs a function on each chunk of so many tokens."""
RESTART = 0.2
"""Length of a resampled encoder row, as a share of the mean length of live ones."""


@dataclass(frozen=True)
class Revival:
    """What dead latents did on a batch; gradients are for the loss over 2 (tokens are summed), before `factor`."""

    dead_M: Tensor
    acts_BM: Tensor
    d_pre_BM: Tensor
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
        rows = self.dead_M[begin:end] - first
        enc_RD.index_add_(0, rows, self.d_pre_BM[:, begin:end].t() @ input_BD, alpha=factor)
        dec_RD.index_add_(0, rows, self.acts_BM[:, begin:end].t() @ self.miss_BD, alpha=factor)


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
    W_enc_MD, W_dec_MD, b_enc_M = (weights[name][dead_M] for name in ("W_enc", "W_dec", "b_enc"))
    tokens, k = len(centred_BD), min(k_aux, len(dead_M))
    acts_BM, d_pre_BM = error_BD.new_zeros(2, tokens, len(dead_M))
    y_BD, miss_BD = torch.empty_like(error_BD), torch.empty_like(error_BD)
    values_BK = error_BD.new_empty(tokens, k)
    indices_BK = torch.empty(tokens, k, dtype=torch.int64, device=error_BD.device)

    def activate(chunk: slice) -> None:
        pre_CM = torch.addmm(b_enc_M, centred_BD[chunk], W_enc_MD.t())
        if recipe.revival == "ghost":
            acts_BM[chunk] = pre_CM.clamp_(max=30).exp_()
        elif k:
            indices_BK[chunk] = kept_CK = topk_indices(pre_CM, k)
            values_BK[chunk] = pre_CM.gather(1, kept_CK)

    def reconstruct(chunk: slice) -> None:
        if recipe.revival == "auxk" and k:
            acts_BM[chunk].scatter_(1, indices_BK[chunk], values_BK[chunk].relu())
        torch.mm(acts_BM[chunk], W_dec_MD, out=y_BD[chunk])

    def differentiate(chunk: slice) -> None:
        if recipe.revival == "ghost":
            length_C1 = torch.linalg.vector_norm(error_BD[chunk], dim=1, keepdim=True)
            scale_C1 = length_C1 / (2 * torch.linalg.vector_norm(y_BD[chunk], dim=1, keepdim=True) + 1e-30)
            acts_BM[chunk] *= scale_C1
            y_BD[chunk] *= scale_C1
        torch.add(y_BD[chunk], error_BD[chunk], out=miss_BD[chunk])  # what was missed is -error
        steep_CM = acts_BM[chunk] if recipe.revival == "ghost" else acts_BM[chunk] > 0
        torch.mm(miss_BD[chunk], W_dec_MD.t(), out=d_pre_BM[chunk]).mul_(steep_CM)

    for_chunks(activate, tokens)
    if recipe.revival == "auxk" and team.shards > 1 and dead > k_aux:
        floor_B1 = team.gather(values_BK, 1).topk(k_aux, 1).values[:, -1:]
        values_BK.masked_fill_(values_BK < floor_B1, 0)
    for_chunks(reconstruct, tokens)
    team.sum_(y_BD, "shards")
    for_chunks(differentiate, tokens)
    squares = torch.linalg.vector_norm(error_BD).pow(2)
    missed = torch.cat([torch.stack([squares.new_tensor(tokens), squares]), error_BD.sum(0)])
    return Revival(dead_M, acts_BM, d_pre_BM, miss_BD, missed, torch.linalg.vector_norm(miss_BD).pow(2))


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
