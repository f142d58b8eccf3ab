"""A batch of replies on its way from the generator's passes to events.

A token's event waits for the forward pass that reads the token, because that pass tells which latents are active on it.
`Held` is what one reply of a chat leaves for the next: a cache, and what was read and done at each of its positions.
Letters: T tokens, P positions, K kept latents.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama_3.cache import KVCache
from llama_3.generate import ReplyText, Step, stream_steps
from llama_3.model import Transformer
from llama_3.sampling import Sampling as TokenSampling
from llama_3.tokenizer import StreamDecoder, Tokenizer
from sae.gate import Ranges
from sae.intervene import Tally
from steer.edits import SteeringSet
from steer.events import Alternative, Carried, EditReport, Event, Finished, PromptRead, Report, TokenEvent
from steer.held import Held
from steer.steerers import Hits, Steerers, TraceOf


@dataclass(slots=True)
class Row:
    """One reply while it is written."""

    prompt: list[int]
    dropped: int
    """Messages that were left out of the prompt."""
    text: ReplyText
    said: Ranges = ()
    """Positions of what the assistant said in earlier turns."""
    hits: list[Hits] = field(default_factory=list)
    """Those of the prompt's tokens read so far."""
    pending: Step | None = None
    """A step whose event waits."""
    unread: int = 0
    """The last token made, which the next pass reads."""
    length: int = 0
    """Tokens of the reply whose event has left."""
    finish: Literal["stop", "length", "cancelled"] = "cancelled"
    steps: int = 0
    applied: int = 0
    ran: bool = False
    """Whether the set has run since the last step."""
    done: bool = False
    sets: list[tuple[int, SteeringSet]] = field(default_factory=list)
    """Every set that was in force, with the first position that was read under it."""

    @property
    def reads(self) -> int:
        """The position that the next pass reads, or 0 before the prompt is read."""
        made = self.length + (self.pending is not None)
        return len(self.prompt) + made - 1 if made else 0


