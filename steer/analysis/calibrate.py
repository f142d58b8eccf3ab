"""Calibration: how a latent answers to being added at rising strengths, in what it brings about and what it breaks.

Every strength writes a reply to each of some prompts, neutral ones (far from the topic) and beginnings of the latent's
own examples (near it), all of one latent together, with the same seeds as the baseline. The targets are the tokens
that the latent promotes by the logit lens and those on which its strongest examples fire, less those that come in most
texts. Over a strength's replies:

    effect       100 times the mean of P(targets) steered - P(targets) unsteered, both on the steered text: target
                 tokens to be expected in 100 tokens, more than without the edit
    log p        mean of log(P(targets) steered / P(targets) unsteered), both on the steered text
    perplexity   exp of the mean surprisal of the reply under the unsteered model
    repeats      share of the 4-grams of a reply that stand in it before
    KL           mean of KL(steered | unsteered) on the steered text, nats a token

    sweet spot     the strength of the largest effect on the neutral prompts with perplexity <= 1.5 times the baseline's
    cliff          the lowest strength with perplexity > 3 times the baseline's, or repeats > 0.5
    steerability   the effect on the neutral prompts at the sweet spot; 0 where no strength has an effect there

Counting target tokens in steered replies and in others would be as true and far noisier: a few hundred tokens hold a
target twice or never, and what other texts hold is mostly their own affair.

Letters: T tokens of a reply, V vocabulary, N targets.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from labels.index import Calibration, LabelIndex
from steer.analysis.likelihood import Text, logprobs, write
from steer.compare import repeated
from steer.edits import Edit, SteeringSet, Strength
from steer.engine import Engine
from steer.errors import SteerError
from steer.session import Prompt, Sampling

STRENGTHS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
"""In units of the latent's max."""
PROMPTS = ("Once upon a time", "One day", "I think that", "There was a")
"""Neutral ones, far from most topics."""
TOKENS = 40
ROWS = 64
"""Replies that are written at once."""
NEAR = 2
"""Beginnings of the latent's own examples."""
FIGURES = 2
"""Version of the formulas."""
SWEET_RATIO, CLIFF_RATIO, CLIFF_REPEATS = 1.5, 3.0, 0.5
TARGETS = 12
"""At most so many promoted tokens, and so many tokens of examples."""
COMMON, LOOKED_AT = 1 / 20, 2000
"""A token in more than this share of the random examples of (so many) latents says nothing about one of them."""
DIGITS = 5
"""Of the figures that are kept."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The replies at one strength."""

    strength: float
    """Times the latent's max; 0 is the baseline."""
    raw: float
    effect: float
    """On the replies to neutral prompts."""
    effect_near: float | None
    """On those to beginnings of its own examples; None without any."""
    logprob: float
    perplexity: float
    ratio: float
    """Perplexity over the baseline's."""
    repeats: float
    kl: float
    text: str
    """The reply to the first prompt."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A latent's trials and what they say."""

    latent: int
    trials: tuple[Trial, ...]
    targets: tuple[str, ...]
    sweet: float | None
    cliff: float | None
    steerability: float


@dataclass(slots=True)
class _Written:
    """One reply and what it is measured against."""

    text: Text
    shown: str
    near: bool


