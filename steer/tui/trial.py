"""One comparison without its screen: what is asked, the thread that asks it, and what came of it as lines and as JSON.

Row 0 of the batch is the baseline, row 1 carries the set as it was when the trial began. `write` runs in a worker
thread and only appends to the inbox; `take`, called by the screen, moves what has arrived into the two replies.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.style import Style
from rich.text import Text

from steer.compare import Change, Comparison, compare
from steer.edits import SteeringSet
from steer.errors import EXPLAINED, SteerError, sentence
from steer.events import Event, Failed, Finished, PromptRead, TokenEvent
from steer.session import Prompt, Reply, Role, Session
from steer.tui import palette
from steer.tui.palette import DIM

ROWS = ("baseline", "steered")
MOST = 40
"""Latents of a comparison; a screen shows as many as it has room for."""
UP, DOWN = Style.parse("#5aa3cf"), Style.parse("#e69f5c")
"""Of the diverging scale: more active under the set, less active. The sign says the same."""

log = logging.getLogger("steer")


def last_prompt(session: Session) -> Prompt:
    """What the model answered last, or would answer next; `SteerError` when there is nothing."""
    turns = list(session.turns)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if session.mode == "completion":
        if not turns:
            raise SteerError("there is no text to go on from", "write its beginning")
        return Prompt(text="".join(turn.content for turn in turns))
    if not turns:
        raise SteerError("there is no message to answer", "say something first")
    head: tuple[tuple[Role, str], ...] = (("system", session.system),) if session.system else ()
    return Prompt(messages=head + tuple((turn.role, turn.content) for turn in turns if turn.content))


def nothing(steering: SteeringSet, hook: str | None) -> str:
    """Why a set leaves nothing to compare, and what to do about it; empty when it acts."""
    if steering.bypass and (steering.edits or steering.error == "drop"):
        return "There is nothing to compare: bypass is on, so no edit acts. Esc, then b turns it off."
    if steering.live or steering.error == "drop":
        return ""
    if steering.edits:
        return (
            "There is nothing to compare: every edit is muted. Esc, then s goes to the set, where space lets one act."
        )
    if hook is None:
        return "There is nothing to compare: this model runs without an SAE, and the set has no /vector."
    return (
        "There is nothing to compare: no feature is steered. Esc goes back to the chat; there f finds a feature, Enter "
        "on one in Token steers it, and /steer LATENT +0.5x does it by number."
    )


class Trial:
    """One prompt answered twice in lockstep."""

    def __init__(self, session: Session, prompt: Prompt, seed: int) -> None:
        self.prompt, self.seed = prompt, seed
        self.sampling, self.max_tokens = session.sampling, session.max_tokens
        self.replies = Reply(seed, SteeringSet()), Reply(seed, session.steering)
        self.stop = threading.Event()
        self._session = session
        self._inbox: deque[Event] = deque()

    @property
    def steering(self) -> SteeringSet:
        return self.replies[1].steering

    @property
    def failed(self) -> Failed | None:
        return self.replies[1].failed

    @property
    def complete(self) -> bool:
        """Whether both replies came to their own end."""
        return all(reply.finished is not None and reply.finished.finish != "cancelled" for reply in self.replies)

    def write(self) -> None:
        """Asks the engine, at the session's pace; returns when both replies are over. Runs in a worker thread."""
        try:
            self._write()
        except EXPLAINED as error:
            self._inbox.append(Failed(sentence(error), getattr(error, "hint", None)))
        except Exception as error:  # as a session does for a reply
            log.exception("the comparison broke")
            self._inbox.append(
                Failed(f"the comparison broke: {sentence(error)}", "`steer doctor` says where the log is")
            )

    def _write(self) -> None:
        events = self._session.engine.stream(
            [self.prompt] * 2,
            [reply.steering for reply in self.replies],
            sampling=self.sampling,
            seeds=[self.seed] * 2,
            max_tokens=self.max_tokens,
            stop=self.stop,
            alternatives=0,
            watch=(1,),
        )
        due, reached = time.monotonic(), -1
        for event in events:
            self._inbox.append(event)
            if isinstance(event, TokenEvent) and event.index > reached and (pace := self._session.pace) > 0:
                reached = event.index
                due = max(due + 1 / pace, time.monotonic() - 1 / pace)
                self.stop.wait(max(0.0, due - time.monotonic()))

    def take(self) -> list[Event]:
        """What has arrived since, now part of the replies."""
        events = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for event in events:
            match event:
                case PromptRead():
                    self.replies[event.row].prompt = event
                case TokenEvent():
                    self.replies[event.row].events.append(event)
                case Finished():
                    self.replies[event.row].finished = event
                case Failed():
                    for reply in self.replies:
                        reply.failed = event
        return events

    def compared(self) -> Comparison:
        """The comparison so far: as far as both have come, while both are written."""
        ours, theirs = (reply.events for reply in self.replies)
        if not any(reply.finished for reply in self.replies):
            both = min(len(ours), len(theirs))
            ours, theirs = ours[:both], theirs[:both]
        return compare(ours, theirs, MOST)

    def differences(self) -> list[int]:
        """The places, from 0, at which a stretch begins where the two replies have other tokens."""
        ours, theirs = ([event.token for event in reply.events] for reply in self.replies)
        unlike = [ours[n : n + 1] != theirs[n : n + 1] for n in range(max(len(ours), len(theirs)))]
        return [place for place, differs in enumerate(unlike) if differs and not (place and unlike[place - 1])]

    def entry(self, labels: Mapping[int, str]) -> dict[str, Any]:
        """All of it, ready for JSON."""
        found = self.compared()
        entry = {
            "prompt": self.prompt.text if self.prompt.text is not None else [list(one) for one in self.prompt.messages],
            "seed": self.seed,
            "sampling": asdict(self.sampling),
            "max_tokens": self.max_tokens,
            "edits": [str(edit) for edit in self.steering.live],
            "error": self.steering.error,
            "rows": [_row(name, reply) for name, reply in zip(ROWS, self.replies, strict=True)],
            "comparison": asdict(found)
            | {"changed": [asdict(one) | {"label": labels.get(one.latent, "")} for one in found.changed]},
        }
        return {key: _finite(value) for key, value in entry.items()}


