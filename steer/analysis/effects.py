"""What each latent does to one number: gradient times contribution, set right halfway, checked by removal.

A tensor x (T, D) in the middle of a model is a sum of parts: for each active latent what it contributes at all
positions, the SAE's error and its bias. `metric` is a number that the model makes of x. The effect of a part c is what
the number loses when that part alone goes, m(x) - m(x - c). Three figures are given for it:

    gradient      c . grad m(x)              of every part, from one backward pass: right where m is a plane
    attribution   c . grad m(x - C / 2)      of the strongest parts by `gradient`; C is the sum of the c of its group
    removed       m(x) - m(x - c)            the effect itself, a forward pass each, of the parts asked for

Norms, attention and the softmax bend m within the length of one part, so that the plain gradient ranks too coarsely
(`docs/why.md` has the figures). Halfway to where the part is gone the gradient is right to second order. One pass a
part would cost more than removing it; so the strongest are dealt out like cards over `GROUPS` groups of `MEMBERS`,
strong ones apart, and a group goes halfway together: the midpoint rule of integrated gradients (Sundararajan et al.
2017, arXiv 1703.01365) on each group's own path. Long prompts, whose passes take long, get fewer groups. The joint path
of all parts at once, the usual one, is worse here than the plain gradient: it passes through tensors unlike any that
the model reads.

Suffixes: T tokens, D width, B runs, P pairs of an active latent and a position, K slots of a
position, N latents that are active somewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from sae.kernels import decode_pairs, dot_pairs
from sae.model import SAE

GROUPS = 16
MEMBERS = 4
_FEWEST = 4
_GROUP_TOKENS = 4096
"""Tokens of all groups' passes from which on there are fewer groups."""
TOKENS_AT_ONCE = 2048
"""Tokens of all runs that one pass through the model holds."""

Metric = Callable[[Tensor], Tensor]
"""(B, T, D) -> (B,): the number for each of B tensors."""


class LatentParts:
    """What an SAE's active latents contribute to x (T, D), `f_i * W_dec[i]` times the SAE's scale there, in pairs by
    position. `part_P` tells where in `latents_N` a pair's latent is."""

    def __init__(self, sae: SAE, x_TD: Tensor, readable_T: Tensor) -> None:
        """`readable_T` is False where the SAE is not read."""
        latents = sae.encode(x_TD)
        on_TK = (latents.values > 0) & readable_T[:, None]
        self.position_P = on_TK.nonzero()[:, 0]
        self.latent_P, self.activation_P = latents.indices[on_TK], latents.values[on_TK]
        self.latents_N, self.part_P = torch.unique(self.latent_P, return_inverse=True)
        self._W_dec_FD = sae.W_dec_FD.float()
        scale = sae.scale(x_TD)
        self._value_P = self.activation_P * (scale[self.position_P, 0] if isinstance(scale, Tensor) else scale)
        count_T = on_TK.sum(1)
        self._starts_T = count_T.cumsum(0) - count_T
        rest_TD = x_TD - sae.decode(latents, x_TD)
        self.error_TD = torch.where(readable_T[:, None], rest_TD, 0.0)
        """What the SAE does not explain, 0 where it is not read."""

    def activations(self, latent: int) -> Tensor:
        """(T,): the latent's activation at each position, 0 where it is off or the SAE is not read."""
        on_P = self.latent_P == latent
        zeros_T = self.activation_P.new_zeros(len(self.error_TD))
        return zeros_T.index_add_(0, self.position_P[on_P], self.activation_P[on_P])

    def dots(self, gradient_TD: Tensor) -> Tensor:
        """(P,): each pair's contribution times the gradient at its position."""
        return self._value_P * dot_pairs(gradient_TD, self._W_dec_FD, self.latent_P, self.position_P)

    def sum(self, kept_P: Tensor) -> Tensor:
        """(T, D): the contributions of the pairs where `kept_P` is True."""
        return decode_pairs(self.latent_P, self._value_P * kept_P, self._starts_T, self._W_dec_FD)


@dataclass(frozen=True)
class Effects:
    """The estimates for all parts."""

    gradient_N: Tensor
    attribution_N: Tensor
    attribution_P: Tensor
    """The same for each pair."""


def estimate(metric: Metric, x_TD: Tensor, parts: LatentParts) -> Effects:
    """Gradient and attribution of every part of x; those of the weaker parts are the same."""
    dots_P = parts.dots(_gradients(metric, x_TD[None])[0])
    gradient_N = _per_part(parts, dots_P)
    attribution_P = dots_P.clone()
    count = max(_FEWEST, min(GROUPS, _GROUP_TOKENS // len(x_TD)))
    strongest = gradient_N.abs().argsort(descending=True, stable=True)[: count * MEMBERS]
    groups = [strongest[start::count] for start in range(min(count, len(strongest)))]
    members = [torch.isin(parts.part_P, group) for group in groups]
    for some in _split(members, len(x_TD)):
        halfway = torch.stack([x_TD - 0.5 * parts.sum(member_P) for member_P in some])
        for member_P, gradient_TD in zip(some, _gradients(metric, halfway), strict=True):
            attribution_P[member_P] = parts.dots(gradient_TD)[member_P]
    return Effects(gradient_N, _per_part(parts, attribution_P), attribution_P)


def along(metric: Metric, x_TD: Tensor, part_TD: Tensor) -> float:
    """The attribution of one part alone, from the gradient halfway to where it is gone."""
    return float((part_TD * _gradients(metric, (x_TD - 0.5 * part_TD)[None])[0]).sum())


def removals(metric: Metric, x_TD: Tensor, taken: Iterable[Tensor]) -> list[float]:
    """What the metric loses, m(x) - m(x - c), for each c (T, D) of `taken`."""
    values: list[float] = []
    with torch.no_grad():
        for some in _split(chain([torch.zeros_like(x_TD)], taken), len(x_TD)):
            values += metric(torch.stack([x_TD - part_TD for part_TD in some])).tolist()
    return [values[0] - value for value in values[1:]]


def _per_part(parts: LatentParts, value_P: Tensor) -> Tensor:
    return value_P.new_zeros(len(parts.latents_N)).index_add_(0, parts.part_P, value_P)


def _gradients(metric: Metric, x_BTD: Tensor) -> Tensor:
    with torch.enable_grad():
        x_BTD = x_BTD.detach().requires_grad_()
        (gradient_BTD,) = torch.autograd.grad(metric(x_BTD).sum(), x_BTD)
    return gradient_BTD


def _split(items: Iterable[Tensor], tokens: int) -> Iterator[list[Tensor]]:
    """As many at once as one pass takes."""
    left = iter(items)
    while some := list(islice(left, max(1, TOKENS_AT_ONCE // tokens))):
        yield some
