"""Edits and steering sets as a person writes them: values without tensors, frozen, equal when they say the same.

    [KIND] LATENT [VALUE] [if on] [when OTHER > X] [on PLACE] [for N tokens] [ramp N] [decay N] [at HOOK]
    vector FILE VALUE [...]

`21863 +1.1x` adds, `clamp 4410 0`, `ablate 77`, `vector kind.safetensors 30%`, `clamp 4410 0 when 902 > 2 on generated
decay 20`. What is printed parses back to the same edit. A strength keeps number and unit as typed; the engine resolves
it when the set meets its SAE. The deltas these stand for are in `sae/intervene.py`, where and when they act in
`sae/gate.py`.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
from dataclasses import dataclass, replace
from typing import Literal, get_args

from steer.errors import SteerError
from steer.events import clean

Kind = Literal["add", "clamp", "scale", "ablate", "floor", "cap", "bias", "project", "vector"]
Unit = Literal["raw", "max", "norm"]

KINDS: tuple[Kind, ...] = get_args(Kind)
VALUELESS: tuple[Kind, ...] = ("ablate", "project")
"""The kinds that take no value."""
PLACES: dict[str, str] = {
    "all": "every token but the first and the special ones",
    "all+special": "every token, the first and the special ones too",
    "prompt": "the tokens before the reply except the last",
    "generated": "from the last prompt token, whose output picks the first new one, through the reply",
    "assistant": "the reply and what the assistant said in earlier turns",
    "last": "the last prompt token alone",
}
"""What each place means; a range is written `4..9`, both ends included, counted from 0."""
FORMULAS: dict[Kind, str] = {
    "add": "v * d, whatever the latent does",
    "clamp": "(v - a) * d, so the latent contributes exactly v",
    "scale": "(s - 1) * a * d, so the latent contributes s times as much",
    "ablate": "-a * d, so the latent contributes nothing",
    "floor": "(max(a, v) - a) * d, so the latent contributes at least v",
    "cap": "(min(a, v) - a) * d, so the latent contributes at most v",
    "bias": "act(pre + v e_i) - act(pre), decoded: v is added before the activation: threshold, or race for k places",
    "project": "-(x . d/|d|) * d/|d|, so nothing is left along d, even where the latent is off",
    "vector": "v * d, where d is the direction in the file",
}
"""What each kind adds to the residual stream x; d is the latent's decoder direction, a its activation."""

LOUD = 60
"""Percent of the median residual norm above which, all edits together, text tends to fall apart."""

GRAMMAR = "[KIND] LATENT [VALUE] [if on] [when OTHER > X] [on PLACE] [for N tokens] [ramp N] [decay N] [at HOOK]"
_SUFFIX: dict[Unit, str] = {"raw": "", "max": "x", "norm": "%"}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(x|%)?", re.ASCII)
_LATENT = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")


def _mistake(text: str, why: str, hint: str | None = None) -> SteerError:
    hint = hint or f"write {GRAMMAR}, for example `2229 +0.4x` or `clamp 2005 0`"
    return SteerError(f"`{clean(text)}` is no edit: {clean(why)}", clean(hint))


def _no_latent(text: str, word: str) -> SteerError:
    """The error for a word where a latent should stand: a misspelled kind, a number with more to it, what a feature is
    called."""
    if near := difflib.get_close_matches(word.lower(), KINDS, 1, 0.7):
        hint = f"did you mean `{near[0]}`?"
    elif word[:1].isdigit():
        hint = "a latent is a whole number, and a space stands before its strength: `2229 +0.4x`"
    elif word[:1] in "+-":
        hint = "a latent is a number from 0, its strength comes after it: `2229 +0.4x`"
    else:
        hint = f"a latent is a number: `steer features search {shlex.quote(word)}` finds those of a word"
    return _mistake(text, f"`{word}` is no latent", hint)