class Calibrator:
    """Calibrates latents of an engine's first SAE. The baseline of the neutral prompts is written once."""

    def __init__(
        self,
        engine: Engine,
        *,
        strengths: Sequence[float] = STRENGTHS,
        prompts: Sequence[str] = PROMPTS,
        tokens: int = TOKENS,
        seed: int = 0,
        sampling: Sampling | None = None,
    ) -> None:
        if engine.sae is None or engine.sae.stats is None:
            raise SteerError("there is no SAE with recorded maxima to calibrate", "pass `--sae FOLDER`")
        if not prompts or not strengths:
            raise SteerError("calibration needs a prompt and a strength")
        bad = [strength for strength in strengths if not math.isfinite(strength) or strength <= 0]
        if bad:
            raise SteerError(f"{bad[0]:g} is no strength to calibrate at", "give multiples of the max over 0, as 0.4")
        self.engine, self.prompts, self.tokens, self.seed = engine, tuple(prompts), tokens, seed
        self.strengths = tuple(sorted(set(strengths)))
        self.sampling = sampling or engine.defaults
        self._baseline: list[_Written] | None = None

    @property
    def how(self) -> dict[str, Any]:
        """What the figures depend on besides the latent, as it reads back from JSON."""
        info = self.engine.info
        asked: dict[str, Any] = {"figures": FIGURES}  # what was measured by other formulas is measured again
        asked |= {"strengths": self.strengths, "prompts": self.prompts, "tokens": self.tokens, "seed": self.seed}
        how: dict[str, Any] = json.loads(json.dumps(asked | {"model": info.model, "dtype": info.dtype}))
        return how

    def calibrate(self, latent: int) -> Calibrated:
        """One latent's trials."""
        engine = self.engine
        engine.check(Edit(latent, "add", Strength(1.0, "max")))
        maximum = engine.resolver.maximum(latent)
        assert maximum is not None
        if self._baseline is None:
            self._baseline = self._write([(prompt, False) for prompt in self.prompts], SteeringSet())
        targets, names = self._targets(latent)
        near = [(prompt, True) for prompt in self._near(latent)]
        base = self._baseline + (self._write(near, SteeringSet()) if near else [])
        asks = [(prompt, False) for prompt in self.prompts] + near
        sets = [SteeringSet((Edit(latent, "add", Strength(s, "max")),)) for s in self.strengths]
        rows = self._write([ask for _ in sets for ask in asks], [one for one in sets for _ in asks])
        zero = self._measure(0.0, 0.0, base, [SteeringSet()] * len(base), targets, None)
        trials = [zero]
        for number, (strength, one) in enumerate(zip(self.strengths, sets, strict=True)):
            part = rows[number * len(asks) : (number + 1) * len(asks)]
            trials.append(self._measure(strength, strength * maximum, part, [one] * len(part), targets, zero))
        return Calibrated(latent, tuple(trials), names, *judge(trials))

    def _write(self, asks: Sequence[tuple[str, bool]], sets: SteeringSet | Sequence[SteeringSet]) -> list[_Written]:
        """A reply to each prompt."""
        each = [sets] * len(asks) if isinstance(sets, SteeringSet) else list(sets)
        prompts, seeds = [Prompt(text=prompt) for prompt, _ in asks], [self.seed] * len(asks)
        written: list[tuple[Text, str]] = []
        for start in range(0, len(asks), ROWS):
            part = slice(start, start + ROWS)
            written += write(self.engine, prompts[part], each[part], seeds[part], self.tokens, self.sampling)
        return [_Written(text, ask + said, near) for (ask, near), (text, said) in zip(asks, written, strict=True)]

    def _measure(
        self,
        strength: float,
        raw: float,
        rows: Sequence[_Written],
        sets: Sequence[SteeringSet],
        targets: Sequence[int],
        zero: Trial | None,
    ) -> Trial:
        texts = [row.text for row in rows]
        surprisals, kls, gains = [], [], []
        more: dict[bool, list[float]] = {False: [], True: []}
        plain = logprobs(self.engine, texts, [SteeringSet()] * len(texts))
        steered = logprobs(self.engine, texts, sets)
        for row, theirs_TV, ours_TV in zip(rows, plain, steered, strict=True):
            if not row.text.reply:
                continue
            reply_T = theirs_TV.new_tensor(row.text.reply).long()
            surprisals += (-theirs_TV.gather(1, reply_T[:, None])[:, 0]).tolist()
            kls += (ours_TV.exp() * (ours_TV - theirs_TV)).sum(-1).tolist()
            if targets:
                target_N = ours_TV.new_tensor(list(targets)).long()
                ours_T, theirs_T = ours_TV[:, target_N].logsumexp(1), theirs_TV[:, target_N].logsumexp(1)
                gains += (ours_T - theirs_T).tolist()
                more[row.near] += (100 * (ours_T.exp() - theirs_T.exp())).tolist()
        perplexity = math.exp(fmean(surprisals)) if surprisals else math.nan
        return Trial(
            strength,
            raw,
            fmean(more[False]) if more[False] else 0.0,
            fmean(more[True]) if more[True] else None,
            fmean(gains) if gains else 0.0,
            perplexity,
            perplexity / zero.perplexity if zero else 1.0,
            fmean(repeated(row.text.reply) for row in rows),
            fmean(kls) if kls else 0.0,
            rows[0].shown,
        )

    def _targets(self, latent: int) -> tuple[list[int], tuple[str, ...]]:
        """The tokens that the latent should bring about, and their texts."""
        index, tokenizer = self.engine.index, self.engine.tokenizer
        if index is None:
            raise SteerError(
                "calibration needs a label index, which says what a latent promotes", "pass `--labels FILE`"
            )
        promoted = [token for token, _ in index.raw_effects(latent)[0][:TARGETS]]
        fired = [example.tokens[example.peak] for example in index.raw_examples(latent) if example.kind == "top"][
            :TARGETS
        ]
        both = list(dict.fromkeys([*promoted, *fired]))
        targets = [token for token in both if token not in self._common] or both
        return targets, tuple(tokenizer.token_text(token) for token in targets)

    @cached_property
    def _common(self) -> frozenset[int]:
        """The tokens that come in most texts, by the random examples."""
        index = self.engine.index
        assert index is not None
        latents, seen, examples = index.latents(), Counter[int](), 0
        for latent in latents[:: max(1, len(latents) // LOOKED_AT)]:
            for example in index.raw_examples(latent):
                if example.kind == "random":
                    seen.update(set(example.tokens))
                    examples += 1
        return frozenset(token for token, count in seen.items() if count > COMMON * examples)

    def _near(self, latent: int) -> list[str]:
        """Beginnings of the latent's strongest examples, up to where it fires."""
        index = self.engine.index
        assert index is not None
        starts = ["".join(one.tokens[: one.peak]).strip() for one in index.examples(latent, "top", 4 * NEAR)]
        return list(dict.fromkeys(start for start in starts if len(start.split()) >= 2))[:NEAR]


def judge(trials: Sequence[Trial]) -> tuple[float | None, float | None, float]:
    """(sweet spot, cliff, steerability) of trials by rising strength, the baseline first."""
    tried = [trial for trial in trials if trial.strength > 0]
    mild = [trial for trial in tried if trial.ratio <= SWEET_RATIO and trial.effect > 0]
    best = max(mild, key=lambda trial: trial.effect, default=None)
    broken = (t.strength for t in tried if t.ratio > CLIFF_RATIO or t.repeats > CLIFF_REPEATS)
    return best.strength if best else None, next(broken, None), best.effect if best else 0.0


def recall(index: LabelIndex, latent: int, how: dict[str, Any]) -> dict[str, Any] | None:
    """What `keep` wrote down of a latent that was calibrated exactly so, or None."""
    known = index.calibration(latent)
    try:
        entry = json.loads(known.data) if known else None
    except ValueError:  # the index is a file like any other
        return None
    return entry if isinstance(entry, dict) and entry.get("how") == how else None


def keep(done: Calibrated, how: dict[str, Any], store: LabelIndex) -> dict[str, Any]:
    """Writes down what was found out of a latent; the same as `recall` will read it."""
    short = json.loads(json.dumps(asdict(done)), parse_float=lambda digits: float(f"{float(digits):.{DIGITS}g}"))
    entry: dict[str, Any] = short | {"how": how}
    spots = entry["sweet"], entry["cliff"], entry["steerability"]
    store.write_calibrations([Calibration(done.latent, *spots, json.dumps(entry))])
    return entry
