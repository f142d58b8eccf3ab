"""The engine of a command, and how Ctrl-C reaches it. Models are loaded here and nowhere else in the commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from steer.cli.options import narrate
from steer.config import Settings
from steer.events import TokenEvent
from steer.session import EngineLike

if TYPE_CHECKING:
    from steer.engine import Engine


class InspectingEngine(EngineLike, Protocol):
    """What commands need: a session's engine that also reads a text without going on from it."""

    def inspect(self, text: str, *, chat: bool = False) -> tuple[TokenEvent, ...]: ...


def make_engine(settings: Settings) -> InspectingEngine:
    """The engine that the settings ask for; says on stderr when it runs without features."""
    engine = load_engine(settings)
    if engine.info.notice:
        narrate(engine.info.notice)
    return engine


def load_engine(settings: Settings) -> Engine:
    """The engine itself, with the model and the SAE that capture and training need."""
    from steer.engine import Engine

    return Engine.load(
        settings.model,
        settings.sae,
        settings.labels,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
    )


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a reply ends in good order; the second one interrupts."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
