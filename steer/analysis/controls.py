"""Controls: is it this direction that does it, and would a plain request have done the same?

The same prompts and seeds are written by

    baseline     no edit
    steered      the edit
    flipped      the edit with its sign turned round
    random       directions drawn at random, as long as what the edit adds
    shuffled     other latents that fire, as long as what the edit adds
    asked        no edit, and a prompt that asks for the topic

and what comes is counted: the share of replies with a word of the topic (interval after Wilson), its words in 100 words
(bootstrap over replies), and the perplexity of the replies under the unsteered model, each beside the plain prompt.
A random or shuffled control has a direction of its own for each seed, so that none stands for all.

Letters: T tokens of a reply, D d_model, V vocabulary.
"""

from __future__ import annotations

import math
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from steer.analysis.likelihood import Text, logprobs, write
from steer.edits import Edit, SteeringSet, Strength
from steer.engine import Engine
from steer.errors import SteerError
from steer.session import Prompt, Sampling
from train.intervals import DocumentSums, Metric, share

CONDITIONS = ("baseline", "steered", "flipped", "random", "shuffled", "asked")
ROWS = 32
"""Replies that are written at once."""


@dataclass(frozen=True, slots=True)
class Control:
    """What came of one condition."""

    name: str
    replies: int
    rate: Metric
    """Share of replies with a word of the topic."""
    words: Metric
    """Words of the topic in 100 words."""
    perplexity: Metric
    text: str
    """The first reply, with its prompt."""


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    prompt: Prompt
    lead: str
    """What stands before the reply where it is shown."""
    steering: SteeringSet
    seed: int


def run_controls(
    engine: Engine,
    edit: Edit,
    topic: Sequence[str],
    prompts: Sequence[Prompt],
    asked: Sequence[Prompt],
    *,
    seeds: int = 50,
    seed: int = 0,
    tokens: int = 60,
    sampling: Sampling | None = None,
    on_done: Callable[[int, int], None] = lambda done, of: None,
) -> list[Control]:
    """The conditions in order. `asked` are the prompts that ask for the topic, one for each of `prompts`.

    Each prompt is gone on from with `seeds` seeds, from `seed` on. `edit` has to add to a latent; a `SteerError` for
    one that does not, or cannot run here. A word of the topic may be several, as `ice cream`.
    """
    if edit.kind != "add" or edit.latent is None or edit.strength is None:
        raise SteerError(f"`{edit}` does not add to a latent", "controls are for edits as `2229 +0.4x`")
    topic = [words for words in topic if words.strip()]
    if not topic:
        raise SteerError("the topic has no words", "give them as `--topic book,books,library`")
    engine.check(edit)
    with tempfile.TemporaryDirectory() as folder:
        rows = _plan(engine, edit, prompts, asked, range(seed, seed + seeds), Path(folder))
        replies: list[tuple[Text, str]] = []
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            prompted, sets, drawn = [r.prompt for r in part], [r.steering for r in part], [r.seed for r in part]
            replies += write(engine, prompted, sets, drawn, tokens, sampling or engine.defaults)
            on_done(len(replies), len(rows))
    found, said = [], _pattern(topic)
    for name in CONDITIONS:
        mine = [(row, reply) for row, reply in zip(rows, replies, strict=True) if row.name == name]
        found.append(_count(engine, name, mine, said))
    return found


def _pattern(topic: Sequence[str]) -> re.Pattern[str]:
    """What finds each of the topic's words, which may be several (`ice cream`), where no other word goes on from it."""
    longest = sorted(topic, key=len, reverse=True)
    each = (r"\s+".join(map(re.escape, words.split())) for words in longest)
    return re.compile(rf"(?<!\w)(?:{'|'.join(each)})(?!\w)", re.IGNORECASE)


def _plan(
    engine: Engine, edit: Edit, prompts: Sequence[Prompt], asked: Sequence[Prompt], seeds: range, folder: Path
) -> list[_Row]:
    """Every reply that is to be written."""
    assert edit.latent is not None and edit.strength is not None and len(asked) == len(prompts)
    hook, compiled = engine.resolver.edit(edit)
    sae = engine.saes[hook]
    length = abs(compiled.value) * float(sae.decoder_direction(edit.latent).norm())
    scale = sae.scale_at(sae.stats.resid_norm if sae.stats else 1.0)
    fires = [bool(engine.resolver.maximum(latent, hook)) for latent in range(sae.config.d_sae)]
    live = [latent for latent, on in enumerate(fires) if on and latent != edit.latent]
    if not live:
        raise SteerError("no other latent of this SAE is known to fire, so none can be a control")
    rows = []
    for number in seeds:
        draw = random.Random(number)
        other = draw.choice(live)
        norm = float(sae.decoder_direction(other).norm())
        sign = math.copysign(1.0, compiled.value)
        file = folder / f"{number}.npy"
        generator = torch.Generator().manual_seed(number)
        direction_D = torch.randn(hook.width(engine.model.config), generator=generator)
        np.save(file, (direction_D / direction_D.norm()).numpy())
        drawn = Strength(length * scale)
        edits = {
            "baseline": None,
            "steered": edit,
            "flipped": replace(edit, strength=replace(edit.strength, number=-edit.strength.number)),
            "random": replace(edit, kind="vector", latent=None, file=str(file), strength=drawn, hook=str(hook)),
            "shuffled": replace(edit, latent=other, strength=Strength(sign * length / norm)),
            "asked": None,
        }
        for prompt, plainly in zip(prompts, asked, strict=True):
            for name, one in edits.items():
                ask = plainly if name == "asked" else prompt
                rows.append(_Row(name, ask, ask.text or "", SteeringSet((one,) if one else ()), number))
    return rows


def _count(engine: Engine, name: str, mine: Sequence[tuple[_Row, tuple[Text, str]]], topic: re.Pattern[str]) -> Control:
    """What came of one condition. The perplexity is that of a reply after its own prompt."""
    sums = DocumentSums()
    texts = [text for _, (text, _) in mine]
    scores = logprobs(engine, texts, [SteeringSet()] * len(texts))
    hits = 0
    for number, ((_, (text, said)), logprobs_TV) in enumerate(zip(mine, scores, strict=True)):
        written, count = len(re.findall(r"\w+", said)), len(topic.findall(said))
        hits += count > 0
        reply_T = torch.tensor(text.reply, dtype=torch.int64, device=logprobs_TV.device)
        surprisal = float(-logprobs_TV.gather(1, reply_T[:, None]).sum()) if len(reply_T) else 0.0
        facts = {"topic": count, "words": written, "surprisal": surprisal, "tokens": len(reply_T)}
        sums.add(torch.tensor([number]), **{key: torch.tensor([float(value)]) for key, value in facts.items()})
    words, perplexity = sums.metrics(
        {
            "words": lambda of: 100 * of["topic"] / of["words"].clamp(min=1),
            "perplexity": lambda of: (of["surprisal"] / of["tokens"].clamp(min=1)).exp(),
        },
        seed=0,
    )
    first, (_, said) = mine[0]
    return Control(name, len(mine), share("rate", hits, len(mine)), words, perplexity, first.lead + said)
