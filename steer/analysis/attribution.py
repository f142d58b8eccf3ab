"""Why this token, why this latent, and what a latent does: a model and its SAE, asked after the fact.

`why_token` says which latents pushed a token up or down, `why_latent` which earlier tokens (or latents of an SAE
further down) made a latent fire, `ablate` what every token of a text loses when a latent is taken out. Each gives plain
frozen dataclasses. How an effect is estimated is told in `effects.py`, how the model is run in `replay.py`;
the reconstruction error is kept in all of them. They only read the model, so that they may run beside a reply.

Positions are numbered as `steer inspect` numbers them, BOS being 0; there and on special tokens the SAE is not read.
Suffixes: B runs, T tokens, D width, V vocabulary, F latents, P pairs of a latent and a position, N latents that are on,
R rows of logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from llama_3.hooks import HookPoint
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from sae.model import SAE
from steer.analysis.effects import Effects, LatentParts, Metric, along, estimate, removals
from steer.analysis.replay import Replay
from steer.edits import check_latent
from steer.errors import SteerError

Order = Literal["raw", "normalised"]
LIKELIEST = 5
STAND_INS = ", the and it"
"""Tokens that are read in the place of another, to see what that one did. They are real ones: the mean of all
embeddings is like no token, and put in the place of any it takes about the same from a latent. No gradient helps to
find the tokens that matter, since the first norm makes the model blind to the length of an embedding."""
WINDOW = 64
_LOGIT_ROWS = 256
"""Positions whose logits are held at one time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token at a place, and the natural log of the probability that the model gave it there."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Place:
    """A part of an effect: that of one position."""

    index: int
    activation: float
    attribution: float


@dataclass(frozen=True, slots=True)
class LatentEffect:
    """What a latent, at all positions where it is on, adds to the number that is explained."""

    latent: int
    attribution: float
    gradient: float
    """Plain gradient times activation, from which `attribution` begins."""
    removed: float | None
    """What the number really loses when the latent is ablated; None where that was not asked."""
    normalised: float | None
    """`attribution` scaled by how small the latent's recorded max is and how rare it is; None without statistics."""
    places: tuple[Place, ...]
    """Strongest first."""


@dataclass(frozen=True, slots=True)
class TokenEffect:
    """What a token adds to the reading of a latent."""

    index: int
    token: int
    text: str
    attribution: float
    """What the reading loses when the first of the `STAND_INS` is read in the token's place."""
    removed: float | None
    """The mean over all of them; None where that was not asked."""


@dataclass(frozen=True, slots=True)
class WhyToken:
    """Why a token was likely. All effects are in nats of its log-probability, or, with `against`, of the difference of
    the two, which is that of their logits too."""

    index: int
    target: Choice
    against: Choice | None
    likeliest: tuple[Choice, ...]
    latents: tuple[LatentEffect, ...]
    """Every latent that is on before the token, in the order asked for."""
    error: float
    """The attribution of the SAE's reconstruction error at all positions read."""
    error_removed: float
    """What the number really loses without the error."""
    together: float
    """What it loses when all latents and the error go at once, which leaves the decoder's bias where it is read."""

    @property
    def total(self) -> float:
        """The sum of all attributions. It need not be `together`: each says what its own removal does to the rest."""
        return math.fsum(effect.attribution for effect in self.latents) + self.error


@dataclass(frozen=True, slots=True)
class WhyLatent:
    """Why a latent is on at a token: `tokens`, or `latents` of an SAE below. Effects are in units of its activation."""

    index: int
    latent: int
    activation: float
    tokens: tuple[TokenEffect, ...]
    latents: tuple[LatentEffect, ...]
    error: float | None
    """The attribution of the other SAE's reconstruction error; None for tokens."""
    error_removed: float | None
    together: float | None
    """What the reading loses when all latents and the error go at once; None for tokens."""

    @property
    def total(self) -> float:
        """The sum of the attributions of latents and error."""
        return math.fsum(effect.attribution for effect in self.latents) + (self.error or 0.0)