def _no_place(text: str, place: str) -> SteerError:
    """The error for what is no place."""
    match = _RANGE.fullmatch(place)
    why = f"`{place}` is no place" + (": its first position is after its last" if match else "")
    hint = f"write `on {match[2]}..{match[1]}`" if match else f"places are {', '.join(PLACES)} and ranges as 4..9"
    return _mistake(text, why, hint)


@dataclass(frozen=True, slots=True)
class Strength:
    """A number with its unit: `13.6` raw, `1.1x` times the latent's recorded max, `30%` of the median residual norm."""

    number: float
    unit: Unit = "raw"

    def __post_init__(self) -> None:
        if not math.isfinite(self.number):
            raise SteerError(f"a strength of {self.number} is no number to steer with", "give a finite one")

    @classmethod
    def parse(cls, text: str) -> Strength:
        """The strength written as `13.6`, `1.1x` or `30%`; a `SteerError` when it is none of these or not finite."""
        match = _NUMBER.fullmatch(text.strip())
        if match is None or not math.isfinite(float(match[1])):  # which is named as it was written
            raise SteerError(
                f"`{clean(text)}` is no strength", "write `13.6` (raw), `1.1x` (of max) or `30%` (of the residual norm)"
            )
        units: dict[str | None, Unit] = {None: "raw", "x": "max", "%": "norm"}
        return cls(float(match[1]), units[match[2]])

    def __str__(self) -> str:
        number = repr(self.number).removesuffix(".0")
        return number + _SUFFIX[self.unit]


@dataclass(frozen=True, slots=True)
class Condition:
    """Met once a latent has been above a strength, at a token that is read, since the edit was first in force."""

    latent: int
    above: Strength

    def __str__(self) -> str:
        return f"when {self.latent} > {self.above}"


