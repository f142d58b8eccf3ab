"""From logits to a token, one row at a time.

Every row has its own generator and is cut, renormalised and drawn by itself, so it gets the same token alone and in any
batch. The order is transformers', the frequency penalty after the repetition penalty as in vLLM: logit bias, repetition
penalty, frequency penalty, temperature, top-k, top-p, min-p. What is *reported* (log-probability, entropy,
alternatives) is always the model's own distribution: no bias, penalty, temperature or cut.
Suffixes: B rows, V vocabulary, A alternatives.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_LOOK = 256
"""Candidates sorted before the whole vocabulary is: enough for nearly every nucleus."""


_LARGE = 1e6
"""More than any logit: larger penalties and biases do no more, and could overflow."""
_COLD = 1e-30
"""A temperature below which only the likeliest token is left, and above which dividing does not overflow."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; ValueError where a number is out of its range."""

    temperature: float = 0.7
    """0 takes the most likely token."""
    top_p: float = 0.95
    """The smallest set of likeliest tokens with at least this probability; 1 keeps all."""
    top_k: int = 0
    """At most this many of the likeliest tokens; 0 is off."""
    min_p: float = 0.0
    """Tokens at least this likely relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens already seen, the prompt's too, are divided by this where positive and multiplied where negative
    (1909.05858)."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for every time the reply holds it already, as in OpenAI's API."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, number added to its logit); minus infinity forbids a token."""

    @property
    def shifts_logits(self) -> bool:
        """Whether logits are changed before they are scaled and cut."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or bool(self.logit_bias)

    def __post_init__(self) -> None:
        for name, ok, need in (
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 1 / _LARGE <= self.repetition_penalty <= _LARGE, f"from 1e-6 to {_LARGE:g}"),
            ("frequency_penalty", abs(self.frequency_penalty) <= _LARGE, f"from -{_LARGE:g} to {_LARGE:g}"),
            (
                "logit_bias",
                all(i >= 0 and (abs(bias) <= _LARGE or bias == -math.inf) for i, bias in self.logit_bias),
                f"ids from 0 with numbers from -{_LARGE:g} to {_LARGE:g}, or minus infinity",
            ),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)} and must be {need}")


@dataclass(frozen=True)
class Sampled:
    """One token per row, with what the model itself thought of it."""

    tokens_B: Tensor
    logprobs_B: Tensor
    """Natural logarithm of the probability of the chosen token, before temperature and cuts."""
    entropy_B: Tensor
    """Entropy in nats of the distribution, before temperature and cuts."""
    alternatives_BA: Tensor
    """The likeliest tokens, likeliest first."""
    probabilities_BA: Tensor
    """Their probabilities."""


def sample(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[torch.Generator],
    history: Sequence[Sequence[int]] = (),
    made: Sequence[int] = (),
    alternatives: int = 0,
) -> Sampled:
    """Draw one token per row of float logits. Generators live on the CPU and give one number a token.

    `history` holds the tokens of each row so far, the last `made` of which are its reply's; penalties read them.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float(), -1)
    probs_BV = logprobs_BV.exp()
    tokens = []
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
        # log-probabilities are logits shifted by a constant; only a penalty sees the sign of the logits themselves.
        scores_V = logprobs_BV[row]
        if sampling.shifts_logits:
            seen = history[row] if history else ()
            scores_V = _shift(logits_BV[row].float(), sampling, seen, seen[len(seen) - made[row] :] if made else ())
        tokens.append(_draw(scores_V, sampling, uniform))
    tokens_B = torch.stack(tokens)
    top = probs_BV.topk(min(alternatives, probs_BV.shape[-1]), -1)
    return Sampled(
        tokens_B,
        logprobs_BV.gather(1, tokens_B[:, None])[:, 0],
        torch.special.entr(probs_BV).sum(-1),
        top.indices,
        top.values,
    )


def _shift(logits_V: Tensor, sampling: Sampling, seen: Sequence[int], reply: Sequence[int]) -> Tensor:
    """Logits with the row's bias and penalties."""
    logits_V = logits_V.clone()
    device = logits_V.device
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        logits_V.index_add_(0, torch.tensor(ids, device=device), torch.tensor(biases, device=device).float())
    if sampling.repetition_penalty != 1.0 and seen:
        where = torch.tensor(sorted(set(seen)), device=device)
        values, penalty = logits_V[where], sampling.repetition_penalty
        logits_V[where] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.frequency_penalty and (counts := Counter(reply)):
        where = torch.tensor(list(counts), device=device)
        logits_V[where] -= sampling.frequency_penalty * torch.tensor(list(counts.values()), device=device)
    return logits_V


def _draw(scores_V: Tensor, sampling: Sampling, uniform: float) -> Tensor:
    """The token, a 0-dim int64, at which the cumulative probability of the tokens kept passes `uniform`."""
    if sampling.temperature == 0.0:
        return scores_V.argmax()
    # Shifted so that the largest is 0: dividing by a small temperature then gives minus infinity at worst.
    scaled_V = (scores_V - scores_V.max()) / max(sampling.temperature, _COLD)
    size = len(scaled_V)
    if not sampling.top_k and sampling.top_p >= 1.0 and sampling.min_p == 0.0:
        return _invert(torch.softmax(scaled_V, -1), size, uniform)
    look = min(size, max(_FIRST_LOOK, sampling.top_k))
    if not sampling.top_k and scaled_V.device.type != "cpu":
        look = size  # elsewhere sorting is cheap and looking twice would wait for the device
    while True:
        top = scaled_V.topk(look)
        probs = _ranked_probabilities(top.values, scaled_V, sampling)
        keep = probs >= sampling.min_p * probs[0]
        if sampling.top_p < 1.0:
            keep &= probs.cumsum(0) - probs < sampling.top_p
        if look == size or sampling.top_k or not keep[-1]:
            break
        look = min(size, 8 * look)
    kept = probs * keep
    return top.indices.take(_invert(kept, keep.sum(), uniform))  # `[]` would wait for the device


def _ranked_probabilities(top: Tensor, scaled_V: Tensor, sampling: Sampling) -> Tensor:
    if not sampling.top_k:
        return (top - scaled_V.logsumexp(0)).exp()
    return torch.cat([torch.softmax(top[: sampling.top_k], 0), top.new_zeros(max(0, len(top) - sampling.top_k))])


def _invert(probs: Tensor, count: int | Tensor, uniform: float) -> Tensor:
    """The first of `count` places at which the running sum passes the share `uniform` of the whole."""
    sums = probs.cumsum(0)
    return (sums <= uniform * sums[-1]).sum().clamp(max=count - 1)