@dataclass(frozen=True, slots=True)
class TokenChange:
    """How likely a token of a text is, and how much of that goes when a latent is ablated before it."""

    index: int
    activation: float
    """Of the latent on this very token."""
    logprob: float | None
    """None for the first token."""
    change: float | None
    """Log-probability with the latent ablated less that without."""


def why_token(
    model: Transformer,
    tokenizer: Tokenizer,
    sae: SAE,
    hook: HookPoint,
    tokens: Sequence[int],
    index: int | None = None,
    *,
    target: int | None = None,
    against: int | None = None,
    check: int = 20,
    by: Order = "raw",
) -> WhyToken:
    """Which latents pushed the token at `index` up or down.

    `index` is at least 1; None or the number of tokens asks about the token that would come next, then `target`, by
    default the model's likeliest. `against` is another token for the same place. The first `check` latents in the order
    of `by` are ablated one by one. Raises `SteerError` for an index that cannot be explained.
    """
    count = len(tokens)
    index = count if index is None else index
    if not 1 <= index <= count:
        known = f"its tokens go from 0 to {count - 1}"
        first = "nothing comes before token 0" if index == 0 else f"there is no token {index} in this text"
        raise SteerError(first, f"{known}; `--token {count}` asks about the one that would come next")
    before = tokens[:index]
    replay = Replay(model, before, hook)
    readable_T = readable(tokenizer, before, model.device)
    parts = LatentParts(sae, replay.x_TD, readable_T)
    if not len(parts.latents_N):
        raise SteerError(f"no latent is on before token {index}", "choose a later token")
    with torch.no_grad():
        logprob_V = replay.logits(replay(replay.x_TD[None])[:, -1])[0].log_softmax(-1)
    likeliest = logprob_V.topk(min(LIKELIEST, len(logprob_V))).indices.tolist()
    token = tokens[index] if index < count else likeliest[0] if target is None else target
    if token == against:
        raise SteerError(f"token {index} is {tokenizer.token_text(token)!r} itself", "give another one for --against")

    def metric(x_BTD: Tensor) -> Tensor:
        logits_BV = replay.logits(replay(x_BTD)[:, -1])
        if against is not None:
            return logits_BV[:, token] - logits_BV[:, against]
        return logits_BV.log_softmax(-1)[:, token]

    effects = estimate(metric, replay.x_TD, parts)
    latents, (error_removed, together) = _latent_effects(metric, replay.x_TD, sae, parts, effects, check, by)
    chosen = [
        Choice(one, tokenizer.token_text(one), float(logprob_V[one]))
        for one in (token, *([] if against is None else [against]), *likeliest)
    ]
    others = chosen[1:] if against is None else chosen[2:]
    return WhyToken(
        index,
        chosen[0],
        None if against is None else chosen[1],
        tuple(others),
        latents,
        along(metric, replay.x_TD, parts.error_TD),
        error_removed,
        together,
    )


