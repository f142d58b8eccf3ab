"""The gradient of one batch, by hand: pairs of token and latent, what they do, and how the loss changes with it.

Three passes over the chunks of a batch, with what several processes must settle between them: which pairs there are,
their part of the reconstruction, and their gradients by its error.

Shapes: B tokens, C tokens of a chunk, D width, F latents (of this process), G prefixes, P pairs, N = G * B errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.kernels import TokensByLatent, decode_pairs, dot_pairs
from train.errors import LossError
from train.objectives import Gated, Pairs
from train.revival import Revival, revive

if TYPE_CHECKING:
    from train.step import SparseStep


@dataclass(frozen=True)
class Gradient:
    """The gradient of a batch in factored form, summed over its tokens, for a loss of |x - y|^2 / 2."""

    tokens: int
    """of this process"""
    by_latent: TokensByLatent
    f_P: Tensor
    """activations, sorted by latent; all gradients of pairs likewise"""
    product_P: Tensor
    b_enc_F: Tensor
    extra: dict[str, Tensor]
    """(F,) each"""
    column_P: Tensor
    """row of `errors_ND` that holds the error each pair answers for"""
    errors_ND: Tensor
    """y - x; with prefixes, for each of them the mean over it and all longer ones"""
    centred_BD: Tensor
    error_BD: Tensor
    """y - x of the whole dictionary"""
    revival: Revival | None
    losses: dict[str, float] = field(default_factory=dict)
    """means over the tokens of all processes: `reconstruction` (the FVU where V is that of the data), `sparsity`"""
    active: int = 0
    """active pairs of all processes"""


def batch_gradient(step: SparseStep, x_BD: Tensor, k: int, coefficient: float) -> Gradient:
    """The gradient of the loss on the rows of this process. Raises `LossError` where the loss is not finite."""
    tokens = len(x_BD)
    centred_BD = x_BD.to(step.device, step.weights["b_dec"].dtype) - step.weights["b_dec"]
    chunks = _pairs(step, centred_BD, k)
    numbers = range(len(chunks))
    bounds = [slice(i * step.chunk, min((i + 1) * step.chunk, tokens)) for i in numbers]
    y_GBD = centred_BD.new_empty(step.prefixes, tokens, step.d_in)
    gate_BD = centred_BD.new_empty(tokens, step.d_in) if isinstance(step.objective, Gated) else None

    def reconstruct(number: int) -> tuple[Tensor, Tensor]:
        pairs = chunks[number]
        f_P, starts_C = step.objective.forward(step.weights, pairs), pairs.starts()
        group_P = step.prefix_of_F[pairs.latent_P] if step.prefixes > 1 else None
        for group in range(step.prefixes):
            part_P = f_P if group_P is None else f_P * (group_P == group)
            y_GBD[group, bounds[number]] = decode_pairs(pairs.latent_P, part_P, starts_C, step.weights["W_dec"])
        if gate_BD is not None:
            gate_BD[bounds[number]] = decode_pairs(pairs.latent_P, pairs.pre_P, starts_C, step.weights["W_dec"])
        return f_P, step.objective.counted(step.weights, pairs, f_P)

    activated = step.each(reconstruct, numbers)
    step.team.sum_(y_GBD, "shards")
    if gate_BD is not None:
        step.team.sum_(gate_BD, "shards")
    push = 0.0
    if step.objective.penalty:
        push = coefficient * (step.variance**0.5 if step.objective.penalty == "l1" else step.variance) / 2

    def differentiate(number: int) -> tuple[Any, Tensor, Tensor]:
        pairs, rows, (f_P, _) = chunks[number], bounds[number], activated[number]
        errors_GCD = y_GBD[:, rows].cumsum_(0) if step.prefixes > 1 else y_GBD[:, rows]
        errors_GCD -= centred_BD[rows]
        own = [torch.linalg.vector_norm(error_CD).pow(2) for error_CD in errors_GCD]
        last_CD = errors_GCD[-1].clone() if step.prefixes > 1 else errors_GCD[-1]
        row_P = pairs.token_P + rows.start
        if step.prefixes > 1:  # each group of latents answers for the mean error of all prefixes it is part of
            errors_GCD.copy_(errors_GCD.flip(0).cumsum(0).flip(0).div_(step.prefixes))
            row_P = row_P + step.prefix_of_F[pairs.latent_P] * tokens
        d_f_P = dot_pairs(y_GBD.view(-1, step.d_in), step.weights["W_dec"], pairs.latent_P, row_P)
        back = step.objective.backward(step.weights, pairs, f_P, d_f_P, push)
        if gate_BD is not None:
            assert isinstance(step.objective, Gated)
            gate_BD[rows] -= centred_BD[rows]
            own.append(torch.linalg.vector_norm(gate_BD[rows]).pow(2))
            d_gate_P = dot_pairs(gate_BD, step.weights["W_dec"], pairs.latent_P, pairs.token_P + rows.start)
            back = step.objective.backward_gate(back, d_gate_P)
        return (back, row_P, last_CD), f_P, torch.stack(own)

    parts = step.each(differentiate, numbers)
    squares = torch.stack([part[2] for part in parts]).sum(0)
    f_P = torch.cat([part[1] for part in parts])
    backs, columns = [part[0][0] for part in parts], [part[0][1] for part in parts]
    error_BD = y_GBD[0] if step.prefixes == 1 else torch.cat([part[0][2] for part in parts])
    latent_P = torch.cat([pairs.latent_P for pairs in chunks])
    token_P = torch.cat([pairs.token_P + rows.start for pairs, rows in zip(chunks, bounds, strict=True)])

    def by_latent(values: Sequence[Tensor]) -> Tensor:
        return torch.bincount(latent_P, weights=torch.cat(list(values)), minlength=step.d_sae).to(f_P.dtype)

    grouped = TokensByLatent(latent_P, token_P, step.d_sae)
    counted = torch.stack([part[1].sum() for part in activated]).sum()
    tally = torch.cat([torch.stack([counted, (f_P > 0).sum().to(counted.dtype)]).double(), squares.double()])
    step.team.sum_(tally[:2])
    step.team.sum_(tally[2:], "readers")
    everyone = tokens * step.team.readers
    if not math.isfinite(float(tally.sum())):
        raise LossError("the loss is no longer a number", "lower --lr, and look at the activations for NaN")
    losses = {"reconstruction": float(tally[1 + step.prefixes]) / (everyone * step.variance)}
    if step.prefixes > 1:
        losses["prefixes"] = float(tally[2 : 2 + step.prefixes].mean()) / (everyone * step.variance)
    if gate_BD is not None:
        losses["gate"] = float(tally[-1]) / (everyone * step.variance)
    if push:
        losses["sparsity"] = 2 * push * float(tally[0]) / (everyone * step.variance)
    dead_M = (step.silent_F >= step.recipe.dead_after).nonzero().squeeze(1)
    chunked: Any = step.for_chunks
    revival = revive(step.recipe, step.k_aux, step.weights, dead_M, centred_BD, error_BD, chunked, step.team)
    return Gradient(
        tokens=tokens,
        by_latent=grouped,
        f_P=f_P[grouped.order_P],
        product_P=torch.cat([back.product_P for back in backs])[grouped.order_P],
        b_enc_F=by_latent([back.b_enc_P for back in backs]),
        extra={name: by_latent([back.extra[name] for back in backs]) for name in backs[0].extra},
        column_P=torch.cat(columns)[grouped.order_P].int(),
        errors_ND=y_GBD.view(-1, step.d_in),
        centred_BD=centred_BD,
        error_BD=error_BD,
        revival=revival,
        losses=losses,
        active=int(tally[1]),
    )


def _pairs(step: SparseStep, centred_BD: Tensor, k: int) -> list[Pairs]:
    """The pairs of each chunk that take part."""
    step.objective.prepare(step.encoder, centred_BD[: step.chunk], k)
    everyone = len(centred_BD) * step.team.readers
    while True:
        found = step.for_chunks(
            lambda rows: step.objective.pairs(step.encoder, centred_BD[rows], step.weights, k), len(centred_BD)
        )
        if (settled := step.objective.settle(found, step.weights, k, everyone, step.team)) is not None:
            return settled