@dataclass(frozen=True, slots=True)
class Edit:
    """One instruction: what is done to which latent, how strongly, where and when."""

    latent: int | None
    """None for `vector` only."""
    kind: Kind = "add"
    strength: Strength | None = None
    """None for `ablate` and `project` only; a plain factor for `scale`."""
    if_on: bool = False
    """`clamp` only where the latent is active."""
    place: str = "all"
    """One of `PLACES`, or a range."""
    muted: bool = False
    when: Condition | None = None
    lasts: int | None = None
    """Tokens after which it ends, counted as `ramp` and `decay` count: from the first at which it could act."""
    ramp: int | None = None
    """Tokens over which it grows to its full strength."""
    decay: int | None = None
    """Tokens in which it falls to half."""
    hook: str = ""
    """Where it acts; empty for the first SAE's hook."""
    file: str = ""
    """Of a `vector`: the file with its direction."""

    def __post_init__(self) -> None:
        text, unit = self._head(), self.strength.unit if self.strength else "raw"
        number, file = "a latent is a number from 0", "the file is missing" if not self.file else "no file goes here"
        value = {"scale": "2", "vector": "30%"}.get(self.kind, "0.4x")
        for wrong, why, hint in (
            ((self.latent is None) != (self.kind == "vector") or (self.latent or 0) < 0, number, None),
            (bool(self.file) != (self.kind == "vector"), file, "write `vector FILE VALUE`"),
            (self.strength is not None and self.kind in VALUELESS, f"{self.kind} takes no value", "leave it out"),
            (
                self.strength is None and self.kind not in VALUELESS,
                f"{self.kind} needs a value",
                f"as `{text} {value}`",
            ),
            (self.kind == "scale" and unit != "raw", "scale takes a plain factor", f"as `scale {self.latent} 2`"),
            (self.kind == "vector" and unit == "max", "a vector has no recorded max", "write `13.6` (raw) or `30%`"),
            (self.if_on and self.kind != "clamp", "`if on` goes with clamp", f"as `clamp {self.latent} 0 if on`"),
            (
                self.when is not None and self.when.above.unit == "norm",
                "a condition is raw or a share of max",
                "as `when 902 > 2` or `when 902 > 0.5x`",
            ),
        ):
            if wrong:
                raise _mistake(str(self), why, hint)
        if self.place not in PLACES and span_of(self.place) is None:
            raise _no_place(str(self), self.place)
        for name, count in (("for", self.lasts), ("ramp", self.ramp), ("decay", self.decay)):
            if count is not None and not 1 <= count <= 10**9:
                raise _mistake(f"{text} {name} {count}", f"{name} takes a whole number of tokens from 1")

    @classmethod
    def parse(cls, text: str) -> Edit:
        """The edit written in `text`; a `SteerError` that says what is wrong with it."""
        words = _words(text)
        kind: Kind = "add"
        if words and words[0].lower() in KINDS:
            kind = words.pop(0).lower()  # type: ignore[assignment]  # just found in KINDS
        if kind == "project" and words[:1] == ["out"]:
            words.pop(0)
        latent, file = None, ""
        if kind == "vector":
            file = words.pop(0) if words else ""
        elif words and _LATENT.fullmatch(words[0]):
            latent = int(words.pop(0))
        else:
            raise _no_latent(text, words[0]) if words else _mistake(text, "the latent is missing")
        strength = Strength.parse(words.pop(0)) if words and words[0] not in _CLAUSES else None
        clauses: dict[str, object] = {}
        while words:
            name, value, words = _clause(text, words)
            if name in clauses:
                raise _mistake(text, f"it says `{_SAID[name]}` twice")
            clauses[name] = value
        return cls(latent, kind, strength, file=file, **clauses)  # type: ignore[arg-type]  # by `_clause`

    def _head(self) -> str:
        subject = shlex.quote(self.file) if self.kind == "vector" else str(self.latent)
        words = [subject] if self.kind == "add" else [self.kind, subject]
        if self.strength is not None:
            sign = "+" if self.kind == "add" and not str(self.strength).startswith("-") else ""
            words.append(f"{sign}{self.strength}")
        return " ".join(words)

    def __str__(self) -> str:
        """The written form; a bare `LATENT VALUE` adds, and its value carries its sign."""
        return " ".join((self._head(), *self.clauses))

    def retyped(self, text: str) -> Edit:
        """What a person typed in its place: another strength, or a whole edit."""
        if self.strength is None or len(text.split()) > 1:
            return Edit.parse(text)
        return replace(self, strength=Strength.parse(text))

    @property
    def clauses(self) -> tuple[str, ...]:
        """Where and when it acts, as written; nothing for what is the default."""
        return (
            *(["if on"] if self.if_on else []),
            *([str(self.when)] if self.when else []),
            *([f"on {self.place}"] if self.place != "all" else []),
            *([f"for {self.lasts} token{'s' if self.lasts > 1 else ''}"] if self.lasts else []),
            *([f"ramp {self.ramp}"] if self.ramp else []),
            *([f"decay {self.decay}"] if self.decay else []),
            *([f"at {self.hook}"] if self.hook else []),
        )


_SAID = {
    "if_on": "if on",
    "when": "when",
    "place": "on",
    "lasts": "for",
    "ramp": "ramp",
    "decay": "decay",
    "hook": "at",
}
_WHEN = "for example `when 902 > 2`"
_CLAUSES = frozenset(said.split()[0] for said in _SAID.values())


def _words(text: str) -> list[str]:
    """The words of an edit; `902>2` is three, and the file of a vector may be quoted as in a shell."""
    words = text.split()
    head = 1
    if words[:1] and words[0].lower() == "vector":
        try:
            words, head = shlex.split(text), 2
        except ValueError as error:
            raise _mistake(text, "a quotation is not closed") from error
    return words[:head] + [part for word in words[head:] for part in re.split("(>)", word) if part]