def why_latent(
    model: Transformer,
    tokenizer: Tokenizer,
    sae: SAE,
    hook: HookPoint,
    tokens: Sequence[int],
    latent: int,
    index: int | None = None,
    *,
    through: tuple[SAE, HookPoint] | None = None,
    check: int = 20,
    by: Order = "raw",
    window: int = WINDOW,
) -> WhyLatent:
    """Which tokens up to `index` made a latent fire there, or which latents of the SAE `through` further down.

    By default `index` is where the latent is strongest. Of the tokens only the nearest `window` are tried, and never
    the first. What is explained is the latent's pre-activation in the units of its activation, without the race for k
    places. Raises `SteerError` where the latent is off, and for an SAE that does not stand below.
    """
    check_latent(latent, sae.config.d_sae)
    start = HookPoint(0, "resid_pre") if through is None else through[1]
    if start.depth >= hook.depth:
        raise SteerError(f"the SAE at {start} does not stand below the one at {hook}", "give one of an earlier layer")
    whole = LatentParts(sae, Replay(model, tokens, hook).x_TD, readable(tokenizer, tokens, model.device))
    activation_T = whole.activations(latent)
    index = int(activation_T.argmax()) if index is None else index
    if not 0 <= index < len(tokens):
        raise SteerError(f"there is no token {index} in this text", f"its tokens go from 0 to {len(tokens) - 1}")
    if not (activation := float(activation_T[index])):
        if not (on := [str(place) for place in activation_T.nonzero()[:8, 0].tolist()]):
            raise SteerError(f"latent {latent} is on nowhere in this text", "`steer inspect` shows which latents are")
        raise SteerError(f"latent {latent} is not on at token {index}", f"it is on at {', '.join(on)}")
    replay = Replay(model, tokens[: index + 1], start, hook)
    slope = float(sae.r_mag_F[latent].exp()) if sae.config.activation == "gated" else 1.0

    def metric(x_BTD: Tensor) -> Tensor:
        return sae.pre_activations(replay(x_BTD)[:, -1])[:, latent] * slope

    x_TD = replay.x_TD
    if through is not None:
        below = LatentParts(through[0], x_TD, readable(tokenizer, replay.tokens, model.device))
        effects = estimate(metric, x_TD, below)
        found, (error_removed, together) = _latent_effects(metric, x_TD, through[0], below, effects, check, by)
        error = along(metric, x_TD, below.error_TD)
        return WhyLatent(index, latent, activation, (), found, error, error_removed, together)
    replaced = _token_effects(metric, replay, tokenizer, model.embedding_VD.detach(), check, window)
    return WhyLatent(index, latent, activation, replaced, (), None, None, None)


def _token_effects(
    metric: Metric, replay: Replay, tokenizer: Tokenizer, embedding_VD: Tensor, check: int, window: int
) -> tuple[TokenEffect, ...]:
    """What the metric loses when each of the last `window` tokens but the first is replaced, strongest first."""
    tokens, x_TD = replay.tokens, replay.x_TD

    def instead(place: int) -> list[int]:
        return [token for token in tokenizer.encode(STAND_INS) if token != tokens[place]]

    def change(place: int, token: int) -> Tensor:
        difference_TD = torch.zeros_like(x_TD)
        difference_TD[place] = x_TD[place] - embedding_VD[token].float()
        return difference_TD

    places = range(max(1, len(tokens) - window), len(tokens))
    first = removals(metric, x_TD, (change(place, instead(place)[0]) for place in places))
    order = sorted(zip(places, first, strict=True), key=lambda one: -abs(one[1]))
    others = [instead(place)[1:] for place, _ in order[:check]]
    pairs = ((place, token) for (place, _), some in zip(order, others, strict=False) for token in some)
    more = iter(removals(metric, x_TD, (change(place, token) for place, token in pairs)))
    means = [fmean([effect, *islice(more, len(some))]) for (_, effect), some in zip(order, others, strict=False)]
    found = [
        TokenEffect(place, tokens[place], tokenizer.token_text(tokens[place]), effect, mean)
        for (place, effect), mean in zip_longest(order, means)
    ]
    return (
        *sorted((one for one in found if one.removed is not None), key=lambda one: -abs(one.removed or 0.0)),
        *(one for one in found if one.removed is None),
    )


def ablate(
    model: Transformer, tokenizer: Tokenizer, sae: SAE, hook: HookPoint, tokens: Sequence[int], latent: int
) -> tuple[TokenChange, ...]:
    """What each token of a text loses of its log-probability when a latent is ablated wherever it is on."""
    check_latent(latent, sae.config.d_sae)
    replay = Replay(model, tokens, hook)
    parts = LatentParts(sae, replay.x_TD, readable(tokenizer, tokens, model.device))
    activation_T = parts.activations(latent)
    with torch.no_grad():
        rows = [_logprobs(replay, x_TD) for x_TD in (replay.x_TD, replay.x_TD - parts.sum(parts.latent_P == latent))]
    read = zip(activation_T[1:].tolist(), *rows, strict=True)
    changes = [
        TokenChange(place, on, plain, without - plain) for place, (on, plain, without) in enumerate(read, start=1)
    ]
    return TokenChange(0, 0.0, None, None), *changes


