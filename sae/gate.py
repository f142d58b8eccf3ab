"""`Gate`: where and when an edit acts, and with what share of its strength.

    place       all, prompt, generated, assistant, last, or a range of positions
    condition   met from the first readable position on at which another latent was above a bound; it stays met
    t           positions since the first one at which the edit was in force, its place held and its condition was met
    share       0 where t >= lasts, else min(1, (t + 1) / ramp) * 0.5^(t / decay)

What a gate remembers of a row (where a condition was met, where t is 0) are numbers on the device: nothing waits for
them. An edit whose strength alone changes keeps its t; one that leaves a row's set and comes back starts anew.
Letters: T tokens, R the rows of a batch that share one set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae.compiled import CompiledEdit

NEVER = 1 << 60
"""A position that no row reaches."""
Ranges = Sequence[tuple[int, int]]
"""First position of each and the one after its last."""


@dataclass(frozen=True, slots=True)
class Where:
    """The positions of one forward pass, of the rows that share a set."""

    rows: Sequence[int]
    positions_RT: Tensor
    real_RT: Tensor
    """Not padding."""
    readable_RT: Tensor
    """Neither padding nor the first token nor a special one."""
    generated_RT: Tensor
    last_RT: Tensor
    """The last token of the prompt."""


@dataclass(slots=True)
class Gate:
    """The timing of the edits of every row at one hook point."""

    assistant: Mapping[int, Ranges] = field(default_factory=dict)
    """By row, what the assistant said in earlier turns."""
    _met: dict[tuple[int, CompiledEdit], Tensor] = field(default_factory=dict)
    _began: dict[tuple[int, CompiledEdit], Tensor] = field(default_factory=dict)

    def share(self, edit: CompiledEdit, where: Where, other_RT: Tensor | None, special: bool) -> tuple[Tensor, Tensor]:
        """(acts, share), both (R, T): bool, and the float32 share of the strength, 0 where it does not act.

        `other_RT` is the activation of the latent of its condition, `special` whether the first token and special ones
        are edited too.
        """
        acts_RT = self._place(edit, where) & (where.real_RT if special or edit.special else where.readable_RT)
        if edit.stateful:
            met_RT, positions_RT = acts_RT, where.positions_RT
            if other_RT is not None:
                over_RT = (other_RT > edit.above) & where.readable_RT
                met_R1 = self._first(self._met, edit, where, over_RT)
                met_RT = acts_RT & (positions_RT >= met_R1)
            t_RT = positions_RT - self._first(self._began, edit, where, met_RT)
            acts_RT = met_RT & (t_RT < (edit.lasts or NEVER))
            if edit.ramp or edit.decay:
                t_RT = t_RT.clamp(min=0).float()
                share_RT = torch.exp2(-t_RT / edit.decay) if edit.decay else torch.ones_like(t_RT)
                if edit.ramp:
                    share_RT = share_RT * ((t_RT + 1) / edit.ramp).clamp(max=1)
                return acts_RT, torch.where(acts_RT, share_RT, 0.0)
        return acts_RT, acts_RT.float()

    def keep(self, live: Mapping[int, Sequence[CompiledEdit]]) -> None:
        """Forget the edits that are no longer in force, by row."""
        if self._began:
            timed = {(row, edit.timing) for row, edits in live.items() for edit in edits}
            for known in (self._met, self._began):
                for gone in known.keys() - timed:
                    del known[gone]

    def _first(
        self, known: dict[tuple[int, CompiledEdit], Tensor], edit: CompiledEdit, where: Where, holds_RT: Tensor
    ) -> Tensor:
        """(R, 1), the first position at which something held, in this pass or before; `NEVER` where it has not."""
        first_R = torch.where(holds_RT, where.positions_RT, NEVER).amin(1)
        keys = [(row, edit.timing) for row in where.rows]
        before = [known.get(key) for key in keys]
        if any(one is not None for one in before):
            never = first_R.new_tensor(NEVER)
            first_R = torch.minimum(first_R, torch.stack([never if one is None else one for one in before]))
        known.update(zip(keys, first_R, strict=True))
        return first_R[:, None]

    def _place(self, edit: CompiledEdit, where: Where) -> Tensor:
        """(R, T) bool: the positions of the edit's place."""
        positions_RT = where.positions_RT
        match edit.place:
            case "prompt":
                return ~where.generated_RT
            case "generated":
                return where.generated_RT
            case "last":
                return where.last_RT
            case "assistant":
                said = [
                    self._inside(positions_T, row) for positions_T, row in zip(positions_RT, where.rows, strict=True)
                ]
                return where.generated_RT | torch.stack(said)
            case "range":
                return (positions_RT >= edit.first) & (positions_RT <= edit.last)
        return torch.ones_like(where.real_RT)

    def _inside(self, positions_T: Tensor, row: int) -> Tensor:
        inside_T = torch.zeros_like(positions_T, dtype=torch.bool)
        for first, end in self.assistant.get(row, ()):
            inside_T |= (positions_T >= first) & (positions_T < end)
        return inside_T
