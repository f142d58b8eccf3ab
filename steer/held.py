"""`Held`: what the model has read of a chat, and how it is brought up to date.

Positions whose set is unchanged are kept. From the first that differs on, the layers above the lowest hook point run
again, from the residual that the cache keeps there; what lies below an edit that the cache does not reach is read anew.
The text, hits and report are those of a reading from the start.
Letters: P positions.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llama_3.cache import KVCache
from llama_3.generate import read, rerun
from llama_3.hooks import HookPoint
from llama_3.model import Transformer
from sae.intervene import Trace
from steer.resolve import Compiled
from steer.steerers import Hits, Steerers, TraceOf, in_order


@dataclass(slots=True)
class Held:
    """The tokens of one row. Lists have one entry for each position that the cache holds."""

    cache: KVCache
    tokens: list[int] = field(default_factory=list)
    sets: list[Compiled] = field(default_factory=list)
    """What of the set in force could act there."""
    hits: list[Hits] = field(default_factory=list)
    traces: dict[TraceOf, list[Trace]] = field(default_factory=dict)

    @classmethod
    def empty(cls, model: Transformer, capacity: int, steerers: Steerers) -> Held:
        """Room for so many tokens; the residual is kept at the lowest point where something stands."""
        cache = model.new_cache(1, capacity)
        if steerers.points:
            cache.keep(steerers.points[0])
        return cls(cache)

    def cut(self, length: int) -> None:
        """Forget what stands from position `length` on."""
        self.cache.truncate(length)
        del self.tokens[length:], self.sets[length:], self.hits[length:]

    def add(self, row: int, fed: Sequence[int], steerers: Steerers, prompt_length: int, hits: Sequence[Hits]) -> None:
        """Note what the last pass read: the next of the tokens `fed`, with their hits or none."""
        begin, end = len(self.tokens), self.cache.lengths[0]
        self.tokens += fed[: end - begin]
        self.sets += [steerers.at(row, p, prompt_length) for p in range(begin, end)]
        self.hits += hits or [()] * (end - begin)

    def take_traces(self, steerers: Steerers) -> None:
        """Take over what edits did in the last passes."""
        for of, traces in steerers.take_traces():
            self.traces.setdefault(of, []).extend(traces)

    def take_up(self, model: Transformer, steerers: Steerers, prompt: list[int], stop: threading.Event) -> None:
        """Bring what is held up to date with a prompt and with the set that is in force now."""
        shared = min(len(prompt) - 1, len(self.tokens), self.cache.lengths[0])
        shared = next((p for p in range(shared) if prompt[p] != self.tokens[p]), shared)
        self.cut(shared)
        fresh = next((p for p in range(shared) if self.sets[p] != steerers.at(0, p, len(prompt))), shared)
        if steerers.stateful(0):
            fresh = 0  # when such an edit began depends on all that stands before
        kept, reached = self.cache.kept_at, range(fresh, shared)
        below = next((p for p in reached if kept and self._below(kept, p, steerers.at(0, p, len(prompt)))), shared)
        self.cut(below)
        for edit, traces in self.traces.items():
            trace_5P = torch.cat(traces, 1)
            self.traces[edit] = [trace_5P[:, trace_5P[0] < fresh]]
        self.cut(self._rerun(model, steerers, 0, min(fresh, below), len(prompt), stop))

    def read(self, model: Transformer, steerers: Steerers, prompt: list[int], stop: threading.Event) -> None:
        """Read all of a prompt but its last token."""
        for _ in read(model, self.cache, prompt[:-1], prompt_length=len(prompt), hooks=steerers.hooks):
            self.add(0, prompt[len(self.tokens) :], steerers, len(prompt), steerers.hits().get(0, ()))
            if stop.is_set():
                break

    def copy(self, model: Transformer, steerers: Steerers, prompt: list[int], row: int, stop: threading.Event) -> Held:
        """The same tokens as another row with its own set reads them."""
        copy = Held(self.cache.fork(0, 1), self.tokens, list(self.sets), list(self.hits))
        ours = [steerers.at(row, p, len(prompt)) for p in range(len(self.tokens))]
        fresh = next((p for p, one in enumerate(ours) if one != self.sets[p]), len(ours))
        fresh = 0 if steerers.stateful(row) or steerers.stateful(0) else fresh
        steerers.copy_traces(row, fresh)
        copy._rerun(model, steerers, row, fresh, len(prompt), stop)
        return copy

    def _rerun(
        self, model: Transformer, steerers: Steerers, row: int, fresh: int, prompt_length: int, stop: threading.Event
    ) -> int:
        """Run the layers above the lowest hook point again from position `fresh` on; up to where that has come."""
        # The hits change only where something acts, or acted, below the SAE that they come from.
        first, differ = next(iter(steerers.saes), None), range(fresh, len(self.tokens))
        again = steerers.recording and any(
            first and self._below(first, p, steerers.at(row, p, prompt_length)) for p in differ
        )
        steerers.record(again)
        hooks, tokens = steerers.hooks, list(self.tokens)
        for _ in rerun(model, self.cache, tokens, fresh, row=row, prompt_length=prompt_length, hooks=hooks):
            end = self.cache.lengths[0]
            self.sets[fresh:end] = [steerers.at(row, p, prompt_length) for p in range(fresh, end)]
            if again and (found := steerers.hits().get(row)):
                self.hits[fresh:end] = found
            fresh = end
            if stop.is_set():
                break
        steerers.record(steerers.recording)
        return fresh

    def _below(self, point: HookPoint, position: int, now: Compiled) -> bool:
        """Whether an edit acts, or acted, at a position below a hook point."""
        return in_order([point, *self.sets[position], *now])[0] != point
