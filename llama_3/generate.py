"""Tokens from prompts, one forward pass at a time.

`stream_steps` is the only loop: the prefill comes first, a long one in chunks, and then each pass yields one `Step` for
every row that is still being written. Rows of different lengths share a batch; a finished row leaves it, its place may
be taken by one that waits, and all keep their numbers. A shadow row reads the tokens of another, so that what two
settings of the hooks make of one text can be compared token by token. Nothing here knows of text, except to look for
stop strings. `read` puts tokens into a cache, `rerun` brings one up to date with hooks that have changed.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_3.cache import KVCache
from llama_3.errors import config_error
from llama_3.hooks import Hooks
from llama_3.model import Transformer, plan_span
from llama_3.sampling import Sampling, sample
from llama_3.tokenizer import StreamDecoder, Tokenizer

PREFILL_CHUNK = 512
"""Tokens of a row that one pass reads: enough to keep any device busy, few enough to bound its working memory and the
wait for a stop flag."""


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
    text: str = ""
    """What the token adds to the row's `ReplyText`, where there is one."""
    kl: float | None = None
    """Kullback-Leibler divergence in nats of the row's distribution from its shadow's, sum of p log(p / shadow's), both
    before temperature and cuts; None without a shadow."""
    surprisal: float | None = None
    """Minus the natural logarithm of the shadow's probability of `token`."""
    expected: float | None = None
    """The surprisal that the shadow itself expects: the entropy of its distribution."""


class StopText:
    """Text of one reply as it comes, cut before the first stop string; what may be the start of one is held back."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._strings = tuple(string for string in stop_strings if string)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far can no longer belong to a stop string; `found` says that one is complete."""
        self._held += text
        if places := [place for string in self._strings if (place := self._held.find(string)) >= 0]:
            self.found, released, self._held = True, self._held[: min(places)], ""
            return released
        hold = max(
            (n for string in self._strings for n in range(len(string)) if self._held.endswith(string[:n])), default=0
        )
        released, self._held = self._held[: len(self._held) - hold], self._held[len(self._held) - hold :]
        return released

    def flush(self) -> str:
        """What was held back when the reply ends otherwise."""
        released, self._held = self._held, ""
        return released


class ReplyText:
    """The text of one reply as its tokens come: whole characters, no special tokens, cut before a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), *, opens: bool = False) -> None:
        """`opens` says that the reply begins a text, see `StreamDecoder`."""
        self._special_ids = tokenizer.special_ids
        self._decoder, self._stop = StreamDecoder(tokenizer, opens=opens), StopText(stop_strings)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stop.found

    def push(self, token: int) -> str:
        """What of the text is certain with this token and was not before."""
        return "" if token in self._special_ids else self._stop.push(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, at the end of the reply."""
        return "" if self.stopped else self._stop.push(self._decoder.flush()) + self._stop.flush()


@dataclass
class _Row:
    """A row while it is being written."""

    number: int
    feed: list[int]
    """Tokens that are still to be read."""
    prompt_length: int
    limit: int
    """The most tokens it may make."""
    sampling: Sampling
    generator: torch.Generator
    history: list[int]
    text: ReplyText | None
    made: int = 0
    finish: str | None = None
    """Set with the last step; a row with `length` may stay for one more pass."""


