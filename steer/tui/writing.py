"""How a reply comes to the screen: what a thread worker takes from `Session.reply` is drawn in the interface's thread.

The worker appends events to `inbox`; a 20 Hz timer, asleep while nothing is written, drains it. The first and the last
event of a reply wake the drain at once. No widget is touched outside the interface's thread.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import partial

from textual.message import Message

from steer.errors import EXPLAINED, SteerError, sentence
from steer.events import Event, Failed, Finished, PromptRead, TokenEvent
from steer.session import Session
from steer.tui import status
from steer.tui.actions import Actions
from steer.tui.prompt import Prompt
from steer.tui.transcript import Transcript


class Writing(Actions):
    """See the module's docstring. `ChatScreen` builds on it."""

    transcript: Transcript
    prompt: Prompt

    class Arrived(Message):
        """The first or the last event of a reply is in the inbox."""

        def __init__(self, stop: threading.Event, *, last: bool) -> None:
            super().__init__()
            self.stop_flag, self.last = stop, last

    def __init__(self) -> None:
        super().__init__()
        self.inbox: deque[Event] = deque()
        self._stop: threading.Event | None = None
        """Set to stop the reply; None while none is written."""
        self._key = ""
        self._sent = ""

    def draw_progress(self) -> None:
        """Draws what each token changes beside the transcript."""
        raise NotImplementedError

    def on_mount(self) -> None:
        self.timer = self.set_interval(1 / status.HERTZ, self.drain, pause=True)

    def on_unmount(self) -> None:
        self.stop()

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

    def on_writing_arrived(self, event: Arrived) -> None:
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
        self.draw_progress()

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

    def stop(self) -> bool:
        if self._stop is not None:
            self._stop.set()
        return self._stop is not None
