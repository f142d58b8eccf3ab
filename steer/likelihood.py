"""How likely given replies are, token by token, with edits or without: one teacher-forced pass over a batch of texts.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_3.model import plan_span
from steer.edits import SteeringSet
from steer.engine import Engine
from steer.steerers import Steerers

MOST_LOGITS = 1 << 26
"""Logits held at once: 256 MB in float32."""


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens of a prompt and of what follows it."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]


def logprobs(engine: Engine, texts: Sequence[Text], sets: Sequence[SteeringSet]) -> Iterator[Tensor]:
    """For each text, in order, the log-probabilities (T, V) in float32 before each token of its reply, with its set."""
    order = list(range(len(texts)))
    most = max((len(text.prompt) + len(text.reply) for text in texts), default=1)
    at_once = max(1, MOST_LOGITS // (most * engine.model.config.vocab_size))
    for start in range(0, len(order), at_once):
        part = order[start : start + at_once]
        rows = [[*texts[n].prompt, *texts[n].reply] for n in part]
        counts = [len(row) for row in rows]
        steerers = Steerers(engine.saes, engine.resolver, engine.tokenizer.special_ids, False)
        steerers.take({place: sets[n] for place, n in enumerate(part)})
        device = engine.model.device
        tokens_BT = torch.tensor([row + [0] * (max(counts) - len(row)) for row in rows], device=device)
        span = plan_span(tokens_BT, [0] * len(rows), counts, None, [len(texts[n].prompt) for n in part])
        with torch.inference_mode():
            logits_BTV = engine.model.forward(tokens_BT, lengths_B=counts, hooks=steerers.hooks, span=span)
        for place, n in enumerate(part):  # outside: the mode is the thread's, and would be the caller's at a yield
            first, end = len(texts[n].prompt) - 1, counts[place] - 1
            yield logits_BTV[place, first:end].float().log_softmax(-1)
