"""How a strength is drawn and stepped: `  -2 ...|..\u250a..|====O..|.. +2`.

It is shown and stepped in multiples of the latent's max, or in percent of the residual norm where no max is known. The
engine's `readout` of one raw unit gives both rates: a typed `13.6` becomes `1.1x` when it is first stepped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from steer.edits import VALUELESS, Edit, Kind, Strength, Unit
from steer.errors import EXPLAINED
from steer.session import Readout

FILLS: dict[Kind, str] = {"add": "=", "vector": "=", "bias": "~", "floor": ">", "cap": "<"}
"""What a slider is filled with from 0 to its strength; a kind without one, such as clamp, is a point."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How a unit is shown and stepped."""

    reach: float
    """The slider goes from minus this to plus this."""
    step: float
    digits: int
    start: float
    """The strength of an edit that had none."""
    ends: str


SCALES: dict[Unit, Scale] = {
    "max": Scale(2, 0.05, 2, 1, "2"),
    "norm": Scale(100, 1, 1, 20, "100%"),
    "raw": Scale(20, 0.5, 2, 5, "20"),
}


@dataclass(frozen=True, slots=True)
class Strengths:
    """The strengths of edits in the unit in which they are shown."""

    readouts: Callable[[Edit], Readout | None]
    """The engine's."""

    def readout(self, edit: Edit) -> Readout | None:
        """An edit's strength in every unit; None where it has none, or cannot run here."""
        try:
            return self.readouts(edit)
        except EXPLAINED:  # no such latent, or a unit without its reference: the row shows what was typed
            return None

    def rates(self, edit: Edit) -> Readout:
        """What one raw unit of an edit is in the other units."""
        kind: Kind = "vector" if edit.kind == "vector" else "add"
        unit = Edit(edit.latent, kind, Strength(1.0), hook=edit.hook, file=edit.file)
        return self.readout(unit) or Readout(1.0, None, None)

    def unit(self, edit: Edit) -> Unit:
        """The unit in which an edit's strength is shown and stepped."""
        rates = self.rates(edit)
        return "max" if rates.of_max else "norm" if rates.of_norm else "raw"

    def value(self, edit: Edit) -> float | None:
        """An edit's strength in the unit that is shown; None where it has none, the factor for `scale`."""
        if edit.strength is None or edit.kind == "scale":
            return None if edit.strength is None else edit.strength.number
        unit, rates = self.unit(edit), self.rates(edit)
        if edit.strength.unit == unit:
            return edit.strength.number
        per_raw: dict[Unit, float | None] = {"raw": 1.0, "max": rates.of_max, "norm": rates.of_norm}
        have, want = per_raw[edit.strength.unit], per_raw[unit]
        return edit.strength.number / have * want if have and want else edit.strength.number

    def typed(self, edit: Edit, value: float) -> Edit:
        """The edit with a strength in the shown unit, rounded as it is shown."""
        unit: Unit = "raw" if edit.kind == "scale" else self.unit(edit)
        digits = 2 if edit.kind == "scale" else SCALES[unit].digits
        return replace(edit, strength=Strength(round(value, digits) + 0.0, unit))

    def become(self, edit: Edit, kind: Kind) -> Edit:
        """The edit as another kind, with its number kept where it means the same, else a sensible one."""
        if kind in VALUELESS:
            return replace(edit, kind=kind, strength=None, if_on=False)
        if kind == "scale":
            return replace(edit, kind=kind, strength=Strength(2.0), if_on=False)
        if edit.strength is None or edit.kind == "scale":
            unit = self.unit(edit)
            return replace(edit, kind=kind, strength=Strength(SCALES[unit].start, unit), if_on=False)
        return replace(edit, kind=kind, if_on=edit.if_on and kind == "clamp")


def slider(value: float, scale: Scale, width: int, *, fill: str, half: float | None, acts: float | None = None) -> str:
    """A strength on its scale, in `width` cells, filled as far as it `acts`, by default all of it; `half` is half the
    residual norm as a strength. An arrow past the end says that the strength is off the scale."""
    left, right = f"-{scale.ends} ".rjust(5), f" +{scale.ends}"
    cells = (max(width - len(left) - len(right) - 1, 3) - 1) | 1  # odd, so that 0 is in the middle

    def cell(at: float) -> int:
        return min(max(round((at / scale.reach + 1) / 2 * (cells - 1)), 0), cells - 1)

    drawn = ["."] * cells
    if half is not None and half < scale.reach:
        drawn[cell(half)] = drawn[cell(-half)] = "\u250a"
    for mark in (-scale.reach / 2, 0, scale.reach / 2):
        drawn[cell(mark)] = "|" if drawn[cell(mark)] == "." else drawn[cell(mark)]
    end, zero = cell(value if acts is None else acts), cell(0)
    if fill:
        for place in range(min(end, zero), max(end, zero) + 1):
            if place != zero:
                drawn[place] = fill
    drawn[cell(value)] = "O"
    if value < -scale.reach:
        left = left[:-1] + "\u2190"
    if value > scale.reach:
        right = "\u2192" + right[1:]
    return left + "".join(drawn) + right