def stream_steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling],
    seeds: Sequence[int],
    max_tokens: int | Sequence[int],
    stop_ids: Sequence[int] | frozenset[int],
    places: int | None = None,
    texts: Sequence[ReplyText | None] = (),
    shadows: Mapping[int, int] | None = None,
    hooks: Hooks | None = None,
    cache: KVCache | None = None,
    stop: threading.Event | None = None,
    alternatives: int = 0,
    read_last: bool = False,
    chunk: int = PREFILL_CHUNK,
) -> Iterator[list[Step]]:
    """Yield the steps of the rows that a forward pass has written, in the order in which they began, once per pass.

    A row ends with finish `stop` at a token of `stop_ids` (which is a step, but not text of the reply) or at the token
    that completes a stop string of its text (`texts`, one a row, say what each step adds), and with `length` after
    `max_tokens` (one number, or one a row) steps or when the model's context is full. Prompts longer than `chunk` are
    read in several passes, all rows ending with the same one; a pass that only reads yields an empty list. With
    `read_last` a row that ended by length is read once more so that hooks see its last token, which may give an empty
    list too. When `stop` is set, no further pass begins.

    With `places` at most so many rows are written at a time. The others wait in their order; when over an eighth of the
    places is free, the next ones are read by passes of their own, and go on beside those that are being written. What
    runs together follows from the prompts and what becomes of them alone, not from time.

    `shadows` maps rows that draw nothing and yield no steps to the row whose tokens they read, which has the same
    prompt; that row's steps then say how far its distribution is from the shadow's.

    A `cache` may hold a first part of each prompt, which is not read again. It is written to, and its finished rows
    are dropped as they end (the last ones stay). Neither it nor shadows go with rows that wait. Nothing is checked
    before the first step is asked for; then a ValueError names a prompt that is empty, holds an id outside the
    vocabulary, leaves no room in the context or nothing to read, and a biased token that is not there.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    assert len(samplings) == len(seeds) == len(prompts), "one sampling and one seed per prompt"
    assert cache is None or cache.rows == len(prompts), "one row of the cache per prompt"
    assert not texts or len(texts) == len(prompts), "one text per prompt"
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    assert len(limits) == len(prompts), "one limit per prompt"
    if bad := [limit for limit in limits if limit < 1]:
        raise ValueError(f"max_tokens is {bad[0]} and must be at least 1")
    if not prompts:
        return
    context, stopping, leaders = model.config.max_context, frozenset(stop_ids), dict(shadows or {})
    assert all(prompts[shadow] == prompts[leader] for shadow, leader in leaders.items()), (
        "a shadow has its row's prompt"
    )
    places = min(places or len(prompts), len(prompts))
    assert places == len(prompts) or (cache is None and not leaders), "a cache and shadows go with rows that all run"
    followers = {leader: shadow for shadow, leader in leaders.items()}
    before = cache.lengths if cache is not None else [0] * len(prompts)
    waiting: deque[_Row] = deque()
    for number, (prompt, length, limit, each) in enumerate(zip(prompts, before, limits, samplings, strict=True)):
        _check_prompt(prompt, length, each, model)
        generator, text = torch.Generator().manual_seed(seeds[number]), texts[number] if texts else None
        row = _Row(number, list(prompt[length:]), len(prompt), limit, each, generator, list(prompt), text)
        waiting.append(row)
    if cache is None:
        cache = model.new_cache(places, min(context, max(row.prompt_length + row.limit for row in waiting)))
    live: list[_Row] = []
    coming = [waiting.popleft() for _ in range(places)]
    theirs = cache
    while live or coming:
        if stop is not None and stop.is_set():
            return
        rows, where = (coming, theirs) if coming else (live, cache)
        with torch.inference_mode():
            logits_BV = _read(model, rows, where, hooks, chunk)
            unread = any(row.feed for row in rows)
            at = {row.number: i for i, row in enumerate(rows)}
            writing = (
                [] if unread else [i for i, row in enumerate(rows) if row.finish is None and row.number not in leaders]
            )
            beside = [at.get(followers.get(rows[i].number, -1)) for i in writing]
            drawn = _draw(logits_BV, rows, writing, beside, alternatives) if writing else []
        if unread:
            yield []
            continue
        steps = []
        for i, shadow, (token, logprob, entropy, others, distance) in zip(writing, beside, drawn, strict=True):
            row = rows[i]
            row.made += 1
            row.feed = [token]
            row.history.append(token)
            added = "" if row.text is None or token in stopping else row.text.push(token)
            if token in stopping or (row.text is not None and row.text.stopped):
                row.finish = "stop"
            elif row.made >= row.limit or row.prompt_length + row.made >= context:
                row.finish = "length"
            steps.append(Step(row.number, token, logprob, entropy, others, row.finish, added, *distance))
            if shadow is not None:
                rows[shadow].feed, rows[shadow].finish = [token], row.finish
        yield steps
        wrote = set(writing)
        kept = [
            i
            for i, row in enumerate(rows)
            if row.finish is None or (read_last and row.finish == "length" and i in wrote)
        ]
        if kept or waiting or where is not cache:
            where.select(kept)
        if where is not cache:
            cache.append(where)
        live = [*([] if rows is live else live), *(rows[i] for i in kept)]
        free, coming = places - len(live), []
        if waiting and free >= min(len(waiting), 1 + places // 8):
            coming = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            theirs = model.new_cache(len(coming), max(row.prompt_length for row in coming))


def read(
    model: Transformer,
    cache: KVCache,
    tokens: Sequence[int],
    *,
    row: int = 0,
    prompt_length: int,
    hooks: Hooks,
    chunk: int = PREFILL_CHUNK,
    again: bool = False,
) -> Iterator[None]:
    """Go on reading into a cache of one row the tokens of `tokens` that it does not hold yet.

    `row` and `prompt_length` are what the span tells the hooks. Yields once per forward pass. With `again` the tokens
    are some that the cache held before, see `rerun`.
    """
    assert cache.rows == 1
    while (begin := cache.lengths[0]) < len(tokens):
        part = torch.tensor([list(tokens[begin : begin + chunk])], device=model.device)
        with torch.inference_mode():
            span = plan_span(part, [begin], [part.shape[1]], [row], [prompt_length])
            model.forward(part, cache=cache, hooks=hooks, span=span, last_only=True, rerun=again)
        yield


def rerun(
    model: Transformer,
    cache: KVCache,
    tokens: Sequence[int],
    start: int,
    *,
    row: int = 0,
    prompt_length: int,
    hooks: Hooks,
    chunk: int = PREFILL_CHUNK,
) -> Iterator[None]:
    """Bring a cache of one row up to date with hooks that have changed, from position `start` on.

    `tokens` are those that the cache holds. Only the layers above the residual that it keeps are run; hooks below it
    are not asked again. Yields once per forward pass.
    """
    assert cache.lengths[0] == len(tokens)
    cache.truncate(start)
    yield from read(model, cache, tokens, row=row, prompt_length=prompt_length, hooks=hooks, chunk=chunk, again=True)


def check_biases(logit_bias: Sequence[tuple[int, float]], model: Transformer) -> None:
    """ValueError for a biased token that the model does not have."""
    vocab_size = model.config.vocab_size
    if bad := [token for token, _ in logit_bias if token >= vocab_size]:
        why = f"logit_bias names token {bad[0]}, outside the model's vocabulary of {vocab_size}"
        raise config_error(why, f"ids of tokens go from 0 to {vocab_size - 1}")


def _check_prompt(prompt: Sequence[int], before: int, sampling: Sampling, model: Transformer) -> None:
    context, vocab_size = model.config.max_context, model.config.vocab_size
    if not prompt:
        raise config_error("the prompt is empty", "it needs at least the begin-of-text token")
    if bad := [token for token in prompt if not 0 <= token < vocab_size]:
        raise config_error(f"token id {bad[0]} lies outside the model's vocabulary of {vocab_size}")
    check_biases(sampling.logit_bias, model)
    if before >= len(prompt):
        raise config_error(f"the cache holds {before} tokens, which leaves none of the prompt's {len(prompt)} to read")
    if len(prompt) >= context:
        raise config_error(
            f"the prompt is {len(prompt)} tokens long and the model's context is {context}",
            "shorten the prompt: at least one token must be left for the reply",
        )


def _read(model: Transformer, live: list[_Row], cache: KVCache, hooks: Hooks | None, chunk: int) -> Tensor:
    """float32 logits (B, V) after the next part of what each row has to feed.

    Rows wait until all have the same number of passes to go, so that every prompt ends with the same one.
    """
    passes = max(-(-len(row.feed) // chunk) for row in live)
    parts: list[list[int]] = []
    for row in live:
        size = len(row.feed) - (passes - 1) * chunk
        parts.append(row.feed[: max(0, size)])
        row.feed = row.feed[max(0, size) :]
    counts = [len(part) for part in parts]
    longest = max(counts)
    tokens_BT = torch.tensor([part + [0] * (longest - len(part)) for part in parts], device=model.device)
    span = None
    if hooks is not None and len(hooks):
        numbers, prompt_lengths = [row.number for row in live], [row.prompt_length for row in live]
        span = plan_span(tokens_BT, cache.lengths, counts, numbers, prompt_lengths)
    logits_BTV: Tensor = model(tokens_BT, lengths_B=counts, cache=cache, hooks=hooks, span=span, last_only=True)
    return logits_BTV[:, 0].float()


Drawn = tuple[int, float, float, tuple[Alternative, ...], tuple[float, ...]]
"""Token, logprob, entropy, alternatives, and where there is a shadow KL, surprisal and expected surprisal."""


def _draw(
    logits_BV: Tensor, live: list[_Row], writing: list[int], beside: list[int | None], alternatives: int
) -> list[Drawn]:
    """What each writing row draws, copied from the device at once; `beside` holds the places of their shadows."""
    rows = [live[i] for i in writing]
    own_BV = logits_BV if len(writing) == len(live) else logits_BV[writing]
    drawn = sample(
        own_BV, [row.sampling for row in rows], [row.generator for row in rows], [row.history for row in rows],
        [row.made for row in rows], alternatives,
    )  # fmt: skip
    A = drawn.alternatives_BA.shape[1]
    columns = [drawn.tokens_B[:, None], drawn.logprobs_B[:, None], drawn.entropy_B[:, None]]
    columns += [drawn.alternatives_BA, drawn.probabilities_BA, _distance(logits_BV, own_BV, drawn.tokens_B, beside)]
    assert logits_BV.shape[1] <= 1 << 24, "a float32 would not hold every id exactly, and MPS has no float64"
    table = torch.cat([column.float() for column in columns], 1).tolist()
    return [
        (
            int(token),
            logprob,
            entropy,
            tuple(Alternative(int(i), p) for i, p in zip(rest[:A], rest[A : 2 * A], strict=True)),
            tuple(rest[2 * A :]) if shadow is not None else (),
        )
        for shadow, (token, logprob, entropy, *rest) in zip(beside, table, strict=True)
    ]


def _distance(logits_BV: Tensor, own_BV: Tensor, tokens_B: Tensor, beside: list[int | None]) -> Tensor:
    """(B, 3): KL of each writing row's distribution from its shadow's, the surprisal of its token under the shadow's,
    and the entropy of that; (B, 0) where no row has a shadow."""
    pairs = [(place, shadow) for place, shadow in enumerate(beside) if shadow is not None]
    if not pairs:
        return own_BV.new_zeros(len(own_BV), 0)
    places, shadows = (list(each) for each in zip(*pairs, strict=True))
    ours_PV = torch.log_softmax(own_BV[places].float(), -1)
    theirs_PV = torch.log_softmax(logits_BV[shadows].float(), -1)
    kl_P = (ours_PV.exp() * (ours_PV - theirs_PV)).sum(-1).clamp(min=0.0)
    surprisal_P = -theirs_PV.gather(1, tokens_B[places, None])[:, 0]
    distance_B3 = own_BV.new_zeros(len(own_BV), 3, dtype=torch.float32)
    distance_B3[places] = torch.stack([kl_P, surprisal_P, torch.special.entr(theirs_PV.exp()).sum(-1)], 1)
    return distance_B3
