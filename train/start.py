"""How an SAE starts: first directions, biases and thresholds.

Shapes: D width, F latents (of this process), N sample rows, R rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.kernels import Encoder, decode_pairs
from sae.losses import normalise_rows_
from train.distributed import ALONE, Team, block_seeds
from train.objectives import Objective, objective_of
from train.recipe import COUNTED, Recipe

SCALED_ON = 1024
"""Sample rows on which the first activations are scaled."""
STRETCH_CHUNK = 256
"""Of these, rows encoded at a time."""
BLOCK = 1024
"""Latents whose first directions come from one seed."""


def first_weights(
    d_sae: int,
    mean_D: Tensor,
    recipe: Recipe,
    seed: int,
    variance: float,
    team: Team,
    sample_ND: Tensor | None,
    device: str,
) -> dict[str, Tensor]:
    """The weights of this process before the first step (`SparseStep.begin`)."""
    recipe.check(d_sae)
    dtype = getattr(torch, recipe.dtype)
    own = team.part(d_sae)
    decoder_FD = _directions(own, len(mean_D), recipe, 2 * seed).to(device, dtype)
    encoder_FD = decoder_FD if recipe.tied_start else _directions(own, len(mean_D), recipe, 2 * seed + 1)
    weights = {"W_enc": encoder_FD.to(device, dtype, copy=True), "W_dec": decoder_FD}
    weights |= {"b_enc": decoder_FD.new_zeros(len(decoder_FD)), "b_dec": mean_D.to(device, dtype, copy=True)}
    objective = objective_of(recipe, variance)
    weights |= {name: decoder_FD.new_zeros(len(decoder_FD)) for name in objective.extra}
    quantile_F, stretch = None, 1.0
    if sample_ND is not None:
        centred_ND = sample_ND.to(device, dtype) - weights["b_dec"]
        if recipe.arch not in COUNTED:
            off = 1 - min(recipe.initial_l0, d_sae / 2) / d_sae
            rank = max(1, min(len(centred_ND), round(off * len(centred_ND))))
            blocks = [weights["W_enc"][i : i + BLOCK] for i in range(0, len(decoder_FD), BLOCK)]
            quantile_F = torch.cat([_between(centred_ND @ part.t(), rank) for part in blocks])
        objective.begin(weights, quantile_F)
        if recipe.scaled_start:
            stretch = _stretch(objective, weights, centred_ND[:SCALED_ON], recipe.k, team)
            weights["W_enc"] *= stretch
    objective.begin(weights, None if quantile_F is None else quantile_F * stretch)
    return weights


def _stretch(objective: Objective, weights: dict[str, Tensor], centred_ND: Tensor, k: int, team: Team) -> float:
    """By what the first activations must be multiplied to reconstruct these rows best.

    Many latents that overlap overshoot by far; unlearning that drives most of those with thresholds below them."""
    encoder = Encoder(weights["W_enc"], weights["b_enc"], screen=weights["W_enc"].dtype)
    alike = team if team.shards > 1 else ALONE  # readers all have the same sample
    parts = torch.split(centred_ND, STRETCH_CHUNK)
    objective.prepare(encoder, parts[0], k)
    settled = None
    while settled is None:
        found = [objective.pairs(encoder, part_CD, weights, k) for part_CD in parts]
        settled = objective.settle(found, weights, k, len(centred_ND), alike)
    dot = square = 0.0
    for part_CD, pairs in zip(parts, settled, strict=True):
        f_P = objective.forward(weights, pairs)
        y_CD = alike.sum_(decode_pairs(pairs.latent_P, f_P, pairs.starts(), weights["W_dec"]), "shards")
        dot, square = dot + float((part_CD * y_CD).sum()), square + float(y_CD.pow(2).sum())
    return dot / max(square, 1e-30)


def _between(pre_NR: Tensor, rank: int) -> Tensor:
    """Halfway between the values of that rank and the next in each column, so that rounding decides for none."""
    ordered_NR = pre_NR.sort(0).values
    return (ordered_NR[rank - 1] + ordered_NR[min(rank, len(ordered_NR) - 1)]) / 2


def screening_dtype(recipe: Recipe, weight_FD: Tensor) -> torch.dtype:
    """Precision of a topk encoder's first look."""
    fast = torch.cpu._is_avx512_bf16_supported() if weight_FD.device.type == "cpu" else True
    if weight_FD.dtype == torch.float64 or recipe.screen == "float32" or (recipe.screen == "auto" and not fast):
        return weight_FD.dtype
    return torch.bfloat16


def _directions(own: slice, width: int, recipe: Recipe, seed: int) -> Tensor:
    """Rows `own` of the first directions, the same whoever makes them."""
    block = width if recipe.directions == "orthogonal" else BLOCK
    numbers = range(own.start // block, -(-own.stop // block))
    made = []
    for generator in block_seeds(seed, numbers):
        random_RD = torch.randn(block, width, generator=generator)
        if recipe.directions == "orthogonal":
            random_RD = torch.linalg.qr(random_RD.double())[0].float()
        made.append(normalise_rows_(random_RD))
    skip = own.start - numbers.start * block
    return torch.cat(made)[skip : skip + own.stop - own.start]
