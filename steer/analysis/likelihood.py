"""Replies of a batch, and how likely they are token by token, with edits or without: one teacher-forced pass over them.

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
from steer.events import PromptRead, TokenEvent
from steer.session import Prompt, Sampling
from steer.steerers import Steerers

MOST_LOGITS = 1 << 26
"""Logits held at once: 256 MB in float32."""


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens of a prompt and of what follows it."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]


def write(
    engine: Engine,
    prompts: Sequence[Prompt],
    sets: Sequence[SteeringSet],
    seeds: Sequence[int],
    tokens: int,
    sampling: Sampling,
) -> list[tuple[Text, str]]:
    """A reply to each prompt with its set, as tokens and as text."""
    read: list[tuple[int, ...]] = [()] * len(prompts)
    replies: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    for event in engine.stream(
        prompts, sets, sampling=sampling, seeds=seeds, max_tokens=tokens, hits=False, alternatives=0
    ):
        if isinstance(event, PromptRead):
            read[event.row] = tuple(token.token for token in event.tokens)
        elif isinstance(event, TokenEvent):
            replies[event.row].append(event.token)
            texts[event.row] += event.text
    return [(Text(ids, tuple(reply)), text) for ids, reply, text in zip(read, replies, texts, strict=True)]


def logprobs(engine: Engine, texts: Sequence[Text], sets: Sequence[SteeringSet]) -> Iterator[Tensor]:
    """For each text, in order, the log-probabilities (T, V) in float32 before each token of its reply, with its set."""
    most = max((len(text.prompt) + len(text.reply) for text in texts), default=1)
    at_once = max(1, MOST_LOGITS // (most * engine.model.config.vocab_size))
    for start in range(0, len(texts), at_once):
        part = range(start, min(start + at_once, len(texts)))
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
