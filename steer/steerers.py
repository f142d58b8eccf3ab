"""`Steerers`: the steerer at every hook point where a batch of replies is read or edited.

There is one for each SAE from the start, and one more for a vector at a point without an SAE once a set asks for it.
Hits come from the first SAE. What acts at a position can be asked for, so that a chat's cache knows what it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from llama_3.hooks import HookPoint, Hooks
from sae.compiled import NO_EDITS, CompiledEdit
from sae.gate import Ranges
from sae.intervene import Record, Steerer, Trace
from sae.model import SAE
from steer.edits import Edit, SteeringSet
from steer.events import LatentHit
from steer.resolve import Compiled, EditAt, Resolver

Hits = tuple[LatentHit, ...]
WIDE = 256
"""Slots from which on it pays to look how many of them are active before they become Python numbers."""
NOTHING: Compiled = {}
TraceOf = tuple[HookPoint, CompiledEdit | None]
"""An edit, or the error that is dropped, at a hook point."""


def in_order(points: Iterable[HookPoint]) -> list[HookPoint]:
    """Hook points in the order in which a forward pass meets them."""
    return sorted(points, key=lambda point: point.depth)


@dataclass(slots=True)
class Steerers:
    """What stands at the hook points during a batch of replies; none where there is neither SAE nor edit."""

    saes: Mapping[HookPoint, SAE]
    resolver: Resolver
    special: frozenset[int]
    recording: bool
    """Whether the latents of every token are asked for."""
    said: Mapping[int, Ranges] = field(default_factory=dict)
    """By row, the positions of what the assistant said in earlier turns."""
    shadows: Collection[int] = ()
    """Rows that are neither read nor edited."""
    hooks: Hooks = field(default_factory=Hooks)
    edits: dict[Edit, EditAt] = field(default_factory=dict)
    """What each edit came to when it first ran: its file may be another one by the end of a reply, or gone."""
    _at: dict[HookPoint, Steerer] = field(default_factory=dict)
    _compiled: dict[SteeringSet, Compiled] = field(default_factory=dict)
    _sets: dict[int, Compiled] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for point in self.saes:
            self._stand(point)
        self.record(self.recording)

    @property
    def points(self) -> list[HookPoint]:
        """Where something stands, in the order of a forward pass."""
        return in_order(self._at)

    def record(self, recording: bool) -> None:
        """Have latents recorded, or not."""
        for point in self.saes:
            self._at[point].recording = recording
            break  # the first SAE's are what is shown

    def take(self, sets: Mapping[int, SteeringSet]) -> None:
        """The sets of the next forward pass by row; rows left out run unedited."""
        self._sets = {row: self.compile(one) for row, one in sets.items()}
        for point in {point for compiled in self._sets.values() for point in compiled} - self._at.keys():
            self._stand(point)
        for point, steerer in self._at.items():
            steerer.sets = {row: compiled.get(point, NO_EDITS) for row, compiled in self._sets.items()}

    def compile(self, one: SteeringSet) -> Compiled:
        """A set as its SAEs run it."""
        if one not in self._compiled:
            self._compiled[one] = self.resolver.compile(one, self.edits)
        return self._compiled[one]

    def stateful(self, row: int) -> bool:
        """Whether what a row's set does at a position depends on the positions before."""
        return any(edit.stateful for one in self._sets.get(row, NOTHING).values() for edit in one.edits)

    def at(self, row: int, position: int, prompt_length: int) -> Compiled:
        """What could act at a position of a row in the next pass."""
        compiled = self._sets.get(row, NOTHING)
        if not compiled:
            return NOTHING
        said = any(first <= position < end for first, end in self.said.get(row, ()))
        acting = {point: one.at(position, prompt_length, said) for point, one in compiled.items()}
        return {point: one for point, one in acting.items() if one}

    def ran(self) -> set[int]:
        """The rows whose set has run since this was last asked."""
        rows: set[int] = set()
        for steerer in self._at.values():
            rows |= steerer.applied.keys()
            steerer.applied.clear()
        return rows

    def hits(self) -> dict[int, list[Hits]]:
        """The hits of the last forward pass, where they were recorded: row -> one tuple per token it read."""
        for point in self.saes:
            records = self._at[point].records
            last = records.pop() if records else None
            records.clear()
            return hits_by_row(last) if last else {}
        return {}

    def traces(self, row: int, of: TraceOf) -> Sequence[Trace] | None:
        """What an edit did to a row so far; None where it was never in force while a token was read."""
        steerer = self._at.get(of[0])
        return steerer.traces.get((row, of[1])) if steerer else None

    def take_traces(self) -> Iterable[tuple[TraceOf, list[Trace]]]:
        """What edits did to the first row since this was last asked."""
        for point, steerer in self._at.items():
            for row, edit in [key for key in steerer.traces if key[0] == 0]:
                yield (point, edit), steerer.traces.pop((row, edit))

    def copy_traces(self, row: int, end: int) -> None:
        """Say of a row what edits did to the first one before position `end`: it has not been read on its own there."""
        for steerer in self._at.values():
            for (_, edit), traces in [each for each in steerer.traces.items() if each[0][0] == 0]:
                trace_5P = torch.cat(traces, 1)
                steerer.traces[row, edit] = [trace_5P[:, trace_5P[0] < end]]

    def _stand(self, point: HookPoint) -> None:
        steerer = Steerer(self.saes.get(point), self.special)
        steerer.gate.assistant, steerer.passing = self.said, self.shadows
        self._at[point] = steerer
        self.hooks.add(point, steerer)


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
