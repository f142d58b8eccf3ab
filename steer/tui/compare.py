"""The Compare screen: the last prompt answered without and with the edits, in lockstep, and what the edits changed.

Both replies are rows of one batch (`steer.tui.trial`), written in a thread worker; a 20 Hz timer, asleep while nothing
is written, drains its inbox. One trial runs at a time: what asks for another while one is written stops it, and the
next begins when its thread has left. The screen changes nothing of the chat but the strength of its edits.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.events import DescendantFocus, Resize
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Static

from steer.commands import Paint
from steer.errors import EXPLAINED, SteerError, sentence
from steer.events import Failed, Finished, PromptRead, TokenEvent, clean
from steer.files import write_whole
from steer.session import MAX_SEED
from steer.tui import palette, status
from steer.tui.dialogs import ROOM, Ask, Confirm, plain
from steer.tui.token_view import TokenView
from steer.tui.trial import Trial, changes, facts, last_prompt, nothing

if TYPE_CHECKING:
    from steer.tui.chat import ChatScreen

TELL = 1.0
"""Seconds between two looks at what changed while the replies are written: it reads all of both."""
REPLY = "reply"
"""The one section of a side."""


class Side(TokenView):
    """One of the two replies."""

    HELP = "The two replies to one prompt, token by token; the strip below tells of the token under the cursor."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "screen.difference(1)", "Next place from which the replies differ"),
        Binding("N", "screen.difference(-1)", "Previous place from which they differ"),
        Binding("enter", "screen.beside", "The same place on the other side"),
    ]

    def empty(self) -> None:
        """Makes room for another reply."""
        self.clear()
        self.start(REPLY, "", role="user")

    def colour(self, what: Paint, maxima: Callable[[int], float | None]) -> None:
        self.paint(what if isinstance(what, int) else None, maxima, strongest=what == "strongest")

    def go(self, place: int) -> None:
        """Puts the cursor on a token, where the reply has come so far."""
        if place < len(self.sections[0].events):
            self.move_to(REPLY, place)


class CompareScreen(Screen[None]):
    """See the module's docstring."""

    AUTO_FOCUS = "#steered"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "escape", "Stop writing, or go back to the chat"),
        Binding("r", "again", "Run again"),
        Binding("S", "seed", "Run with a new seed"),
        Binding("left_square_bracket", "strength(-1)", "The chosen edit weaker, and run again"),
        Binding("right_square_bracket", "strength(1)", "The chosen edit stronger, and run again"),
        Binding("e", "edit", "Choose the next edit"),
        Binding("w", "paint", "Paint by the next steered feature, by the strongest, by none"),
        Binding("y", "copy", "Copy both replies"),
        Binding("x", "export", "Write all of it as JSON"),
        Binding("tab", "app.focus_next", "Other side"),
        Binding("shift+tab", "app.focus_previous", "Other side"),
        Binding("question_mark", "help", "Show keys and commands"),
        Binding("colon", "app.command_palette", "Command palette"),
        Binding("q", "app.quit", "Leave"),
    ]

    class Done(Message):
        """The thread of the trial has left the engine."""

    def __init__(self, chat: ChatScreen) -> None:
        """`SteerError` when there is no prompt, or a reply of the chat is still written."""
        super().__init__()
        session = chat.session
        if session.busy:
            raise SteerError("a reply is still being written", "Esc stops it; then compare")
        self.chat, self.prompt = chat, last_prompt(session)
        last = chat.last_reply
        drawn = last.seed if last is not None else random.SystemRandom().randint(0, MAX_SEED)
        self.seed = drawn if session.seed is None else session.seed
        self.trial: Trial | None = None
        self.writing = False
        painted = list(session.steering.places(session.engine.info.hook))
        self.painting: Paint = painted[0] if painted else "strongest"
        self._again = False
        """Whether another trial waits for this one to stop."""
        self._told = 0.0

    def compose(self) -> ComposeResult:
        yield plain("", id="headline")
        yield plain("", id="asked")
        with Container(id="sides"):
            yield Side(id="baseline")
            yield Side(id="steered")
        yield plain("", id="changed")
        yield plain("", id="under")
        yield plain("", id="notice")
        yield plain("", id="footer")
        yield plain(ROOM, id="room")

    def on_mount(self) -> None:
        self.sides = self.query_one("#baseline", Side), self.query_one("#steered", Side)
        self.query_one("#asked").border_title = palette.title("Prompt")
        self.timer = self.set_interval(1 / status.HERTZ, self.drain, pause=True)
        self.begin()

    def on_unmount(self) -> None:
        self.stop()

    def on_resize(self, event: Resize) -> None:
        self.call_after_refresh(self.draw)  # which asks how much room there is

    # Writing

    def begin(self) -> None:
        """Starts a trial with the chat's set as it stands, after the one that runs."""
        if self.writing:
            self._again = self.stop()
            return
        self.say("")
        self.trial = None if self.problem else Trial(self.chat.session, self.prompt, self.seed)
        for side in self.sides:
            side.empty()
            side.colour(self.painting, self.chat.maximum)
        if self.trial is not None:
            self.writing = True
            self.timer.resume()
            self.run_worker(partial(self._write, self.trial), thread=True, group="compare")
        self.draw()

    def _write(self, trial: Trial) -> None:
        """Runs in a worker thread."""
        trial.write()
        self.post_message(self.Done())

    def on_compare_screen_done(self) -> None:
        self.drain()
        self.timer.pause()
        self.writing = False
        again, self._again = self._again, False
        self.begin() if again else self.draw()

    def drain(self) -> None:
        """Takes all that has arrived and draws it once."""
        if self.trial is None or not (events := self.trial.take()):
            return
        for row, side in enumerate(self.sides):
            side.extend(REPLY, [event for event in events if isinstance(event, TokenEvent) and event.row == row])
        for event in events:
            match event:
                case Finished() if event.text:
                    self.sides[event.row].text(REPLY, event.text)
                case Failed():
                    self.say(event.message + (f" ({event.hint})" if event.hint else ""), error=True)
                case PromptRead() if event.row == 0 and event.dropped:
                    self.say(status.dropped(event))
        self._draw_titles()
        if time.monotonic() - self._told > TELL:
            self._draw_changed()

    def stop(self) -> bool:
        """Whether there was something to stop."""
        if self.writing and self.trial is not None:
            self.trial.stop.set()
        self._again = False
        return self.writing

    # Drawing

    @property
    def problem(self) -> str:
        """Why there is nothing to compare; empty when there is."""
        return nothing(self.chat.session.steering, self.chat.session.engine.info.hook)

    @property
    def here(self) -> Side:
        """The side that has, or had, the focus."""
        return self.sides[0 if self.focused is self.sides[0] else 1]

    def draw(self) -> None:
        """Draws everything but the replies' text."""
        session, width = self.chat.session, self.app.size.width
        edits, chosen = session.steering.edits, self.chat.panel.edit
        at = f"{palette.TAGS[self.chat.panel.selected : self.chat.panel.selected + 1]} of {len(edits)}: "
        right = f"{at if len(edits) > 1 else ''}{chosen}" if chosen is not None else "no edit"
        drawn = f"seed {self.seed}, T {session.sampling.temperature:g}, {session.max_tokens} tokens"
        right = palette.fit(right, min(len(right), max(width - len(drawn) - 17, 12)))
        self.query_one("#headline", Static).update(Text(status.spread(f"steer  Compare   {drawn}", right, width)))
        self._draw_asked()
        self._draw_titles()
        self._draw_changed()
        self._draw_under()
        keys = [("Esc", "stop" if self.writing else "chat"), ("?", "help")]
        if self.trial is not None:
            keys += [("r", "again"), ("S", "new seed"), *([("[ ]", "strength")] if edits else [])]
            keys += [("e", "next edit")] if len(edits) > 1 else []
            keys += [("n", "difference"), ("Tab", "side"), ("w", "paint"), ("y", "copy"), ("x", "export")]
        self.query_one("#footer", Static).update(status.keys_line(keys, width))

    def _draw_asked(self) -> None:
        messages = self.prompt.messages
        if self.prompt.text is not None:
            said, about = end_of(self.prompt.text, self.app.size.width - 4), "a text to go on from"
        else:
            said = messages[-1][1]
            before = len([role for role, _ in messages if role != "system"]) - 1
            about = f"chat, {before or 'no'} message{'s' * (before != 1)} before it, "
            about += f"system message: {messages[0][1]}" if messages[0][0] == "system" else "no system message"
        width = max(self.app.size.width - 4, 8)
        text = Text(f"{palette.fit(said, width)}\n", no_wrap=True, overflow="crop")
        text.append(palette.fit(about, width), palette.DIM)
        self.query_one("#asked", Static).update(text)

    def _draw_titles(self) -> None:
        guarded = self.chat.session.guard == "back-off"  # which a batch does without: this is not the chat's reply
        names = "Baseline", "With the edits" + ", without the guard" * guarded
        for side, name, place in zip(self.sides, names, (0, 1), strict=True):
            told = status.reply_status(self.trial.replies[place]).split("  ") if self.trial else []
            more = ["more below"] if side.more_below else []
            side.border_title = palette.title(" · ".join([name, *more, *(t for t in told if not t.endswith("tok/s"))]))

    def _draw_changed(self) -> None:
        box, self._told = self.query_one("#changed", Static), time.monotonic()
        box.border_title = palette.title("What changed: mean activation with the edits, less the baseline's")
        width, rows = max(self.app.size.width - 4, 8), max(box.size.height, 3)
        if self.trial is None:
            box.update(Text("\n".join(palette.wrapped(self.problem, width))))
            return
        found = self.trial.compared()
        lines = palette.packed(facts(self.trial, found), width)
        labels = self.chat.label([change.latent for change in found.changed])
        colourless = palette.is_colourless(self.app)
        text = changes(found, width, rows - len(lines), labels, self.chat.tags, colourless)
        box.update(Text("\n").join([*map(Text, lines), *([text] if text else [])]))

    def _draw_under(self) -> None:
        """The token under the cursor, its two strongest features, and how far the edits moved its distribution."""
        current, lead = self.here.current, ""
        event = current[2] if current else None
        if current is not None:
            lead = f"{current[1]}  "
            lead += f"KL {palette.number(current[2].kl)}  " if current[2].kl is not None else ""
        labels = self.chat.label([hit.latent for hit in event.hits[:2]] if event else [])
        chat, width = self.chat, self.app.size.width
        line = status.strip(event, width, lead=lead, labels=labels, maxima=chat.maximum, tags=chat.tags)
        self.query_one("#under", Static).update(line)

    def say(self, text: str, *, error: bool = False) -> None:
        notice = self.query_one("#notice", Static)
        notice.update(Text(clean(text)))
        notice.set_class(bool(text), "-said").set_class(error, "-error")

    def on_token_view_moved(self, event: TokenView.Moved) -> None:
        self._draw_under()

    def on_descendant_focus(self, event: DescendantFocus) -> None:
        self._draw_under()

    # Keys

    def action_escape(self) -> None:
        if not self.stop():
            self.app.pop_screen()

    def action_again(self) -> None:
        self.begin()

    def action_seed(self) -> None:
        self.seed = random.SystemRandom().randint(0, MAX_SEED)
        self.begin()

    def action_edit(self) -> None:
        panel = self.chat.panel
        panel.select((panel.selected + 1) % max(len(panel.steering.edits), 1))
        self.draw()

    def action_strength(self, step: int) -> None:
        """One step of the steering panel, which knows units and steps.

        The set is changed here alone: one that the panel posts is put into force later, over what has changed since.
        """
        panel, session = self.chat.panel, self.chat.session
        if panel.edit is None or (steering := panel.stepped(session.steering, step)) is None:
            self.say("there is no edit to change" if panel.edit is None else f"`{panel.edit}` has no strength")
            return
        if self.chat.attempt(partial(session.change, steering)):
            self.chat.draw()  # the panel too
            self.begin()
            self.draw()
        else:
            self.say(self.chat.notice, error=True)

    def action_paint(self) -> None:
        session = self.chat.session
        around: list[Paint] = [*session.steering.places(session.engine.info.hook), "strongest", None]
        here = around.index(self.painting) if self.painting in around else -1
        self.painting = around[(here + 1) % len(around)]
        for side in self.sides:
            side.colour(self.painting, self.chat.maximum)
        if isinstance(latent := self.painting, int):
            self.say(f"painted by {self.chat.tags.get(latent, '')} {latent} {self.chat.label([latent])[latent]}")
        else:
            self.say("painted by the strongest feature of each token" if self.painting else "nothing is painted")

    def action_difference(self, step: int) -> None:
        """To the next place from which the replies differ, on both sides; from the last one around to the first."""
        places = self.trial.differences() if self.trial else []
        if not places:
            self.say("the replies do not differ")
            return
        at = self.here.cursor[1] if self.here.cursor is not None else -1
        ahead = [place for place in places[::step] if (place - at) * step > 0]
        for side in self.sides:
            side.go((ahead or places[::step])[0])

    def action_beside(self) -> None:
        if (here := self.here.current) is not None:
            other = self.sides[1 if self.here is self.sides[0] else 0]
            other.go(here[1])
            other.focus()

    def action_copy(self) -> None:
        if self.trial is None:
            self.say("there is nothing to copy")
            return
        baseline, steered = (clean(reply.text) for reply in self.trial.replies)
        self.app.copy_to_clipboard(f"baseline:\n{baseline}\n\nwith the edits:\n{steered}\n")
        self.say("copied both replies")

    def action_export(self) -> None:
        if self.trial is None or self.writing:
            self.say("it is still being written" if self.writing else "there is nothing to write")
            return
        names = ("comparison.json", *(f"comparison-{n}.json" for n in range(2, 1000)))
        free = next((name for name in names if not os.path.lexists(name)), "")
        self.app.push_screen(Ask("Write the comparison to", value=free), self._export)

    def _export(self, name: str | None) -> None:
        """Writes to the file of that name; over one that exists only when told so."""
        if name and os.path.lexists(os.path.expanduser(name)):
            question = f"{name} exists. Write over it?"
            self.app.push_screen(Confirm(question), lambda yes: self._write_to(name) if yes else None)
        elif name:
            self._write_to(name)

    def _write_to(self, name: str) -> None:
        assert self.trial is not None
        try:
            latents = [change.latent for change in self.trial.compared().changed]
            entry = self.trial.entry(self.chat.label(latents))
            text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            write_whole(Path(os.path.expanduser(name)), text.encode("utf-8", "surrogatepass"))
        except EXPLAINED as error:
            self.say(sentence(error), error=True)
            return
        self.say(f"wrote {name}")

    def action_help(self) -> None:
        self.chat.show_help()


def end_of(text: str, width: int) -> str:
    """The end of a text on one line, in at most `width` cells."""
    text = palette.line(text)
    start = max(len(text) - width, 0)
    while cell_len(text[start:]) > width - 2 * (start > 0):
        start += 1
    return ".." * (start > 0) + text[start:]