def _logprobs(replay: Replay, x_TD: Tensor) -> list[float]:
    """The log-probability of each token but the first."""
    resid_TD, found = replay(x_TD[None])[0, :-1], []
    next_T = torch.tensor(replay.tokens[1:], device=x_TD.device)
    for resid_RD, next_R in zip(torch.split(resid_TD, _LOGIT_ROWS), torch.split(next_T, _LOGIT_ROWS), strict=True):
        found += replay.logits(resid_RD).log_softmax(-1).gather(-1, next_R[:, None])[:, 0].tolist()
    return found


def _latent_effects(
    metric: Metric, x_TD: Tensor, sae: SAE, parts: LatentParts, effects: Effects, check: int, by: Order
) -> tuple[tuple[LatentEffect, ...], tuple[float, float]]:
    """All latents in order, the first `check` of them ablated; and what the metric loses without the error, and without
    the error and all latents."""
    weights = _weights(sae, parts.latents_N)
    score_N = effects.attribution_N
    if by == "normalised":
        if weights is None:
            raise SteerError("this SAE has no statistics to normalise by", "leave out `--by normalised`")
        score_N = score_N * weights
    order = score_N.abs().argsort(descending=True, stable=True).tolist()
    everything = parts.sum(torch.ones_like(parts.part_P, dtype=torch.bool)) + parts.error_TD
    ablated = (_part(parts, number) for number in order[:check])
    error_removed, together, *removed = removals(metric, x_TD, chain([parts.error_TD, everything], ablated))
    known = dict(zip(order, removed, strict=False))
    places: dict[int, list[Place]] = {}
    columns = parts.part_P, parts.position_P, parts.activation_P, effects.attribution_P
    for number, index, activation, share in zip(*(column.tolist() for column in columns), strict=True):
        places.setdefault(number, []).append(Place(index, activation, share))
    plain, gradient = effects.attribution_N.tolist(), effects.gradient_N.tolist()
    normalised = None if weights is None else (effects.attribution_N * weights).tolist()
    names = parts.latents_N.tolist()
    found = tuple(
        LatentEffect(
            names[number],
            plain[number],
            gradient[number],
            known.get(number),
            normalised[number] if normalised else None,
            tuple(sorted(places[number], key=lambda place: -abs(place.attribution))),
        )
        for number in order
    )
    return found, (error_removed, together)


def _weights(sae: SAE, latents: Tensor) -> Tensor | None:
    """What an attribution is multiplied by, (N,): the median max over the latent's own, times ln(1 / density) over that
    of the median density, medians being those of the latents that were ever on; 0 for a latent that never was."""
    stats = sae.stats
    if stats is None or not bool((live_F := stats.max_F > 0).any()):
        return None
    rarity_F = -stats.density_F.clamp(1 / max(stats.tokens, 2), 1.0).log()
    usual = stats.max_F[live_F].median() / rarity_F[live_F].median().clamp_min(1e-6)
    weight_F = torch.where(live_F, usual * rarity_F / stats.max_F, 0.0)
    return weight_F[latents.cpu()].to(latents.device)


def _part(parts: LatentParts, number: int) -> Tensor:
    return parts.sum(parts.part_P == number)


def readable(tokenizer: Tokenizer, tokens: Sequence[int], device: torch.device) -> Tensor:
    """bool (T,): where an SAE is read, which is neither on the first token nor on special ones."""
    flags = [place > 0 and token not in tokenizer.special_ids for place, token in enumerate(tokens)]
    return torch.tensor(flags, device=device)
