"""What each kind of SAE computes with in training: which pairs of token and latent matter, and their gradients.

With h = W_enc (x - b_dec) + b_enc, g the gradient by an activation and c that of the sparsity term:

    topk       f = relu(h) of the k largest                                     Gao et al. 2024, arXiv 2406.04093
    batchtopk  f = relu(h) of the k * B largest of a batch; a threshold for     Bussmann et al. 2024, arXiv 2412.06410
               inference is the running mean of the smallest one kept
    relu       f = relu(h), c |f|_1                                             Bricken et al. 2023
    jumprelu   f = h where h > t, c |f|_0; a window of width w around t gives   Rajamanoharan et al. 2024, 2407.14435
               dt = -(t / w) g - c / w, the pseudo-derivative; t = exp(s) is
               kept positive by learning s
    gated      f = relu(exp(r) (h - b_enc) + b_mag) where h > 0, c |relu(h)|_1, Rajamanoharan et al. 2024, 2404.16014
               and relu(h) must reconstruct x with the decoder held fixed
    prolu      f = m where m > 0 and m + b > 0, m = h - b_enc, b = b_enc,       Taggart 2024
               c |f|_1; inside that gate dm = db = g (relu), or
               db = g m, dm = g (1 + m) (ste)

Nothing here makes a (tokens, latents) matrix of gradients: an inactive pair has none, save in jumprelu's window.

Shapes: C tokens of a chunk, D width, F latents, P pairs, sorted by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sae.kernels import Encoder
from train.distributed import Team
from train.recipe import Recipe

Weights = dict[str, Tensor]
GUESS = 0.8
"""Share of the last threshold above which batchtopk looks for candidates first."""
MEMORY = 0.99
"""Decay of the running mean that becomes batchtopk's threshold."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of a token (of the chunk or batch) and a latent, with the encoder's value before the activation."""

    token_P: Tensor
    latent_P: Tensor
    pre_P: Tensor
    tokens: int

    def starts(self) -> Tensor:
        """Where the pairs of each token begin."""
        counts_C = torch.bincount(self.token_P, minlength=self.tokens)
        return counts_C.cumsum(0) - counts_C

    def where(self, keep_P: Tensor) -> Pairs:
        """Those that `keep_P` marks."""
        return replace(self, token_P=self.token_P[keep_P], latent_P=self.latent_P[keep_P], pre_P=self.pre_P[keep_P])


@dataclass(frozen=True)
class Backward:
    """Gradients of pairs: by W_enc (x - b_dec), by the encoder's bias, and by the weights of this kind alone."""

    product_P: Tensor
    b_enc_P: Tensor
    extra: dict[str, Tensor]


class Objective(Protocol):
    """One kind of SAE. All methods see latents by their number in this process's slice."""

    extra: tuple[str, ...]
    """names of its own weights, (F,) each"""
    penalty: str
    """"" | "l1" | "l0": what its sparsity term counts"""

    def begin(self, weights: Weights, quantile_F: Tensor | None) -> None:
        """Sets the first biases or thresholds, so that a latent is on where W_enc x lies above `quantile_F`."""

    def prepare(self, encoder: Encoder, centred_CD: Tensor, k: int) -> None:
        """Looks at the first chunk of a batch before the others come."""

    def pairs(self, encoder: Encoder, centred_CD: Tensor, weights: Weights, k: int) -> Pairs:
        """The pairs of a chunk that may have an activation or a gradient."""

    def settle(self, chunks: list[Pairs], weights: Weights, k: int, tokens: int, team: Team) -> list[Pairs] | None:
        """Those that stay once all chunks of all processes are known; None: `pairs` was too choosy and goes again."""

    def forward(self, weights: Weights, pairs: Pairs) -> Tensor:
        """Activations (P,)."""

    def counted(self, weights: Weights, pairs: Pairs, f_P: Tensor) -> Tensor:
        """What the sparsity term sums over pairs, (P,)."""

    def backward(self, weights: Weights, pairs: Pairs, f_P: Tensor, d_f_P: Tensor, push: float) -> Backward:
        """Gradients from `d_f_P`, that by the activations, and `push`, that by what `counted` counts."""


