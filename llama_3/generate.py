"""Tokens from prompts, one forward pass at a time.

`stream_steps` is the only loop: the prefill is its first pass, and each pass yields one `Step` for every row that is
still being written. Rows of different lengths share a batch; a finished row leaves it, and the others keep their
numbers. Nothing here knows of text, except to look for stop strings.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama_3.cache import KVCache
from llama_3.config import config_error
from llama_3.hooks import Hooks
from llama_3.model import Transformer, plan_span
from llama_3.sampling import Sampling, sample
from llama_3.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Alternative:
    """A token and the probability the model gave it, before temperature and cuts."""

    token: int
    probability: float


@dataclass(frozen=True)
class Step:
    """One token of one row."""

    row: int
    """Number of the prompt."""
    token: int
    logprob: float
    """Natural logarithm of the probability of `token`, before temperature and cuts."""
    entropy: float
    """Entropy in nats of the distribution `token` was drawn from, before temperature and cuts."""
    alternatives: tuple[Alternative, ...]
    """The likeliest tokens, likeliest first."""
    finish: str | None
    """`stop` or `length` on the row's last step, else None."""


@dataclass
class _Row:
    """A row while it is being written."""

    number: int
    feed: list[int]
    """Tokens the next pass reads."""
    prompt_length: int
    sampling: Sampling
    generator: torch.Generator
    history: list[int]
    decoder: StreamDecoder | None
    tail: str = ""
    made: int = 0
    finish: str | None = field(default=None)
    """Set with the last step; a row with `length` may stay for one more pass."""


def stream_steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling],
    seeds: Sequence[int],
    max_tokens: int,
    stop_ids: Sequence[int] | frozenset[int],
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    hooks: Hooks | None = None,
    cache: KVCache | None = None,
    stop: threading.Event | None = None,
    alternatives: int = 0,
    read_last: bool = False,
) -> Iterator[list[Step]]:
    """Yield the steps of the rows still being written, in the order of rows, once per forward pass.

    A row ends with finish `stop` at a token of `stop_ids` (which is a step, but not text of the reply) or at the token
    that completes one of `stop_strings` (which need `tokenizer`; the caller cuts the text before the string), and with
    `length` after `max_tokens` steps or when the model's context is full. With `read_last` a row that ended by length
    is read once more so that hooks see its last token; a pass that only does this yields an empty list. When `stop` is
    set, no further pass begins.

    A `cache` that already holds a prefix of each row makes `prompts` their remaining tokens. It is written to, and its
    finished rows are dropped as they end (the last ones stay). ValueError names a prompt that is empty, holds an id
    outside the vocabulary, or leaves no room in the context.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    assert len(samplings) == len(seeds) == len(prompts), "one sampling and one seed per prompt"
    assert cache is None or cache.rows == len(prompts), "one row of the cache per prompt"
    assert tokenizer is not None or not stop_strings, "stop strings need a tokenizer"
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens} and must be at least 1")
    if not prompts:
        return
    context, stopping = model.config.max_context, frozenset(stop_ids)
    before = cache.lengths if cache is not None else [0] * len(prompts)
    for prompt, length in zip(prompts, before, strict=True):
        _check_prompt(prompt, length, model)
    live = [
        _Row(
            number,
            list(prompt),
            length + len(prompt),
            samplings[number],
            torch.Generator().manual_seed(seeds[number]),
            list(prompt),
            StreamDecoder(tokenizer) if stop_strings and tokenizer is not None else None,
        )
        for number, (prompt, length) in enumerate(zip(prompts, before, strict=True))
    ]
    if cache is None:
        cache = model.new_cache(len(live), min(context, max(row.prompt_length for row in live) + max_tokens))
    while live:
        if stop is not None and stop.is_set():
            return
        with torch.inference_mode():
            logits_BV = _read(model, live, cache, hooks)
            writing = [i for i, row in enumerate(live) if row.finish is None]
            if len(writing) < len(live):
                logits_BV = logits_BV[writing]
            drawn = _draw(logits_BV, [live[i] for i in writing], alternatives) if writing else []
        steps = []
        for i, (token, logprob, entropy, others) in zip(writing, drawn, strict=True):
            row = live[i]
            row.made += 1
            row.feed = [token]
            row.history.append(token)
            if token in stopping or _ends_text(row, token, stop_strings):
                row.finish = "stop"
            elif row.made >= max_tokens or row.prompt_length + row.made >= context:
                row.finish = "length"
            steps.append(Step(row.number, token, logprob, entropy, others, row.finish))
        yield steps
        wrote = set(writing)
        kept = [
            i
            for i, row in enumerate(live)
            if row.finish is None or (read_last and row.finish == "length" and i in wrote)
        ]
        if kept:
            cache.select(kept)
        live = [live[i] for i in kept]


def _check_prompt(prompt: Sequence[int], before: int, model: Transformer) -> None:
    context, vocab_size = model.config.max_context, model.config.vocab_size
    if not prompt:
        raise config_error("the prompt is empty", "it needs at least the begin-of-text token")
    if bad := [token for token in prompt if not 0 <= token < vocab_size]:
        raise config_error(f"token id {bad[0]} lies outside the model's vocabulary of {vocab_size}")
    if before + len(prompt) >= context:
        raise config_error(
            f"the prompt is {before + len(prompt)} tokens long and the model's context is {context}",
            "shorten the prompt: at least one token must be left for the reply",
        )


def _read(model: Transformer, live: list[_Row], cache: KVCache, hooks: Hooks | None) -> Tensor:
    """float32 logits (B, V) after what each row has to feed."""
    counts = [len(row.feed) for row in live]
    longest = max(counts)
    padded = [row.feed + [0] * (longest - len(row.feed)) for row in live]
    tokens_BT = torch.tensor(padded, device=model.device)
    span = None
    if hooks is not None and len(hooks):
        numbers, prompt_lengths = [row.number for row in live], [row.prompt_length for row in live]
        span = plan_span(tokens_BT, cache.lengths, counts, numbers, prompt_lengths)
    logits_BTV: Tensor = model(tokens_BT, lengths_B=counts, cache=cache, hooks=hooks, span=span, last_only=True)
    return logits_BTV[:, 0].float()


def _draw(
    logits_BV: Tensor, rows: list[_Row], alternatives: int
) -> list[tuple[int, float, float, tuple[Alternative, ...]]]:
    """Token, logprob, entropy and alternatives of each row, copied from the device at once."""
    drawn = sample(
        logits_BV, [row.sampling for row in rows], [row.generator for row in rows], [row.history for row in rows],
        alternatives,
    )  # fmt: skip
    A = drawn.alternatives_BA.shape[1]
    columns = [drawn.tokens_B[:, None], drawn.logprobs_B[:, None], drawn.entropy_B[:, None]]
    columns += [drawn.alternatives_BA, drawn.probabilities_BA]
    table = torch.cat([column.double() for column in columns], 1).tolist()  # a float64 holds every id exactly
    return [
        (
            int(token),
            logprob,
            entropy,
            tuple(Alternative(int(i), p) for i, p in zip(rest[:A], rest[A:], strict=True)),
        )
        for token, logprob, entropy, *rest in table
    ]


def _ends_text(row: _Row, token: int, stop_strings: Sequence[str]) -> bool:
    if row.decoder is None:
        return False
    piece = row.decoder.push(token)
    text = row.tail + piece
    row.tail = text[-max(map(len, stop_strings)) :]
    return any(string and string in text for string in stop_strings)
