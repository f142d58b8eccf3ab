"""`Guard`: how far a reply is from what the unsteered model would write, while it is written.

Over the last `WINDOW` tokens of the reply, with the unsteered model reading the same text:

    KL          mean of KL(steered | unsteered), nats a token                                        line: 2
    surprise    mean surprisal under the unsteered model less what that model expects, nats a token   line: ln 3
    repetition  share of the 4-grams that the reply has had before                                    line: 0.5

The level is the largest of the three as a share of its line: below 0.5 the reply is calm, from 0.5 strained, and from 1
over the line. An excess of ln 3 means that the text is three times as perplexing to the model as its own would be. A
figure that is not finite is over the line too: an edit far too strong leaves such logits.
With `backs_off` the strength of all edits is multiplied by `STEP` whenever the level is over the line, at the earliest
`WAIT` tokens after the reply began or after the last time. It is a pure function of the tokens, and so stays a reply.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean

from steer.events import TokenEvent

WINDOW = 24
KL_LINE, SURPRISE_LINE, REPEAT_LINE = 2.0, math.log(3), 0.5
STEP, WAIT = 0.75, 8


@dataclass(frozen=True, slots=True)
class Meter:
    """The three figures over the last tokens."""

    kl: float
    surprise: float
    repetition: float

    @property
    def shares(self) -> dict[str, float]:
        """Each figure, as a person reads it, as a share of its line; infinite where it is not finite."""
        shares = {
            f"KL {self.kl:.1f}": self.kl / KL_LINE,
            f"surprise {self.surprise:.1f}": self.surprise / SURPRISE_LINE,
            f"repeats {self.repetition:.0%}": self.repetition / REPEAT_LINE,
        }
        return {figure: share if math.isfinite(share) else math.inf for figure, share in shares.items()}

    @property
    def level(self) -> float:
        """The largest share, at least 0."""
        return max(*self.shares.values(), 0.0)

    @property
    def worst(self) -> str:
        """The figure that the level comes from: `repeats 60%`."""
        return max(self.shares, key=self.shares.__getitem__)

    @property
    def word(self) -> str:
        """What the level means."""
        return "calm" if self.level < 0.5 else "strained" if self.level < 1 else "over the line"


@dataclass(slots=True)
class Guard:
    """Watches one reply."""

    backs_off: bool = False
    factor: float = 1.0
    """What the strength of all edits is multiplied by now."""
    meter: Meter | None = None
    """None before the first token."""
    _last: deque[TokenEvent] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _grams: set[tuple[int, ...]] = field(default_factory=set)
    """Every 4-gram of the reply."""
    _again: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Of the 4-grams that end in the window, whether each stands in the reply before."""
    _since: int = 0

    def see(self, event: TokenEvent) -> None:
        """Take the next token of the reply into account; it has to have been measured (`watch`)."""
        assert event.kl is not None and event.surprisal is not None and event.expected is not None
        self._last.append(event)
        self._since += 1
        gram = tuple(each.token for each in [*self._last][-4:])
        if len(gram) == 4:
            self._again.append(gram in self._grams)
            self._grams.add(gram)
        self.meter = Meter(
            fmean(each.kl or 0.0 for each in self._last),
            fmean((each.surprisal or 0.0) - (each.expected or 0.0) for each in self._last),
            fmean(self._again) if self._again else 0.0,
        )
        if self.backs_off and self._since >= WAIT and self.meter.level >= 1:
            self.factor *= STEP
            self._since = 0

    @property
    def verdict(self) -> str:
        """How the reply stands, by the figure that is nearest its line: `KL 0.3, calm`, `repeats 30%, strained`; ""
        before the first token."""
        return "" if self.meter is None else f"{self.meter.worst}, {self.meter.word}"

    @property
    def summary(self) -> str:
        """The verdict and what it led to: `KL 2.3, over the line, edits x 0.75`."""
        return self.verdict + (f", edits x {self.factor:.2g}" if self.factor < 1 else "")