class TopK:
    extra: tuple[str, ...] = ()
    penalty = ""

    def begin(self, weights: Weights, quantile_F: Tensor | None) -> None:
        pass

    def prepare(self, encoder: Encoder, centred_CD: Tensor, k: int) -> None:
        pass

    def pairs(self, encoder: Encoder, centred_CD: Tensor, weights: Weights, k: int) -> Pairs:
        tokens = len(centred_CD)
        latent_CK, pre_CK = encoder.topk(centred_CD, min(k, len(weights["b_enc"])))
        token_P = torch.arange(tokens, device=centred_CD.device).repeat_interleave(latent_CK.shape[1])
        return Pairs(token_P, latent_CK.flatten(), pre_CK.flatten(), tokens)

    def settle(self, chunks: list[Pairs], weights: Weights, k: int, tokens: int, team: Team) -> list[Pairs] | None:
        if team.shards == 1:
            return chunks
        pre_BK = torch.cat([chunk.pre_P.view(chunk.tokens, -1) for chunk in chunks])
        floor_B1 = team.gather(pre_BK, 1).topk(k, 1).values[:, -1:]
        marks = torch.split(pre_BK >= floor_B1, [chunk.tokens for chunk in chunks])
        return [chunk.where(mark.flatten()) for chunk, mark in zip(chunks, marks, strict=True)]

    def forward(self, weights: Weights, pairs: Pairs) -> Tensor:
        return pairs.pre_P.relu()

    def counted(self, weights: Weights, pairs: Pairs, f_P: Tensor) -> Tensor:
        return f_P

    def backward(self, weights: Weights, pairs: Pairs, f_P: Tensor, d_f_P: Tensor, push: float) -> Backward:
        d_pre_P = (d_f_P + push).mul_(f_P > 0)
        return Backward(d_pre_P, d_pre_P, {})


class BatchTopK(TopK):
    extra: tuple[str, ...] = ("threshold",)
    guess: float | None = None
    """where candidates are looked for; it costs or saves time and changes no result"""

    def prepare(self, encoder: Encoder, centred_CD: Tensor, k: int) -> None:
        if self.guess is None:
            _, best_CK = encoder.topk(centred_CD, min(8 * k, len(encoder.b_enc_F)))
            few = min(k * len(best_CK), best_CK.numel())
            self.guess = GUESS * max(float(best_CK.flatten().topk(few).values.min()), 0.0)

    def pairs(self, encoder: Encoder, centred_CD: Tensor, weights: Weights, k: int) -> Pairs:
        floor = torch.tensor(self.guess or 0.0, dtype=centred_CD.dtype, device=centred_CD.device)
        return Pairs(*encoder.above(centred_CD, floor), len(centred_CD))

    def settle(self, chunks: list[Pairs], weights: Weights, k: int, tokens: int, team: Team) -> list[Pairs] | None:
        if team.size > 1:  # each guessed from its own rows or latents: only above the highest guess is all known
            self.guess = float(team.gather(torch.tensor([self.guess or 0.0], dtype=torch.float64)).max())
        pre_P = torch.cat([chunk.pre_P for chunk in chunks])
        pre_P = pre_P[pre_P > (self.guess or 0.0)]
        keep = k * tokens
        found = int(team.sum_(torch.tensor(len(pre_P))))
        if found < keep and self.guess:
            self.guess = self.guess / 2 if self.guess > 1e-3 else 0.0
            return None
        if not found:
            return [chunk.where(chunk.pre_P > math.inf) for chunk in chunks]
        best_P = pre_P if len(pre_P) <= keep else pre_P.topk(keep, sorted=False).values
        floor = team.gather(best_P).topk(min(keep, found), sorted=False).values.min()
        self.guess = GUESS * float(floor)
        return [chunk.where(chunk.pre_P >= floor) for chunk in chunks]

    def follow(self, weights: Weights, smallest: Tensor, memory: float) -> None:
        """Takes the smallest activation of a batch into the threshold; infinity: there was none."""
        if bool(smallest.isfinite()):
            weights["threshold"].mul_(memory).add_((1 - memory) * smallest)


class ReLU(TopK):
    penalty = "l1"

    def begin(self, weights: Weights, quantile_F: Tensor | None) -> None:
        if quantile_F is not None:
            weights["b_enc"].copy_(-quantile_F)

    def pairs(self, encoder: Encoder, centred_CD: Tensor, weights: Weights, k: int) -> Pairs:
        return Pairs(*encoder.above(centred_CD, torch.zeros_like(weights["b_enc"][:1])), len(centred_CD))

    def settle(self, chunks: list[Pairs], weights: Weights, k: int, tokens: int, team: Team) -> list[Pairs] | None:
        return chunks


