"""Drawing with ASCII alone, for terminals and fonts without block and box characters: one filter over every line.

Bars become digits (a band's number, as the ruler of a console without colour has it), borders `+-|`. Letters of other
scripts are text and stay.
"""

from __future__ import annotations

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

_PLAIN = str.maketrans(
    "▁▂▃▄▅▆▇█" + "─━│┃╭╮╰╯┌┐└┘├┤┬┴┼" + "┊▎▌▐▊▕▏▔▀" + "↵→←↑↓·…•▶▼◀▲✓",
    "12345677" + "--||+++++++++++++" + ":|||||---" + "$><^v.~*>v<^x",
)


class Ascii(LineFilter):
    """Replaces what we draw with by ASCII characters of the same width."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [Segment(text.translate(_PLAIN), style, control) for text, style, control in segments]