def _row(name: str, reply: Reply) -> dict[str, Any]:
    report = reply.finished.report if reply.finished else None
    return {
        "row": name,
        "text": reply.text,
        "finish": reply.finished.finish if reply.finished else None,
        "report": asdict(report) | {"steered": report.steered} if report else None,
        "tokens": [
            {"token": event.token, "text": event.text, "logprob": event.logprob}
            | ({"kl": event.kl, "surprisal": event.surprisal} if event.kl is not None else {})
            | {"hits": [[hit.latent, float(f"{hit.activation:.6g}")] for hit in event.hits]}
            for event in reply.events
        ],
    }


def _finite(value: Any) -> Any:
    """`value` with None for every number that JSON has no word for: an edit may break the logits."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What changed, as lines


def facts(trial: Trial, found: Comparison) -> list[str]:
    """The comparison's figures, each a few words."""
    both = min(len(reply.events) for reply in trial.replies)
    if not both:
        return []
    if found.first_difference is None:
        told = ["the replies are the same" if trial.complete else "no difference so far"]
    else:
        told = [f"first token that differs: {found.first_difference}", f"{found.same} of {both} agree"]
    told.append(f"repeats {found.repeats:.0%}, was {found.baseline_repeats:.0%}")
    if found.kl is not None:
        told.append(f"KL {found.kl:.2f} nats a token")
    if found.perplexity is not None:
        was = "" if math.isnan(found.baseline_perplexity) else f", was {found.baseline_perplexity:.1f}"
        told.append(f"perplexity to the unsteered model {found.perplexity:.1f}{was}")
    return told


def changes(
    found: Comparison, width: int, rows: int, labels: Mapping[int, str], tags: Mapping[int, str], colourless: bool
) -> Text:
    """The latents that became more active at the left, those that became less at the right, largest first."""
    up = [change for change in found.changed if change.difference > 0][:rows]
    down = [change for change in found.changed if change.difference < 0][:rows]
    top = max((abs(change.difference) for change in (*up, *down)), default=0.0)
    half, text = (width - 3) // 2, Text(no_wrap=True, overflow="crop")

    def cell(change: Change | None, style: Style) -> None:
        if change is None:
            text.append(" " * half)
            return
        size, bar = abs(change.difference), min(12, half // 5)
        tag = tags.get(change.latent, "")
        head, number = f" {change.latent:>5} ", f" {'+' if change.difference > 0 else '-'}{palette.number(size):<5} "
        text.append(tag or " ", palette.tag_style(tag, colourless) if tag else "")
        text.append(head)
        room = max(half - 1 - len(head) - len(number) - bar, 0)
        text.append(palette.fit(labels.get(change.latent) or "(no label)", room))
        text.append(number)
        text.append(palette.bar(size, top, bar), style)

    for place in range(max(len(up), len(down))):
        text.append("\n" if place else "")
        cell(up[place] if place < len(up) else None, UP)
        text.append(" | ", DIM)
        cell(down[place] if place < len(down) else None, DOWN)
    return text