class JumpReLU(ReLU):
    extra: tuple[str, ...] = ("log_threshold",)
    penalty = "l0"

    def __init__(self, window: float):
        self.window = window

    def begin(self, weights: Weights, quantile_F: Tensor | None) -> None:
        first = self.window if quantile_F is None else quantile_F.clamp(min=self.window)
        weights["log_threshold"].copy_(torch.as_tensor(first).log())

    def pairs(self, encoder: Encoder, centred_CD: Tensor, weights: Weights, k: int) -> Pairs:
        floor_F = (weights["log_threshold"].exp() - self.window / 2).clamp_(min=0)
        return Pairs(*encoder.above(centred_CD, floor_F), len(centred_CD))

    def forward(self, weights: Weights, pairs: Pairs) -> Tensor:
        return pairs.pre_P * (pairs.pre_P > weights["log_threshold"].exp()[pairs.latent_P])

    def counted(self, weights: Weights, pairs: Pairs, f_P: Tensor) -> Tensor:
        return (f_P > 0).to(f_P.dtype)

    def backward(self, weights: Weights, pairs: Pairs, f_P: Tensor, d_f_P: Tensor, push: float) -> Backward:
        threshold_P = weights["log_threshold"].exp()[pairs.latent_P]
        inside_P = (pairs.pre_P - threshold_P).abs() < self.window / 2
        d_threshold_P = (threshold_P * d_f_P + push).mul_(inside_P).div_(-self.window)
        d_pre_P = d_f_P * (f_P > 0)
        return Backward(d_pre_P, d_pre_P, {"log_threshold": d_threshold_P * threshold_P})


class Gated(ReLU):
    extra: tuple[str, ...] = ("r_mag", "b_mag")

    def counted(self, weights: Weights, pairs: Pairs, f_P: Tensor) -> Tensor:
        return pairs.pre_P

    def forward(self, weights: Weights, pairs: Pairs) -> Tensor:
        r_P, b_P = weights["r_mag"][pairs.latent_P], weights["b_mag"][pairs.latent_P]
        return ((pairs.pre_P - weights["b_enc"][pairs.latent_P]) * r_P.exp() + b_P).relu_()

    def backward(self, weights: Weights, pairs: Pairs, f_P: Tensor, d_f_P: Tensor, push: float) -> Backward:
        d_mag_P = d_f_P * (f_P > 0)
        steep_P = weights["r_mag"][pairs.latent_P].exp().mul_(d_mag_P)
        d_r_P = (pairs.pre_P - weights["b_enc"][pairs.latent_P]).mul_(steep_P)
        gate_P = torch.full_like(d_f_P, push)
        return Backward(steep_P + gate_P, gate_P, {"r_mag": d_r_P, "b_mag": d_mag_P})

    def backward_gate(self, back: Backward, d_gate_P: Tensor) -> Backward:
        """With the gradient of the second reconstruction, that by relu(h)."""
        return replace(back, product_P=back.product_P + d_gate_P, b_enc_P=back.b_enc_P + d_gate_P)


class ProLU(ReLU):
    def __init__(self, *, straight_through: bool, plain: bool):
        self.straight_through, self.plain = straight_through, plain

    def pairs(self, encoder: Encoder, centred_CD: Tensor, weights: Weights, k: int) -> Pairs:
        floor_F = -weights["b_enc"] if self.plain else (-weights["b_enc"]).clamp_(min=0)
        return Pairs(*encoder.above(centred_CD, floor_F, bias=False), len(centred_CD))

    def forward(self, weights: Weights, pairs: Pairs) -> Tensor:
        if not self.plain:
            return pairs.pre_P
        return pairs.pre_P + weights["b_enc"][pairs.latent_P].clamp(min=0)

    def backward(self, weights: Weights, pairs: Pairs, f_P: Tensor, d_f_P: Tensor, push: float) -> Backward:
        g_P = d_f_P + push
        if not self.straight_through:
            return Backward(g_P, g_P, {})
        d_m_P, d_b_P = g_P * (1 + pairs.pre_P), g_P * pairs.pre_P
        if self.plain:
            plain_P = weights["b_enc"][pairs.latent_P] >= 0
            d_m_P, d_b_P = torch.where(plain_P, g_P, d_m_P), torch.where(plain_P, g_P, d_b_P)
        return Backward(d_m_P, d_b_P, {})


def objective_of(recipe: Recipe, variance: float) -> Objective:
    """The objective of a recipe, for inputs of that total variance."""
    match recipe.arch:
        case "topk":
            return TopK()
        case "batchtopk":
            return BatchTopK()
        case "relu":
            return ReLU()
        case "jumprelu":
            return JumpReLU(recipe.bandwidth * variance**0.5)
        case "gated":
            return Gated()
        case "prolu":
            return ProLU(straight_through=recipe.prolu_gradient == "ste", plain=recipe.prolu_plain)
