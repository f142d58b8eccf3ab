"""How a strength is drawn and stepped: `  -2 ...|..\u250a..|====O..|.. +2`."""

from __future__ import annotations

from dataclasses import dataclass

from steer.edits import Kind, Unit

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


def slider(value: float, scale: Scale, width: int, *, fill: str, half: float | None) -> str:
    """A strength on its scale, in `width` cells; `half` is the strength that is half the residual norm."""
    left, right = f"-{scale.ends} ".rjust(5), f" +{scale.ends}"
    cells = (max(width - len(left) - len(right) - 1, 3) - 1) | 1  # odd, so that 0 is in the middle

    def cell(at: float) -> int:
        return min(max(round((at / scale.reach + 1) / 2 * (cells - 1)), 0), cells - 1)

    drawn = ["."] * cells
    if half is not None and half < scale.reach:
        drawn[cell(half)] = drawn[cell(-half)] = "\u250a"
    for mark in (-scale.reach / 2, 0, scale.reach / 2):
        drawn[cell(mark)] = "|" if drawn[cell(mark)] == "." else drawn[cell(mark)]
    at, zero = cell(value), cell(0)
    if fill:
        for place in range(min(at, zero), max(at, zero)):
            if place != zero:
                drawn[place] = fill
    drawn[at] = "O"
    return left + "".join(drawn) + right + (">" if abs(value) > scale.reach else "")
