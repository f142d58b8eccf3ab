"""The chat screen: transcript, steering, token and message box, drawn from the session; and what commands run on.

One direction each way. Down: keys and commands call the session's verbs, then `draw`. Up: a thread worker iterates
`Session.reply` and appends to `inbox`; a 20 Hz timer, asleep while nothing is written, drains it. The first and the
last event of a reply wake the drain at once. No widget is touched outside the interface's thread.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from typing import ClassVar, Literal

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import DescendantFocus, Resize
from textual.message import Message
from textual.widgets import Static

from steer import commands
from steer.commands import COMMANDS, Paint
from steer.edits import GRAMMAR, Edit
from steer.errors import EXPLAINED, SteerError, sentence
from steer.events import Event, Failed, Finished, PromptRead, TokenEvent
from steer.session import Mode, Session
from steer.tui import palette, status
from steer.tui.actions import Actions
from steer.tui.dialogs import ROOM, Ask, plain
from steer.tui.feature_card import FeatureCardView
from steer.tui.features import FeaturesScreen
from steer.tui.inspector import Inspector
from steer.tui.prompt import Prompt, completion
from steer.tui.steering_panel import SteeringPanel
from steer.tui.token_view import TokenView
from steer.tui.transcript import Transcript

HERTZ = 20


class ChatScreen(Actions):
    """See the module's docstring. It satisfies `commands.Context`."""

    AUTO_FOCUS = "#prompt"
    HELP = "Talk to the model, see which features its tokens lit, and steer them."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "escape", "Stop the reply, leave the box, close the sheet"),
        Binding("i", "type", "Type a message"),
        Binding("tab", "app.focus_next", "Next pane"),
        Binding("shift+tab", "app.focus_previous", "Previous pane"),
        Binding("left_square_bracket", "pinned(-1)", "Paint the previous steered feature"),
        Binding("right_square_bracket", "pinned(1)", "Paint the next steered feature"),
        Binding("0", "command('paint', 'none')", "Paint nothing"),
        Binding("asterisk", "command('paint', '*')", "Paint each token's strongest feature"),
        *(Binding(c.key, f"command('{c.name}')", c.help[0].upper() + c.help[1:]) for c in COMMANDS if c.key),
    ]

    class Arrived(Message):
        """The first or the last event of a reply is in the inbox."""

        def __init__(self, stop: threading.Event, *, last: bool) -> None:
            super().__init__()
            self.stop_flag, self.last = stop, last

    def __init__(self) -> None:
        super().__init__()
        self.inbox: deque[Event] = deque()
        self.painting: Paint = "strongest"
        self.waiting: str | None = None
        """What was sent before the engine was there."""
        self._stop: threading.Event | None = None
        """Set to stop the reply; None while none is written."""
        self._key = ""
        self._sent = ""
        self._pinned = False

    def compose(self) -> ComposeResult:
        yield plain("", id="headline")
        with Horizontal(id="body"):
            yield Transcript(id="transcript")
            with Vertical(id="side"):
                yield SteeringPanel(id="steering")
                yield Inspector(id="token")
            yield FeatureCardView(id="card")
        yield plain("", id="strip")
        yield plain("", id="notice")
        yield plain("", id="completion")
        yield Prompt(id="prompt")
        yield plain("", id="footer")
        yield plain(ROOM, id="room")

    def on_mount(self) -> None:
        self.transcript = self.query_one(Transcript)
        self.panel = self.query_one(SteeringPanel)
        self.inspector = self.query_one(Inspector)
        self.prompt = self.query_one(Prompt)
        self.timer = self.set_interval(1 / HERTZ, self.drain, pause=True)
        self.draw()

    def on_unmount(self) -> None:
        self.stop()

    def on_resize(self, event: Resize) -> None:
        self.draw()

    def on_screen_resume(self) -> None:
        self.draw()

    # What the screen shows

    @property
    def tags(self) -> dict[int, str]:
        """The letters of the steered latents, as the panel shows them."""
        session = self.steer_app.session
        places = session.steering.places(session.engine.info.hook) if session else {}
        return {latent: palette.TAGS[place] for latent, place in places.items() if place < len(palette.TAGS)}

    def draw(self) -> None:
        """Draws everything but the transcript's text from the session."""
        session, width = self.steer_app.session, self.app.size.width
        self.query_one("#headline", Static).update(Text(status.headline(session, width)))
        self._draw_footer()
        mode: Mode = session.mode if session else "chat"
        self.prompt.border_title = palette.title("Message" if mode == "chat" else "Text to go on from")
        self.prompt.border_subtitle = palette.title("Enter send · Ctrl+J new line · / commands")
        self.transcript.border_title = palette.title("Chat" if mode == "chat" else "Text")
        if session is None:
            return
        self.set_class(session.engine.info.hook is None, "-bare")
        report = next((t.reply.finished.report for t in reversed(session.turns) if t.reply and t.reply.finished), None)
        labels = self.label(tuple(session.steering.places(session.engine.info.hook)))
        self.panel.show(session.steering, labels=labels, readouts=session.engine.readout, report=report)
        self._draw_painting()
        self._draw_token()

    def _draw_footer(self) -> None:
        typing, writing = self.focused is self.prompt, self._stop is not None
        line = status.footer(self.steer_app.session, self.app.size.width, typing=typing, writing=writing)
        self.query_one("#footer", Static).update(line)

    def _draw_painting(self) -> None:
        if isinstance(self.painting, int):
            name = self.label([self.painting])[self.painting]
            said = f"painting {self.tags.get(self.painting, '')} {self.painting} {name}"
        else:
            said = "painting each token's strongest feature" if self.painting else "painting nothing"
        reply = self.last_reply
        if self.session.mode == "completion" and reply is not None:
            said = f"{status.reply_status(reply)} · {said}"
        more = "more below · " if self.transcript.more_below else ""
        self.transcript.border_subtitle = palette.title(more + said if self.session.engine.info.hook else more)

    def _draw_token(self) -> None:
        current = self.transcript.current
        event = current[2] if current else None
        labels = self.label([hit.latent for hit in event.hits[:48]] if event else [])
        if current and not self._pinned:
            history = self.transcript.events.get(current[0], ())
            self.inspector.show(
                event,
                current[3],
                labels=labels,
                maxima=self.maximum,
                painted=self.painting if isinstance(self.painting, int) else None,
                history=history,
                tags=self.tags,
            )
        elif event is None:
            self.inspector.show(None, 0, labels={}, maxima=self.maximum, painted=None, history=(), tags={})
        reply = self.last_reply
        lead = f"{status.reply_status(reply)} | " if self.session.mode == "completion" and reply else ""
        lead = "more below | " if self.transcript.more_below else lead
        line = status.strip(event, self.app.size.width, lead=lead, labels=labels, maxima=self.maximum, tags=self.tags)
        covered = reply.text if reply and self.has_class("-sheet-steering") else ""
        self.query_one("#strip", Static).update(status.tail(covered, self.app.size.width) or line)

    def draw_turns(self) -> None:
        """Draws the transcript anew."""
        self.inbox.clear()  # the session has it all
        self.transcript.show(self.session)
        self.paint(self.painting)

    def begin(self, notice: str) -> None:
        """The session is there: draws it, and sends what has been waiting."""
        self.draw_turns()
        self.say(notice)
        if self.waiting is not None:
            text, self.waiting = self.waiting, None
            if not self.attempt(partial(self.send, text)):
                self.prompt.fill(text)

    # Writing a reply

    def write_reply(self) -> None:
        session, self._stop = self.session, threading.Event()
        self._key = str(len(session.turns))
        self.transcript.begin(self._key, session.mode)
        self.transcript.follow = True
        self.transcript.scroll_end(animate=False)
        self.timer.resume()
        self.draw()
        self.run_worker(partial(self._generate, session, self._stop), thread=True, group="reply")

    def _generate(self, session: Session, stop: threading.Event) -> None:
        """Runs in a worker thread."""
        try:
            for place, event in enumerate(session.reply(stop)):
                self.inbox.append(event)
                if place == 0:
                    self.post_message(self.Arrived(stop, last=False))
        except EXPLAINED as error:
            self.inbox.append(Failed(sentence(error), getattr(error, "hint", None)))
        finally:
            self.post_message(self.Arrived(stop, last=True))

    def on_chat_screen_arrived(self, event: Arrived) -> None:
        if event.stop_flag is not self._stop:
            return  # the next reply has begun already, and with it all of this one was drained
        self.drain()
        if event.last:
            self.timer.pause()
            self._stop = None
            self._close_reply()

    def drain(self) -> None:
        """Takes all that has arrived and draws it once."""
        events = [self.inbox.popleft() for _ in range(len(self.inbox))]
        if not events or self.steer_app.session is None:
            return
        session, transcript, key = self.session, self.transcript, self._key
        tokens: list[TokenEvent] = []
        for event in events:
            match event:
                case PromptRead():
                    place = int(key) - 1
                    transcript.drop_notice(key, session.mode, event)
                    if 0 <= place < len(session.turns) and session.turns[place].reply is None:
                        transcript.read(str(place), session.turns[place].content, event)
                case TokenEvent():
                    tokens.append(event)
        transcript.grow(key, tokens)
        for event in events:
            match event:
                case Finished() if event.text:
                    transcript.text(key, event.text)
                case Failed():
                    self._failed(event)
        if int(key) < len(session.turns) and (reply := session.turns[int(key)].reply) is not None:
            transcript.retitle(key, session.mode, reply)
        self.query_one("#headline", Static).update(Text(status.headline(session, self.app.size.width)))
        self._draw_painting()

    def _failed(self, failed: Failed) -> None:
        """A reply that read nothing was refused: the session has forgotten it, and the box gets its text back."""
        said = failed.message + (f" ({failed.hint})" if failed.hint else "")
        if len(self.session.turns) <= int(self._key):
            self.draw_turns()
            if not self.prompt.text:
                self.prompt.fill(self._sent)
        else:
            self.transcript.tell(f"{self._key} failed", failed.message)
        self.say(said, error=True)

    def _close_reply(self) -> None:
        self._sent = ""
        if self.session.unsaved:
            self.say(f"not saved: {self.session.unsaved}", error=True)
        self.draw()

    # What was typed

    def on_prompt_sent(self, event: Prompt.Sent) -> None:
        text = event.text
        if text.startswith("/"):
            if not self.attempt(partial(commands.execute, self, text)):
                self.prompt.fill(text)
        elif self.steer_app.session is None:
            self.waiting = text if text.strip() else None
            self.say("this will be sent when the model is loaded" if text.strip() else "")
        elif not self.attempt(partial(self.send, text)):
            self.prompt.fill(text)

    def send(self, text: str) -> None:
        """Says `text`, or in completion mode appends it to the text, and has the model go on."""
        self.drain()
        session, place = self.session, len(self.session.turns)
        if session.mode == "chat":
            session.say(text)
        elif text or session.turns:
            session.complete(session.document + text)
        else:
            raise SteerError("there is no text to go on from", "write its beginning")
        self._sent = text
        for number, turn in enumerate(session.turns[place:], place):
            self.transcript.add_turn(session, number, turn)
        self.write_reply()

    def on_prompt_typed(self, event: Prompt.Typed) -> None:
        line = completion(event.text, self.app.size.width - 4)
        shown = self.query_one("#completion", Static)
        shown.update(Text(line))
        shown.set_class(bool(line), "-open")

    def on_prompt_next(self) -> None:
        """While a reply is written Tab goes straight to the set that steers it."""
        live = self._stop is not None and self.session.engine.info.hook is not None
        self.show_pane("steering") if live else self.focus_next()

    def on_prompt_up(self) -> None:
        self.transcript.focus()

    def on_descendant_focus(self, event: DescendantFocus) -> None:
        if event.widget in (self.panel, self.inspector) and self.has_class("-narrow"):
            self._sheet("steering" if event.widget is self.panel else "token")
            self.draw()  # the strip says what the sheet covers
        self._draw_footer()

    # What the panes say

    def on_token_view_moved(self, event: TokenView.Moved) -> None:
        self._pinned = self._pinned and self.inspector.has_focus
        self._draw_token()

    def on_token_view_pinned(self, event: TokenView.Pinned) -> None:
        self._draw_token()
        self._pinned = True
        self.show_pane("token")

    def on_steering_panel_changed(self, event: SteeringPanel.Changed) -> None:
        self.attempt(partial(self.session.change, event.steering))
        self.draw()

    def on_steering_panel_exact(self, event: SteeringPanel.Exact) -> None:
        edit = self.session.steering.edits[event.place]

        def typed(text: str) -> Edit:
            made = edit.retyped(text)
            self.session.engine.check(made)
            return made

        def take(text: str | None) -> None:
            if text is not None:
                self.attempt(lambda: self.session.change(self.session.steering.put(event.place, typed(text))))
                self.draw()

        hint = "13.6 raw, 1.1x of max, 30% of |x|" if edit.kind != "scale" else "a factor, as 2"
        hint, value = (f"{hint}; or the whole edit", edit.strength) if edit.strength else (GRAMMAR, edit)
        self.app.push_screen(Ask(f"Exact strength: {edit}", value=str(value), hint=hint, check=typed), take)

    def on_steering_panel_resend(self) -> None:
        self.attempt(partial(commands.execute, self, "/regenerate"))

    def on_steering_panel_open(self, event: SteeringPanel.Open) -> None:
        self.open_card(event.latent)

    def on_inspector_open(self, event: Inspector.Open) -> None:
        self.open_card(event.latent)

    def on_inspector_paint(self, event: Inspector.Paint) -> None:
        self.paint(event.latent)

    def on_inspector_steer(self, event: Inspector.Steer) -> None:
        self.steer(event.latent, "add")

    def open_card(self, latent: int) -> None:
        """The card beside the panes where there is room for it, else on the features screen."""
        if self.has_class("-wide"):
            card = self.query_one("#card", FeatureCardView)
            self.attempt(lambda: card.show(self.session.engine.card(latent), "top"))
        else:
            self.show_features(f"id:{latent}")

    def steer(self, latent: int, kind: Literal["add", "clamp", "ablate"]) -> bool:
        """Puts a latent into the set and paints with it: half its max, or where it has none 15% of the norm."""
        unit = "0.5x" if self.maximum(latent) else "15%"
        text = {"add": f"add {latent} {unit}", "clamp": f"clamp {latent} {unit}", "ablate": f"ablate {latent}"}[kind]
        done = self.attempt(partial(commands.execute, self, f"/steer {text}"))
        if done:
            self.painting = latent
            self.paint(latent)
        return done

    # Keys, and what commands need of the screen

    def action_escape(self) -> None:
        if self.stop():
            return
        if self.focused is not self.prompt:
            self._sheet("")
        self.transcript.focus()

    def action_type(self) -> None:
        self._sheet("")
        self.prompt.focus()

    def action_pinned(self, step: int) -> None:
        """The steered latents in order, and nothing painted between the last and the first."""
        around: list[Paint] = [None, *self.session.steering.places(self.session.engine.info.hook)]
        here = around.index(self.painting) if self.painting in around else 0
        self.paint(around[(here + step) % len(around)])

    def paint(self, what: Paint) -> None:
        if isinstance(what, int) and not 0 <= what < self.session.engine.info.latents:
            raise SteerError(f"there is no latent {what}", f"they go from 0 to {self.session.engine.info.latents - 1}")
        self.painting = what
        latent = what if isinstance(what, int) else None
        self.transcript.paint(latent, self.maximum, strongest=what == "strongest")
        if latent is not None and self.has_class("-wide"):
            self.open_card(latent)
        self.draw()

    def set_mode(self, mode: Mode) -> None:
        session = self.session
        if mode != session.mode:
            session.clear()
            session.mode = mode
            self.draw_turns()
        self.prompt.focus()

    def show_pane(self, name: Literal["steering", "token"]) -> None:
        if self.session.engine.info.hook is None:
            raise SteerError("this model runs without an SAE, so there are no features", "`steer train` makes one")
        self._sheet(name)
        (self.panel if name == "steering" else self.inspector).focus()

    def _sheet(self, name: str) -> None:
        """Which pane is open where only one fits; empty is the transcript."""
        for other in ("steering", "token"):
            self.set_class(other == name, f"-sheet-{other}")

    def show_features(self, words: str) -> None:
        if self.session.engine.info.hook is None:
            raise SteerError("this model runs without an SAE, so there are no features", "`steer train` makes one")
        if isinstance(self.app.screen, FeaturesScreen):
            self.app.pop_screen()
        self.app.push_screen(FeaturesScreen(self, words))

    def take_back(self) -> None:
        gone = self.session.undo_last()
        text = "".join(turn.content for turn in gone if turn.reply is None)
        self.draw_turns()
        self.prompt.fill(text)
        self.prompt.focus()

    def stop(self) -> bool:
        if self._stop is not None:
            self._stop.set()
        return self._stop is not None
