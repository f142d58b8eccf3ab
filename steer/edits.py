"""Edits and steering sets as a person writes them: values without tensors, frozen, equal when they say the same.

    [KIND] LATENT [VALUE] [if on] [on PLACE]

`21863 +1.1x` adds, `clamp 4410 0`, `scale 902 2`, `ablate 77`, `bias 5 3.0`, `clamp 4410 0 if on on generated`. What is
printed parses back to the same edit. A strength keeps number and unit as typed; the engine resolves it when the set
meets its SAE. The deltas these stand for are in `sae/intervene.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from steer.errors import SteerError
from steer.events import clean

Kind = Literal["add", "clamp", "scale", "ablate", "bias"]
Place = Literal["all", "prompt", "generated"]
Unit = Literal["raw", "max", "norm"]

KINDS: tuple[Kind, ...] = get_args(Kind)
PLACES: tuple[Place, ...] = get_args(Place)
FORMULAS: dict[Kind, str] = {
    "add": "v * d, whatever the latent does",
    "clamp": "(v - a) * d, so the latent contributes exactly v",
    "scale": "(s - 1) * a * d, so the latent contributes s times as much",
    "ablate": "-a * d, so the latent contributes nothing",
    "bias": "act(pre + v e_i) - act(pre), decoded: v is added before the activation: threshold, or race for k places",
}
"""What each kind adds to the residual stream; d is the latent's decoder direction, a its activation."""

GRAMMAR = "[KIND] LATENT [VALUE] [if on] [on prompt|generated|all]"
_SUFFIX: dict[Unit, str] = {"raw": "", "max": "x", "norm": "%"}
_NUMBER = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(x|%)?$")


def _mistake(text: str, why: str) -> SteerError:
    hint = f"write {GRAMMAR}, for example `21863 +1.1x` or `clamp 4410 0`"
    return SteerError(f"`{clean(text)}` is no edit: {why}", hint)


@dataclass(frozen=True, slots=True)
class Strength:
    """A number with its unit: `13.6` raw, `1.1x` times the latent's recorded max, `30%` of the median residual norm."""

    number: float
    unit: Unit = "raw"

    @classmethod
    def parse(cls, text: str) -> Strength:
        """The strength written as `13.6`, `1.1x` or `30%`; a `SteerError` when it is none of these or not finite."""
        match = _NUMBER.match(text.strip())
        if match is None or not math.isfinite(float(match[1])):
            raise SteerError(
                f"`{clean(text)}` is no strength", "write `13.6` (raw), `1.1x` (of max) or `30%` (of the residual norm)"
            )
        units: dict[str | None, Unit] = {None: "raw", "x": "max", "%": "norm"}
        return cls(float(match[1]), units[match[2]])

    def __str__(self) -> str:
        number = repr(self.number).removesuffix(".0")
        return number + _SUFFIX[self.unit]


@dataclass(frozen=True, slots=True)
class Edit:
    """One instruction: what is done to which latent, how strongly, where."""

    latent: int
    kind: Kind = "add"
    strength: Strength | None = None
    """None for `ablate` only; a plain factor for `scale`."""
    if_on: bool = False
    """`clamp` only where the latent is active."""
    place: Place = "all"
    muted: bool = False

    def __post_init__(self) -> None:
        text = f"{self.kind} {self.latent}"
        if self.latent < 0:
            raise _mistake(text, "a latent is a number from 0")
        if (self.strength is None) != (self.kind == "ablate"):
            raise _mistake(text, "ablate takes no value" if self.kind == "ablate" else f"{self.kind} needs a value")
        if self.kind == "scale" and self.strength is not None and self.strength.unit != "raw":
            raise _mistake(f"{text} {self.strength}", "scale takes a plain factor")
        if self.if_on and self.kind != "clamp":
            raise _mistake(text, "`if on` goes with clamp")

    @classmethod
    def parse(cls, text: str) -> Edit:
        """The edit written in `text`; a `SteerError` that says what is wrong with it."""
        words = text.split()
        kind: Kind = "add"
        if words and words[0].lower() in KINDS:
            kind = words.pop(0).lower()  # type: ignore[assignment]  # just found in KINDS
        if not words or not re.fullmatch("[0-9]{1,18}", words[0]):
            raise _mistake(text, f"`{words[0]}` is no latent" if words else "the latent is missing")
        latent = int(words.pop(0))
        strength = None
        if words and words[0] not in ("if", "on"):
            strength = Strength.parse(words.pop(0))
        if_on = words[:2] == ["if", "on"]
        words = words[2:] if if_on else words
        place: Place = "all"
        if len(words) >= 2 and words[0] == "on":
            if words[1] not in PLACES:
                raise _mistake(text, f"`{words[1]}` is no place")
            place = words[1]
            words = words[2:]
        if words:
            raise _mistake(text, f"`{' '.join(words)}` was not understood")
        return cls(latent, kind, strength, if_on, place)

    def __str__(self) -> str:
        """The written form; a bare `LATENT VALUE` adds, and its value carries its sign."""
        words = [str(self.latent)] if self.kind == "add" else [self.kind, str(self.latent)]
        if self.strength is not None:
            sign = "+" if self.kind == "add" and not str(self.strength).startswith("-") else ""
            words.append(f"{sign}{self.strength}")
        words += ["if", "on"] if self.if_on else []
        words += ["on", self.place] if self.place != "all" else []
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class SteeringSet:
    """An ordered set of edits; changing it makes a new one, so a reply can hold on to the set it ran with."""

    edits: tuple[Edit, ...] = ()
    error: Literal["keep", "drop"] = "keep"
    """Keep: x + delta. Drop: x is replaced by what the edited latents decode to."""
    special_tokens: bool = False
    """Whether the first token and the chat format's special tokens are edited too."""
    bypass: bool = False

    @property
    def live(self) -> tuple[Edit, ...]:
        """The edits that act: none while bypassed, the muted ones never."""
        return () if self.bypass else tuple(edit for edit in self.edits if not edit.muted)

    def add(self, edit: Edit) -> SteeringSet:
        return replace(self, edits=(*self.edits, edit))

    def put(self, place: int, edit: Edit) -> SteeringSet:
        return replace(self, edits=(*self.edits[:place], edit, *self.edits[place + 1 :]))

    def remove(self, place: int) -> SteeringSet:
        return replace(self, edits=self.edits[:place] + self.edits[place + 1 :])

    def move(self, place: int, to: int) -> SteeringSet:
        edits = list(self.edits)
        edits.insert(to, edits.pop(place))
        return replace(self, edits=tuple(edits))

    def find(self, latent: int) -> int | None:
        """Where the first edit of a latent stands, or None."""
        return next((place for place, edit in enumerate(self.edits) if edit.latent == latent), None)
