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

import torch

from llama_3.cache import KVCache
from llama_3.generate import ReplyText, Step, rerun, stream_steps
from llama_3.model import Transformer
from llama_3.sampling import Sampling as TokenSampling
from llama_3.tokenizer import StreamDecoder, Tokenizer
from sae.gate import Ranges
from sae.intervene import Record, Tally, Trace
from steer.edits import SteeringSet
from steer.events import Alternative, Carried, EditReport, Event, Finished, LatentHit, PromptRead, Report, TokenEvent
from steer.resolve import Compiled
from steer.steerers import EditAt, Steerers, in_order

Hits = tuple[LatentHit, ...]

WIDE = 256
"""Slots from which on it pays to look how many of them are active before they become Python numbers."""


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
class Held:
    """What the model has read of a chat. Lists have one entry for each position that the cache holds."""

    cache: KVCache
    tokens: list[int] = field(default_factory=list)
    sets: list[Compiled] = field(default_factory=list)
    """What of the set in force could act there."""
    hits: list[Hits] = field(default_factory=list)
    traces: dict[EditAt, list[Trace]] = field(default_factory=dict)

    def cut(self, length: int) -> None:
        """Forget what stands from position `length` on."""
        self.cache.truncate(length)
        del self.tokens[length:], self.sets[length:], self.hits[length:]

    def forget_traces(self, start: int) -> None:
        """Drop what edits did from position `start` on."""
        for edit, traces in self.traces.items():
            trace_5P = torch.cat(traces, 1)
            self.traces[edit] = [trace_5P[:, trace_5P[0] < start]]


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
    held: Held | None = None
    """What is known of the only row's tokens; brought up to date and added to."""

    def write(
        self,
        sampling: Sequence[TokenSampling],
        seeds: Sequence[int],
        max_tokens: int,
        stop: threading.Event,
    ) -> Iterator[Event]:
        """The events of all rows, as they come."""
        started = time.perf_counter()
        self._set_up()
        self._take_up(stop)
        reading = self.steerers.recording
        passes = stream_steps(
            self.model,
            [row.prompt for row in self.rows],
            sampling=sampling,
            seeds=seeds,
            max_tokens=max_tokens,
            stop_ids=self.stop_ids,
            texts=[row.text for row in self.rows],
            hooks=self.steerers.hooks,
            cache=self.held.cache if self.held else None,
            stop=stop,
            alternatives=self.alternatives,
            read_last=reading,
        )
        read = False
        while True:
            if read:
                self._set_up()
            live = [number for number, row in enumerate(self.rows) if not row.done]
            writing = [number for number in live if self.rows[number].finish != "length"]
            steps = next(passes, None)
            if steps is None:
                break
            record = self._hits_by_row()
            self._note(record)
            self._hold(record)
            if not steps and not read:  # a first part of the prompts
                continue
            for number in writing:
                row = self.rows[number]
                row.steps, row.applied, row.ran = row.steps + 1, row.applied + row.ran, False
            if not read:
                read = True
                for number, row in enumerate(self.rows):
                    yield self._prompt_read(number, row)
            else:
                for number, row_hits in record.items():
                    if self.rows[number].pending is not None:
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

    def _at(self, position: int) -> Compiled:
        """What could act at a position of the only row in this pass."""
        return self.steerers.at(0, position, len(self.rows[0].prompt))

    def _take_up(self, stop: threading.Event) -> None:
        """Bring what is held up to date with the prompt and the set: the layers above the first hook point are run
        again from the first position where the set would now act otherwise."""
        if self.held is None:
            return
        [row], held = self.rows, self.held
        pairs = zip(row.prompt[:-1], held.tokens[: held.cache.lengths[0]], strict=False)
        shared = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if shared is None:
            shared = min(len(row.prompt) - 1, len(held.tokens), held.cache.lengths[0])
        held.cut(shared)
        fresh = next((p for p in range(shared) if held.sets[p] != self._at(p)), shared)
        if self.steerers.stateful(0):
            fresh = 0  # when such an edit began depends on all that stands before
        below = next((p for p in range(fresh, shared) if self._below(held, p)), shared)
        held.cut(below)
        held.forget_traces(fresh)
        # The hits change only where something may act below the SAE that they come from.
        first = next(iter(self.steerers.saes), None)
        again = self.steerers.recording and first is not None and held.cache.kept_at != first.entry
        self.steerers.record(again)
        tokens = list(held.tokens)
        for _ in rerun(self.model, held.cache, tokens, fresh, prompt_length=len(row.prompt), hooks=self.steerers.hooks):
            end = held.cache.lengths[0]
            held.sets[fresh:end] = [self._at(p) for p in range(fresh, end)]
            if again:
                held.hits[fresh:end] = self._hits_by_row()[0]
            fresh = end
            self._note({})
            if stop.is_set():
                break
        self.steerers.record(self.steerers.recording)
        held.cut(fresh)
        row.hits = list(held.hits)

    def _below(self, held: Held, position: int) -> bool:
        """Whether an edit acts, or acted, at a position below what the cache keeps, so that it has to be read anew."""
        points = {*held.sets[position], *self._at(position)}
        kept = held.cache.kept_at
        return kept is not None and bool(points) and in_order([kept, *points])[0] != kept

    def _note(self, record: dict[int, list[Hits]]) -> None:
        """Take down what the last pass did: hits of prompts, whether the set ran, and what of it is held."""
        ran = self.steerers.ran()
        for number, row in enumerate(self.rows):
            row.ran |= number in ran
            if len(row.hits) < len(row.prompt):
                row.hits += record.get(number, [])
        if self.held is not None:
            for of, traces in self.steerers.take_traces():
                self.held.traces.setdefault(of, []).extend(traces)

    def _hold(self, record: dict[int, list[Hits]]) -> None:
        """Add the tokens that the last pass read to those held."""
        if self.held is None:
            return
        [row], held = self.rows, self.held
        begin, end = len(held.tokens), held.cache.lengths[0]
        held.tokens += row.prompt[begin:end] if begin < len(row.prompt) else [row.unread]
        held.sets += [self._at(p) for p in range(begin, end)]
        held.hits += record.get(0, [()] * (end - begin))

    def _hits_by_row(self) -> dict[int, list[Hits]]:
        """The hits of the last forward pass: row -> one tuple per token it read (padding left out)."""
        record = self.steerers.last_record()
        return {} if record is None else hits_by_row(record)

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
        return TokenEvent(number, index, step.token, step.text, special, step.logprob, step.entropy, others, hits)

    def _finished(self, number: int, seed: int, started: float) -> Finished:
        row, seconds = self.rows[number], time.perf_counter() - started
        text = (row.pending.text if row.pending is not None else "") + row.text.flush()
        speed = row.length / seconds if seconds > 0 else 0.0
        return Finished(number, row.finish, seed, self._report(number, row), speed, text)

    def _report(self, number: int, row: Row) -> Report:
        if not self.steerers.points:
            return Report(row.steps)
        edits, spans = [], []
        named = {self.steerers.resolver.edit(edit): str(edit) for _, one in row.sets for edit in one.live}
        for of, text in named.items():
            traces = self.held.traces.get(of) if self.held else self.steerers.traces(number, of)
            if traces is None:  # it was never in force while a token was read
                continue
            tally = Tally.of(traces)
            edits.append(EditReport(text, tally.positions, tally.before, tally.after, tally.lost))
            if tally.first is not None and tally.last is not None:
                spans.append((tally.first, tally.last))
        first, last = (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else (None, None)
        carried = tuple(Carried(at, tuple(map(str, one.live))) for at, one in row.sets)
        return Report(row.steps, row.applied, tuple(edits), first, last, carried)


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


def hits_by_row(record: Record) -> dict[int, list[Hits]]:
    """Row -> per token it read (padding left out) the active latents, strongest first; one copy from the device."""
    values_BTK, order = record.latents.values.float().sort(-1, descending=True)
    indices_BTK = record.latents.indices.gather(-1, order)
    flags_BT2 = torch.stack([record.positions_BT >= 0, record.readable_BT], -1)
    table = torch.cat([flags_BT2, indices_BTK, values_BTK], -1).cpu()  # a float32 holds every index up to 2^24
    k = most = indices_BTK.shape[-1]
    if k > WIDE:  # some SAEs light thousands of latents on the first token, which is not read
        most = int(((table[..., 2 + k :] > 0) & (table[..., 1:2] > 0)).sum(-1).max())
        table = torch.cat([table[..., : 2 + most], table[..., 2 + k : 2 + k + most]], -1)
    return {
        row: [
            tuple(LatentHit(int(i), v) for i, v in zip(cells[:most], cells[most:], strict=True) if v > 0)
            if reads
            else ()
            for real, reads, *cells in tokens
            if real
        ]
        for row, tokens in zip(record.rows, table.tolist(), strict=True)
    }
