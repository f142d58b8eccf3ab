"""What crosses the line between the engine's thread and the interface: numbers and strings, never a tensor.

One reply is one stream: `PromptRead`, then a `TokenEvent` for each token, then `Finished` or `Failed`. A token's event
carries the latents that were active when the model read that token, so it leaves the engine one forward pass after the
token was sampled. `Reply.events` keeps them all; every view is a function of that list.

Text from models, labels and files is hostile until `clean` has seen it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
"""C0 but tab and newline, DEL, C1, and marks that reorder or hide text: what a terminal obeys instead of showing."""


def clean(text: str) -> str:
    """`text` with every control character replaced by the replacement character; tab and newline stay."""
    return CONTROL.sub("\ufffd", text)


def clean_line(text: str) -> str:
    """`clean` on one line, for labels in tables: a newline in one would pass for a row of its own."""
    return " ".join(clean(text).split())


def counted(number: int, noun: str) -> str:
    """`1 line`, `2 lines`: a number with what it counts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class LatentHit:
    """A latent that was active on a token."""

    latent: int
    activation: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have come instead, and how likely the model found it."""

    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token, read by the model."""

    row: int
    index: int
    """Place in the row's whole sequence; 0 is the first token (BOS)."""
    token: int
    text: str
    """Its text; empty while a character is incomplete, whose text then comes with the token that completes it."""
    special: bool = False
    logprob: float | None = None
    """Natural log of its probability before temperature and filters; None in the prompt."""
    entropy: float | None = None
    """Of the distribution it was drawn from, in nats, before temperature and filters; None in the prompt."""
    alternatives: tuple[Alternative, ...] = ()
    """The likeliest tokens at its place, itself left out."""
    hits: tuple[LatentHit, ...] = ()
    """Every active latent, strongest first; empty where the SAE is not read (first token, special tokens)."""
    kl: float | None = None
    """KL divergence in nats of the distribution it was drawn from, from the unsteered model's on the same text; None
    where that was not asked for."""
    surprisal: float | None = None
    """Minus the natural logarithm of its probability under the unsteered model."""
    expected: float | None = None
    """The surprisal that the unsteered model expects there: the entropy of its distribution."""


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The tokens of a row's prompt with their hits, and how many of the oldest messages did not fit."""

    row: int
    tokens: tuple[TokenEvent, ...]
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class EditReport:
    """What one edit did: its mean latent activation before and after, over the positions where it acted."""

    text: str
    positions: int
    before: float | None
    after: float | None
    lost: int = 0
    """Positions where a `bias` did not bring its latent into the active set."""


@dataclass(frozen=True, slots=True)
class Carried:
    """The set under which tokens were read from a position on."""

    first: int
    edits: tuple[str, ...]
    """Its live edits as written; none while the set is empty or bypassed."""


@dataclass(frozen=True, slots=True)
class Report:
    """The engine's word on a reply. The interface says "steered" from this alone."""

    steps: int = 0
    """Forward passes of the reply; the one that reads the prompt is the first."""
    applied: int = 0
    """Those in which the set's hook ran with at least one live edit."""
    edits: tuple[EditReport, ...] = ()
    first: int | None = None
    """First and last position at which an edit acted, or the error was dropped."""
    last: int | None = None
    carried: tuple[Carried, ...] = ()
    """Which positions carried which set: each from its first on, up to the next one's."""
    dropped: int = 0
    """Positions where the SAE's reconstruction error was dropped."""

    @property
    def steered(self) -> bool:
        """Whether anything was put in the place of what the model had computed."""
        return self.dropped > 0 or any(edit.positions for edit in self.edits)


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a row."""

    row: int
    finish: Literal["stop", "length", "cancelled"]
    seed: int
    report: Report
    tokens_per_second: float = 0.0
    text: str = ""
    """What a stop string or an incomplete character still held back, already part of no token event."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a stream that broke; the sentence is already fit to show."""

    message: str
    hint: str | None = None


Event = PromptRead | TokenEvent | Finished | Failed
