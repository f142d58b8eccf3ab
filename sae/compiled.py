"""Edits as a steerer takes them: strengths are raw numbers, places plain, and two that do the same are equal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

Kind = Literal["add", "clamp", "scale", "ablate", "floor", "cap", "bias", "project", "vector"]
Place = Literal["all", "prompt", "generated", "assistant", "last", "range"]


@dataclass(frozen=True, slots=True)
class CompiledEdit:
    """One edit at one hook point."""

    kind: Kind
    latent: int
    """-1 for a vector."""
    value: float = 0.0
    if_on: bool = False
    place: Place = "all"
    special: bool = False
    """Whether it acts on the first token and on special ones too."""
    first: int = 0
    last: int = 0
    """First and last position of a range."""
    other: int | None = None
    """The latent of its condition, and the activation it has to be above."""
    above: float = 0.0
    lasts: int | None = None
    ramp: int | None = None
    decay: int | None = None
    source: str = ""
    """Of a vector: what names it."""
    direction_D: Tensor | None = field(default=None, compare=False)
    """Of a vector: float32."""

    @property
    def stateful(self) -> bool:
        """Whether what it does at a position depends on positions before."""
        return self.other is not None or bool(self.lasts or self.ramp or self.decay)

    @property
    def timing(self) -> CompiledEdit:
        """The edit but for its strength."""
        return replace(self, value=0.0)

    def reaches(self, position: int, prompt_length: int, said: bool) -> bool:
        """Whether it could act at a position; `said`, whether the assistant said it in an earlier turn."""
        match self.place:
            case "prompt":
                return position < prompt_length - 1
            case "generated":
                return position >= prompt_length - 1
            case "last":
                return position == prompt_length - 1
            case "assistant":
                return said or position >= prompt_length - 1
            case "range":
                return self.first <= position <= self.last
        return True


@dataclass(frozen=True, slots=True)
class CompiledSet:
    """The live edits of one row at one hook point, and what becomes of the reconstruction error."""

    edits: tuple[CompiledEdit, ...] = ()
    drop_error: bool = False
    special_tokens: bool = False
    factor: float = 1.0
    """Every delta is multiplied by this."""

    def __bool__(self) -> bool:
        return bool(self.edits) or self.drop_error

    def at(self, position: int, prompt_length: int, said: bool = False) -> CompiledSet:
        """What of the set could act at a position."""
        kept = tuple(edit for edit in self.edits if edit.reaches(position, prompt_length, said))
        return replace(self, edits=kept) if kept or self.drop_error else NO_EDITS


NO_EDITS = CompiledSet()
