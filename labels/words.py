"""Windows of tokens as words: what a person would say a latent fires on.

Tokens are byte pieces; their text is put together, cut into words, and every token is told its word (case-folded), what
precedes and what follows. A token without a letter or digit is a mark: punctuation, a line break, a space.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from labels.packing import RawExample

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*|\d+")
MARKS: Final = {
    ".": "full stop", ",": "comma", "!": "exclamation mark", "?": "question mark", ":": "colon", ";": "semicolon",
    '"': "quotation mark", "\u201c": "opening quotation mark", "\u201d": "closing quotation mark", "'": "apostrophe",
    "\u2019": "apostrophe", "-": "hyphen", "\u2013": "dash", "\u2014": "dash", "(": "opening bracket",
    ")": "closing bracket", "*": "star", "#": "hash", "/": "slash", "...": "dots", "\u2026": "dots",
}  # fmt: skip
_FUNCTION: Final = """
    a about after all also am an and any are as at be been before being but by can could did didn't do does
    don't done down each for from had has have having he he's her here hers him his how i i'm if in into is it
    it's its just let's may me might mine must my no nor not of off on only onto or our out over shall she she's
    should so some than that that's the their them then there these they this those to too under up us very was
    we were what when where which who whom whose why will with would you your yours
"""
FUNCTION_WORDS: Final = frozenset(_FUNCTION.split())
"""English words that say little alone; a latent on one of them is described by its neighbours too."""


@dataclass(frozen=True, slots=True)
class Place:
    """One token in its window."""

    word: str
    """The case-folded word it belongs to, or "" for a mark."""
    mark: str
    """The name of the mark, or "" for a word."""
    piece: tuple[str, str] | None
    """`start`, `end` or `inside` and the token's own text, such as `end` and `ing`, where it is part of a word."""
    before: str
    """The word or mark in front of this one, "" at the window's start."""
    after: str
    """The word or mark behind it, "" at the window's end."""
    capital: bool
    """Whether the word begins with a capital that no start of a sentence explains."""
    opens: str
    """`line` or `sentence` when the word is the first of one, else ""."""


def read_places(example: RawExample, texts: Mapping[int, bytes]) -> list[Place]:
    """Every token of a window as a `Place`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(texts.get(token, b"")) for token in example.tokens]
    text = "".join(pieces)
    units = _units(text)
    places, start, unit = [], 0, 0
    for piece in pieces:
        stop = start + len(piece)
        # The unit that holds the token's last visible character; a blank token belongs to the mark it makes up.
        anchor = start + max(len(piece.rstrip()), 1) - 1
        while unit + 1 < len(units) and units[unit + 1][0] <= anchor:
            unit += 1
        places.append(_place(text, units, unit, start, stop))
        start = stop
    return places


def words_of(example: RawExample, texts: Mapping[int, bytes]) -> list[str]:
    """The words of a window, case-folded."""
    text = b"".join(texts.get(token, b"") for token in example.tokens).decode("utf-8", "replace")
    return [_fold(word) for word in _WORD.findall(text)]


def name_mark(text: str) -> str:
    """What a mark is called: `full stop`, `line break`, or the mark itself in quotes."""
    if not text.strip():
        return "line break" if "\n" in text else "space"
    text = "".join(character if character.isprintable() else "\ufffd" for character in text.strip()[:8])
    return MARKS.get(text) or (f"{MARKS[text[0]]} and {MARKS[text[1]]}" if _pair(text) else f"'{text}'")


def _pair(text: str) -> bool:
    return len(text) == 2 and text[0] in MARKS and text[1] in MARKS


def _units(text: str) -> list[tuple[int, int, bool]]:
    """(start, stop, is a word) of every word, run of marks and line break of a text, spaces left out."""
    units: list[tuple[int, int, bool]] = []

    def marks(start: int, stop: int) -> None:
        units.extend((start + m.start(), start + m.end(), False) for m in re.finditer(r"\n+|[^\s]+", text[start:stop]))

    end = 0
    for found in _WORD.finditer(text):
        marks(end, found.start())
        units.append((found.start(), found.end(), True))
        end = found.end()
    marks(end, len(text))
    return units


def _place(text: str, units: Sequence[tuple[int, int, bool]], unit: int, start: int, stop: int) -> Place:
    if not units or not text[start:stop].strip(" \t\r\ufffd"):
        return Place("", name_mark(text[start:stop] or " "), None, "", "", False, "")
    begin, end, is_word = units[unit]
    before, after = _named(text, units, unit - 1), _named(text, units, unit + 1)
    if not is_word:
        return Place("", name_mark(text[begin:end]), None, before, after, False, "")
    word, own = text[begin:end], text[max(start, begin) : min(stop, end)]
    piece = None
    if len(own) < len(word):
        at_start, at_end = start <= begin, stop >= end
        piece = ("start" if at_start else "end" if at_end else "inside", own.casefold())
    gap = text[units[unit - 1][0] : begin] if unit else ""
    opens = "line" if "\n" in gap else "sentence" if re.search(r"[.!?]", gap) else ""
    quoted = bool(re.search(r"[\"\u201c]\s*$", gap))
    capital = word[:1].isupper() and bool(before) and not opens and not quoted
    return Place(_fold(word), "", piece, before, after, capital, opens)


def _named(text: str, units: Sequence[tuple[int, int, bool]], unit: int) -> str:
    if not 0 <= unit < len(units):
        return ""
    start, stop, is_word = units[unit]
    return _fold(text[start:stop]) if is_word else name_mark(text[start:stop])


def _fold(word: str) -> str:
    return word.casefold().replace("\u2019", "'")
