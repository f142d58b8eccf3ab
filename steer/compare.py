"""What steering did to a reply: two rows of one prompt and seed, as plain numbers.

first difference   the first token of the reply that is not the baseline's
KL                 mean over the steered reply of KL(steered | unsteered model on the same text), nats a token
perplexity         exp of the mean surprisal of the steered tokens under the unsteered model on the same text
repeats            share of the 4-grams of a reply that it has had before
changed            latents by the change of their mean activation over the reply, largest first
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from steer.events import TokenEvent


@dataclass(frozen=True, slots=True)
class Change:
    """A latent's mean activation over the two replies."""

    latent: int
    baseline: float
    steered: float

    @property
    def difference(self) -> float:
        return self.steered - self.baseline


@dataclass(frozen=True, slots=True)
class Comparison:
    """A steered reply beside its baseline; the figures are None where they were not measured."""

    first_difference: int | None
    """Counted from 0 in the reply; None where the replies are the same as far as both go."""
    same: int
    """Tokens at the same place that are the same."""
    kl: float | None
    perplexity: float | None
    baseline_perplexity: float
    """Of the baseline under its own distribution."""
    repeats: float
    baseline_repeats: float
    changed: tuple[Change, ...]


def compare(baseline: Sequence[TokenEvent], steered: Sequence[TokenEvent], most: int = 10) -> Comparison:
    """The comparison of two replies, with at most `most` latents."""
    pairs = [ours.token == theirs.token for ours, theirs in zip(steered, baseline, strict=False)]
    kls, surprisals = (
        [e.kl for e in steered if e.kl is not None],
        [e.surprisal for e in steered if e.surprisal is not None],
    )
    own = [-event.logprob for event in baseline if event.logprob is not None]
    different = len(baseline) != len(steered)
    before, after = mean_activations(baseline), mean_activations(steered)
    changes = [Change(latent, before.get(latent, 0.0), after.get(latent, 0.0)) for latent in before | after]
    changes.sort(key=lambda change: (-abs(change.difference), change.latent))
    return Comparison(
        next((n for n, same in enumerate(pairs) if not same), len(pairs) if different else None),
        sum(pairs),
        fmean(kls) if kls else None,
        math.exp(fmean(surprisals)) if surprisals else None,
        math.exp(fmean(own)) if own else math.nan,
        repeated([event.token for event in steered]),
        repeated([event.token for event in baseline]),
        tuple(change for change in changes[:most] if change.difference),
    )


def mean_activations(events: Sequence[TokenEvent]) -> dict[int, float]:
    """The mean activation of each latent that was active, over all tokens of a reply."""
    sums: defaultdict[int, float] = defaultdict(float)
    for event in events:
        for hit in event.hits:
            sums[hit.latent] += hit.activation
    return {latent: total / len(events) for latent, total in sums.items()}


def repeated(tokens: Sequence[int], n: int = 4) -> float:
    """The share of the n-grams of a text that stand in it before; 0 for a text without any."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
