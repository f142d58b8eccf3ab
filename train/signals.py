"""Stopping a run in good order: a signal is noted, the step is finished, everything is saved, and this is said."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(Exception):
    """A run was stopped on request, after a checkpoint; `steer train --resume` goes on with it."""

    def __init__(self, step: int, steps: int):
        super().__init__(f"stopped at step {step:,} of {steps:,}, with a checkpoint")
        self.step, self.steps = step, steps


@contextmanager
def stop_on_signals() -> Iterator[set[str]]:
    """A set that gets the word "stop" when the process is asked to end (SIGINT, SIGTERM). Asked again, it ends at once.

    Outside the main thread, where no signal arrives, the set stays empty.
    """
    told: set[str] = set()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(number: int, frame: FrameType | None) -> None:
        if told:
            raise KeyboardInterrupt
        told.add("stop")

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield told
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