def _clause(text: str, words: list[str]) -> tuple[str, object, list[str]]:
    """The next clause as (field, value), and the words after it."""
    match words:
        case ["if", "on", *rest]:
            return "if_on", True, rest
        case ["when", *_] if sign := re.match("when [^<>=!]*(> ?=|<=?|[=!]=?)", " ".join(words)):
            raise _mistake(text, f"a condition knows `>` alone, and no `{sign[1]}`".replace("> =", ">="), _WHEN)
        case ["when", other, ">", above, *rest]:
            if not _LATENT.fullmatch(other):
                raise _no_latent(text, other)
            return "when", Condition(int(other), Strength.parse(above)), rest
        case ["when", *_]:
            raise _mistake(text, "a condition reads `when OTHER > X`", _WHEN)
        case ["on", place, *rest]:
            return "place", place, rest
        case ["at", hook, *rest]:
            return "hook", hook, rest
        case ["for" | "ramp" | "decay" as name, count, *rest]:
            if not re.fullmatch("[0-9]{1,18}", count):
                raise _mistake(text, f"{name} takes a whole number of tokens from 1")
            if name == "for" and rest[:1] in (["tokens"], ["token"]):
                rest = rest[1:]
            return {"for": "lasts"}.get(name, name), int(count), rest
    near = difflib.get_close_matches(words[0], _CLAUSES, 1, 0.6)
    raise _mistake(text, f"`{' '.join(words)}` was not understood", f"did you mean `{near[0]}`?" if near else None)


def span_of(place: str) -> tuple[int, int] | None:
    """First and last position of a range, None for what is none."""
    match = _RANGE.fullmatch(place)
    return (int(match[1]), int(match[2])) if match and int(match[1]) <= int(match[2]) else None


def check_latent(latent: int, count: int) -> None:
    """`SteerError` when an SAE of so many latents has no such one."""
    if not 0 <= latent < count:
        hint = "`steer features search WORDS` finds latents by their labels"
        raise SteerError(f"there is no latent {latent}: this SAE has {count}, from 0", hint)


@dataclass(frozen=True, slots=True)
class SteeringSet:
    """An ordered set of edits; changing it makes a new one, so a reply can hold on to the set it ran with."""

    edits: tuple[Edit, ...] = ()
    error: Literal["keep", "drop"] = "keep"
    """Keep: x + delta. Drop: x is replaced by what the edited latents decode to."""
    special_tokens: bool = False
    """Whether the first token and the chat format's special tokens are edited too."""
    bypass: bool = False
    factor: float = 1.0
    """Every delta is multiplied by this; the guard lowers it."""

    @property
    def live(self) -> tuple[Edit, ...]:
        """The edits that act: none while bypassed, the muted ones never."""
        return () if self.bypass else tuple(edit for edit in self.edits if not edit.muted)

    def places(self, hook: str | None) -> dict[int, int]:
        """The latents of the first SAE, which stands at `hook`, that its edits name: each with the first place, from 0,
        in the order of their places. An edit that says `at` this same hook is one of that SAE."""
        found: dict[int, int] = {}
        for place, edit in enumerate(self.edits):
            if edit.latent is not None and edit.hook in ("", hook):
                found.setdefault(edit.latent, place)
        return found

    def add(self, edit: Edit) -> SteeringSet:
        """With one more edit at its end."""
        return replace(self, edits=(*self.edits, edit))

    def put(self, place: int, edit: Edit) -> SteeringSet:
        """With another edit in the place of the one that stands there, from 0."""
        return replace(self, edits=(*self.edits[:place], edit, *self.edits[place + 1 :]))

    def remove(self, place: int) -> SteeringSet:
        """Without the edit that stands in a place, from 0."""
        return replace(self, edits=self.edits[:place] + self.edits[place + 1 :])

    def move(self, place: int, to: int) -> SteeringSet:
        """With the edit of one place moved to stand in another, both from 0."""
        edits = list(self.edits)
        edits.insert(to, edits.pop(place))
        return replace(self, edits=tuple(edits))

    def find(self, latent: int) -> int | None:
        """Where the first edit of a latent stands, or None."""
        return next((place for place, edit in enumerate(self.edits) if edit.latent == latent), None)