@dataclass(slots=True)
class Replies:
    """Writes a batch of replies with one model and the steerers at its hook points."""

    model: Transformer
    tokenizer: Tokenizer
    steerers: Steerers
    stop_ids: frozenset[int]
    rows: list[Row]
    sets: Callable[[], list[SteeringSet]]
    """The set of each row, asked for before the prompts are read and then before every token."""
    alternatives: int = 5
    watched: Sequence[int] = ()
    """The rows that are measured against the unsteered model on the same text."""
    held: Held | None = None
    """What is known of the only row's tokens; brought up to date and added to."""
    places: int | None = None
    """At most so many rows are written at a time; each then reads its prompt by itself."""

    def write(
        self,
        sampling: Sequence[TokenSampling],
        seeds: Sequence[int],
        limits: Sequence[int],
        stop: threading.Event,
    ) -> Iterator[Event]:
        """The events of all rows, as they come; `limits` are the most tokens of each."""
        started = time.perf_counter()
        self._set_up()
        cache = self._start(max(limits), stop)
        reading = self.steerers.recording
        every = [*range(len(self.rows)), *self.watched]
        passes = stream_steps(
            self.model,
            [self.rows[number].prompt for number in every],
            sampling=[sampling[number] for number in every],
            seeds=[seeds[number] for number in every],
            max_tokens=[limits[number] for number in every],
            stop_ids=self.stop_ids,
            places=self.places,
            texts=[*(row.text for row in self.rows), *[None] * len(self.watched)],
            shadows={len(self.rows) + place: number for place, number in enumerate(self.watched)},
            hooks=self.steerers.hooks,
            cache=cache,
            stop=stop,
            alternatives=self.alternatives,
            read_last=reading,
        )
        read = False
        while True:
            if read:
                self._set_up()
            live = [number for number, row in enumerate(self.rows) if not row.done]
            steps = next(passes, None)
            if steps is None:
                break
            record = self.steerers.hits()
            self._note(record)
            if self.held is not None:
                [row], held = self.rows, self.held
                fed = [row.unread] if read else row.prompt[len(held.tokens) :]
                held.add(0, fed, self.steerers, len(row.prompt), record.get(0, ()))
            if not steps and not read:  # a first part of the prompts
                continue
            read = True
            for step in steps:
                row = self.rows[step.row]
                row.steps, row.applied, row.ran = row.steps + 1, row.applied + row.ran, False
                if row.steps == 1:
                    yield self._prompt_read(step.row, row)
            for number, row_hits in record.items():
                if number < len(self.rows) and self.rows[number].pending is not None:
                    yield self._token_event(number, row_hits[-1])
            for step in steps:
                row = self.rows[step.row]
                row.unread = step.token
                if step.finish == "stop":
                    row.finish, row.done = "stop", True
                    if step.token not in self.stop_ids:  # it completes a stop string, before which it may have text
                        row.pending = step
                else:
                    row.pending = step
                    if step.finish == "length":
                        row.finish = "length"
                    if not reading:
                        yield self._token_event(step.row, ())
                        row.done = step.finish is not None
            for number in live:
                row = self.rows[number]
                row.done |= reading and row.finish == "length" and row.pending is None
                if row.done:
                    yield self._finished(number, seeds[number], started)
        for number, row in enumerate(self.rows):
            if not row.done:
                if row.pending is not None:
                    yield self._token_event(number, ())
                row.done = True
                yield self._finished(number, seeds[number], started)

    # -- the set, and what is held of a chat ------------------------------------------------------------------------

    def _set_up(self) -> None:
        """Take the sets for the next pass."""
        sets = self.sets()
        for row, one in zip(self.rows, sets, strict=True):
            if not row.done and row.finish != "length" and (not row.sets or row.sets[-1][1] != one):
                row.sets.append((row.reads, one))
        # A row cut by length is read once more only to be looked at: that pass is no part of its reply.
        self.steerers.take({number: one for number, one in enumerate(sets) if self.rows[number].finish != "length"})

    def _start(self, max_tokens: int, stop: threading.Event) -> KVCache | None:
        """The cache that the replies are written to, with what it is worth to have read before; None: nothing."""
        prompt, rows = self.rows[0].prompt, len(self.rows) + len(self.watched)
        held = self.held
        if held is not None:
            held.take_up(self.model, self.steerers, prompt, stop)
            self._note({})
            self.rows[0].hits = list(held.hits)
        if rows == 1 or self.places or len(prompt) < 2 or any(row.prompt != prompt for row in self.rows):
            return held.cache if held is not None else None
        if held is None:
            held = Held.empty(self.model, min(self.model.config.max_context, len(prompt) + max_tokens), self.steerers)
        held.read(self.model, self.steerers, prompt, stop)
        self.rows[0].hits = list(held.hits)
        copies = []
        for number in range(1, rows):
            copy = held.copy(self.model, self.steerers, prompt, number, stop)
            copies.append(copy.cache)
            if number < len(self.rows):
                self.rows[number].hits = copy.hits
        self._note({})
        held.cache = KVCache.join([held.cache, *copies])
        return held.cache

    def _note(self, record: dict[int, list[Hits]]) -> None:
        """Take down what the last pass did: hits of prompts, whether the set ran, and what of it is held."""
        ran = self.steerers.ran()
        for number, row in enumerate(self.rows):
            row.ran |= number in ran
            if len(row.hits) < len(row.prompt):
                row.hits += record.get(number, [])
        if self.held is not None:
            self.held.take_traces(self.steerers)

    # -- events -----------------------------------------------------------------------------------------------------

    def _prompt_read(self, number: int, row: Row) -> PromptRead:
        return PromptRead(number, prompt_events(self.tokenizer, number, row.prompt, row.hits), row.dropped)

    def _token_event(self, number: int, hits: Hits) -> TokenEvent:
        row = self.rows[number]
        step = row.pending
        assert step is not None
        row.pending = None
        index = len(row.prompt) + row.length
        row.length += 1
        special = step.token in self.tokenizer.special_ids
        others = tuple(
            Alternative(self.tokenizer.token_text(a.token), a.probability)
            for a in step.alternatives
            if a.token != step.token
        )
        facts = step.logprob, step.entropy, others, hits, step.kl, step.surprisal, step.expected
        return TokenEvent(number, index, step.token, step.text, special, *facts)

    def _finished(self, number: int, seed: int, started: float) -> Finished:
        row, seconds = self.rows[number], time.perf_counter() - started
        text = (row.pending.text if row.pending is not None else "") + row.text.flush()
        speed = row.length / seconds if seconds > 0 else 0.0
        return Finished(number, row.finish, seed, self._report(number, row), speed, text)

    def _report(self, number: int, row: Row) -> Report:
        if not self.steerers.points:
            return Report(row.steps)
        named = {str(edit): self.steerers.edits[edit] for _, one in row.sets for edit in one.live}
        told = [(text, tally) for text, of in named.items() if (tally := self._tally(number, of)) is not None]
        edits = tuple(EditReport(text, each.positions, each.before, each.after, each.lost) for text, each in told)
        # Where a set drops the error it does so at every SAE, so that the first one's trace tells of all.
        drops = [tally for point in [*self.steerers.saes][:1] if (tally := self._tally(number, (point, None)))]
        acted = [tally for tally in (*(tally for _, tally in told), *drops) if tally.positions]
        first = min((tally.first for tally in acted if tally.first is not None), default=None)
        last = max((tally.last for tally in acted if tally.last is not None), default=None)
        carried = tuple(Carried(at, tuple(map(str, one.live))) for at, one in row.sets)
        return Report(row.steps, row.applied, edits, first, last, carried, sum(tally.positions for tally in drops))

    def _tally(self, number: int, of: TraceOf) -> Tally | None:
        """What an edit did to a row in sum; None where it was never in force while a token was read."""
        traces = self.held.traces.get(of) if self.held else self.steerers.traces(number, of)
        return None if traces is None else Tally.of(traces)


def prompt_events(
    tokenizer: Tokenizer, number: int, prompt: Sequence[int], hits: Sequence[Hits]
) -> tuple[TokenEvent, ...]:
    """The tokens of a prompt as events, with their hits where there are any."""
    decoder, events = StreamDecoder(tokenizer), []
    for index, token in enumerate(prompt):
        special = token in tokenizer.special_ids
        text = tokenizer.token_text(token) if special else decoder.push(token)
        events.append(TokenEvent(number, index, token, text, special, hits=hits[index] if index < len(hits) else ()))
    return tuple(events)
