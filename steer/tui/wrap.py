"""Wrapping a growing list of tokens into lines, so that every cell knows its token.

Lines break at spaces, also between tokens and around wide characters; a word longer than a line is cut. Appending
touches the last line and nothing before it: a word that outgrows the line moves to the next one, a cut word goes on.
One space may hang over the right edge, and a newline is a piece without cells, drawn after it only when it is marked:
a line needs `width + 2` cells.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from rich.cells import cell_len
from textual.strip import Strip

from steer.events import TokenEvent
from steer.tui.palette import drawable

Role = Literal["user", "assistant", "notice", "prompt"]
BODY, TAIL = -1, -2
"""Token numbers of plain text before and after a section's tokens."""

TAB = 4
"""Cells of a tab."""
_WIDE = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"
_ATOM = re.compile(rf"[\n\t ]|(?P<wide>[{_WIDE}])|[^\n\t {_WIDE}]+")


@dataclass(slots=True)
class Piece:
    """A stretch of one token on one line."""

    token: int
    text: str
    """As the model wrote it."""
    x: int
    width: int


@dataclass(slots=True)
class Line:
    pieces: list[Piece] = field(default_factory=list)
    width: int = 0
    version: int = 0
    """Grows with every change, for whoever caches what a line looks like."""

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def token_at(self, x: int) -> int | None:
        """The token that covers cell `x`; a newline that ends the line covers what is right of it."""
        for piece in self.pieces:
            if piece.x <= x < piece.x + piece.width:
                return piece.token
        last = self.pieces[-1] if self.pieces else None
        return last.token if last is not None and last.text == "\n" else None


class Wrapped:
    """Lines of at most `width` cells, plus a hanging space."""

    def __init__(self, width: int) -> None:
        self.width = max(width, 1)
        self.lines = [Line()]
        self.first: dict[int, int] = {}
        """The line a token is at home on: that of its first visible character, or else of its first white space."""
        self._solid: int | None = None
        """The last token that has a visible character."""
        self._word: int | None = None
        """The piece of the last line with which its open word begins; None after a space."""

    def append(self, token: int, text: str) -> int:
        """Adds a token's text at the end; the number of the first line that changed."""
        changed = len(self.lines) - 1
        for match in _ATOM.finditer(text):
            atom = match[0]
            if atom == "\n":
                self._put(token, atom, 0)
                self._break()
            elif atom in " \t":
                cells = TAB if atom == "\t" else 1
                if self.lines[-1].width + cells > self.width + 1 and self.lines[-1].width > 0:
                    self._break()
                self._put(token, atom, cells)
                self._word = None
            else:
                if match["wide"]:
                    self._word = None
                self._add_word(token, atom)
                if match["wide"]:
                    self._word = None
        return changed

    def _put(self, token: int, text: str, cells: int) -> None:
        line = self.lines[-1]
        line.pieces.append(Piece(token, text, line.width, cells))
        line.width += cells
        line.version += 1
        if text.isspace() or token == self._solid:
            self.first.setdefault(token, len(self.lines) - 1)
        else:
            self.first[token] = len(self.lines) - 1
            self._solid = token

    def _break(self) -> None:
        self.lines.append(Line())
        self._word = None

    def _add_word(self, token: int, text: str) -> None:
        """Places a stretch of a word, moving the word's beginning to a new line when it no longer fits here."""
        line, cells = self.lines[-1], cell_len(drawable(text))
        if self._word is None:
            self._word = len(line.pieces)
        if line.width + cells <= self.width:
            self._put(token, text, cells)
            return
        if self._word == len(line.pieces):
            if line.width > 0:
                self._break()
        elif line.pieces[self._word].x > 0:
            self._move_word(line, self._word)
        self._word = 0
        self._cut(token, text)

    def _move_word(self, line: Line, start: int) -> None:
        moved, line.pieces = line.pieces[start:], line.pieces[:start]
        line.width = moved[0].x
        line.version += 1
        stay = {piece.token for piece in line.pieces if not piece.text.isspace()}
        self._break()
        for piece in moved:
            if piece.token not in stay and self.first[piece.token] == len(self.lines) - 2:
                self.first[piece.token] = len(self.lines) - 1
            self._solid = piece.token
            self._put(piece.token, piece.text, piece.width)

    def _cut(self, token: int, text: str) -> None:
        """Places a stretch character by character, marks with what they stand on, breaking where the line is full."""
        start = 0
        cells = 0
        for end, character in enumerate(text):
            more = cell_len(drawable(character))
            if more and self.lines[-1].width + cells + more > self.width and self.lines[-1].width + cells > 0:
                if end > start:
                    self._put(token, text[start:end], cells)
                self._break()
                self._word = 0
                start, cells = end, 0
            cells += more
        self._put(token, text[start:], cells)


@dataclass(slots=True, eq=False)
class Section:
    """A stretch of the transcript: a header and a body of plain text and tokens."""

    key: str
    title: str
    role: Role
    width: int
    body: str = ""
    tail: str = ""
    events: list[TokenEvent] = field(default_factory=list)
    wrapped: Wrapped = field(init=False)
    strips: dict[int, tuple[object, tuple[Strip, ...]]] = field(default_factory=dict)
    """What the view drew of each line, and the state it was drawn for."""
    peak: float = 0.0
    """Largest painted activation, kept up to date by the view."""

    def __post_init__(self) -> None:
        self.wrap(self.width)

    def wrap(self, width: int) -> None:
        """Wraps everything again."""
        self.width = width
        self.wrapped = Wrapped(width)
        self.strips.clear()
        self.wrapped.append(BODY, self.body)
        for place, event in enumerate(self.events):
            self.add(place, event)
        self.wrapped.append(TAIL, self.tail)

    def add(self, place: int, event: TokenEvent) -> int:
        return self.wrapped.append(place, "" if event.special else event.text)

    def shows(self, place: int) -> bool:
        """Whether a token has a place on the screen; special tokens and incomplete characters have none."""
        return place in self.wrapped.first

    @property
    def places(self) -> list[int]:
        """The tokens that show, in order."""
        return [place for place in range(len(self.events)) if place in self.wrapped.first]

    @property
    def last(self) -> int | None:
        """The last token that shows."""
        return next((place for place in range(len(self.events) - 1, -1, -1) if self.shows(place)), None)

    @property
    def height(self) -> int:
        """Lines of the body; an empty one at its end does not count."""
        lines = self.wrapped.lines
        return len(lines) - (not lines[-1].pieces)
