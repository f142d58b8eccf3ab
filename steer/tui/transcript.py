"""The transcript of a session: which turn is which section of the token view, and what each section's header says.

Section keys are the places of the turns. A person's text is shown as the tokens that the model read of it, once there
is a prompt that has them, so that it can be painted and inspected like the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType

from steer.events import PromptRead, TokenEvent
from steer.session import Mode, Reply, Session, Turn
from steer.tui import status
from steer.tui.token_view import TokenView


class Transcript(TokenView):
    """A token view that knows turns."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "page_up", "Scroll a screenful up"),
        Binding("pagedown", "page_down", "Scroll a screenful down"),
    ]

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.events: dict[str, Sequence[TokenEvent]] = {}
        """The tokens of each section, by its key."""

    def show(self, session: Session) -> None:
        """Draws all turns anew."""
        self.clear()
        self.events.clear()
        for place, turn in enumerate(session.turns):
            self.add_turn(session, place, turn)

    def add_turn(self, session: Session, place: int, turn: Turn) -> None:
        """Draws a turn below the others."""
        key, reply = str(place), turn.reply
        if reply is None:
            self.start(key, "You" if session.mode == "chat" else "", role="user")
            self.text(key, turn.content)
            answer = session.turns[place + 1].reply if place + 1 < len(session.turns) else None
            if answer is not None and answer.prompt is not None:
                self.read(key, turn.content, answer.prompt)
            return
        if reply.prompt is not None and (text := status.dropped(reply.prompt)):
            self.tell(f"{key} dropped", text)
        self.begin(key, session.mode)
        self.grow(key, reply.events)
        self.retitle(key, session.mode, reply)
        if reply.finished is not None and reply.finished.text:
            self.text(key, reply.finished.text)
        if reply.failed is not None:
            self.tell(f"{key} failed", reply.failed.message)

    def begin(self, key: str, mode: Mode) -> None:
        """Opens the section of a reply that is being written."""
        self.start(key, "Llama  writing..." if mode == "chat" else "", role="assistant")
        self.events[key] = []

    def grow(self, key: str, tokens: Sequence[TokenEvent]) -> None:
        self.events[key] = [*self.events[key], *tokens]
        self.extend(key, tokens)

    def retitle(self, key: str, mode: Mode, reply: Reply) -> None:
        """Writes a reply's header; a document has none."""
        if mode == "chat":
            self.title(key, f"Llama  {status.reply_status(reply)}")

    def drop_notice(self, key: str, mode: Mode, prompt: PromptRead) -> None:
        """Says above the reply that has just begun what was left out of its prompt."""
        if text := status.dropped(prompt):
            self.remove(key)
            self.tell(f"{key} dropped", text)
            self.begin(key, mode)

    def read(self, key: str, content: str, prompt: PromptRead) -> None:
        """Shows a person's text as the tokens that the model read, where the prompt has them."""
        if key not in self.events and (found := status.tokens_of(content, prompt)):
            self.text(key, "")
            self.events[key] = found
            self.extend(key, found)

    def tell(self, key: str, text: str) -> None:
        """A line that nobody said."""
        self.start(key, "", role="notice")
        self.text(key, text)
