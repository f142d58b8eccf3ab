"""`Steerers`: the steerer at every hook point where a batch of replies is read or edited.

There is one for each SAE from the start, and one more for a vector at a point without an SAE once a set asks for it.
Hits come from the first SAE. What acts at a position can be asked for, so that a chat's cache knows what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llama_3.hooks import SITES, HookPoint, Hooks
from sae.compiled import NO_EDITS, CompiledEdit
from sae.gate import Ranges
from sae.intervene import Record, Steerer, Trace
from sae.model import SAE
from steer.edits import SteeringSet
from steer.resolve import Compiled, Resolver

NOTHING: Compiled = {}
EditAt = tuple[HookPoint, CompiledEdit]


def in_order(points: Iterable[HookPoint]) -> list[HookPoint]:
    """Hook points in the order in which a forward pass meets them."""
    return sorted(points, key=lambda point: (point.layer, SITES.index(point.site)))


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
    hooks: Hooks = field(default_factory=Hooks)
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
            self._compiled[one] = self.resolver.compile(one)
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

    def last_record(self) -> Record | None:
        """The latents of the last forward pass, where they were recorded."""
        for point in self.saes:
            records = self._at[point].records
            last = records.pop() if records else None
            records.clear()
            return last
        return None

    def traces(self, row: int, of: EditAt) -> Sequence[Trace] | None:
        """What an edit did to a row so far; None where it was never in force while a token was read."""
        steerer = self._at.get(of[0])
        return steerer.traces.get((row, of[1])) if steerer else None

    def take_traces(self) -> Iterable[tuple[EditAt, list[Trace]]]:
        """What edits did to the only row since this was last asked."""
        for point, steerer in self._at.items():
            for (_, edit), traces in steerer.traces.items():
                yield (point, edit), traces
            steerer.traces.clear()

    def _stand(self, point: HookPoint) -> None:
        steerer = Steerer(self.saes.get(point), self.special)
        steerer.gate.assistant = self.said
        self._at[point] = steerer
        self.hooks.add(point, steerer)
