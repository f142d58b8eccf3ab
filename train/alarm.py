"""How the processes that torchrun started for one capture end together.

They never wait for one another while they work. What stops one of them is told to the others through torchrun's own
store, so that each ends with that one sentence; torchrun asks those to end (SIGTERM) that outlive a killed one.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llama_3.ranks import is_main, world
from train.errors import TrainError

LOOK_EVERY = 0.5
"""Seconds between two looks at what the others say."""
AGAIN = "run the same call again: it goes on where each process stopped"


def rank() -> int:
    """The number of this process among those that torchrun started, 0 without it."""
    return int(os.environ["RANK"]) if world() > 1 else 0


@contextmanager
def together() -> Iterator[Callable[[], None]]:
    """Gives a function to call often: it raises `TrainError` when another process has stopped. At the end of the block
    all wait for the last one. With one process it does nothing."""
    if world() == 1:
        yield lambda: None
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store = PrefixStore("capture", next(rendezvous("env://"))[0])
    looked = 0.0

    def fault(otherwise: str | None) -> None:
        if store.check(["fault"]):
            raise TrainError(store.get("fault").decode(), AGAIN)
        if otherwise:
            raise TrainError(otherwise, AGAIN)

    def look() -> None:
        nonlocal looked
        if time.monotonic() - looked > LOOK_EVERY:
            looked = time.monotonic()
            fault(None)

    def on_terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one sentence is enough
        fault("another process of this capture is gone, so all end; what is listed is kept")

    before = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield look
        store.set(f"done {rank()}", "")
        while not store.check([f"done {other}" for other in range(world())]):
            look()
            time.sleep(0.05)
    except BaseException as error:
        if not store.check(["fault"]):
            store.set("fault", f"process {rank()} of this capture stopped: {error or type(error).__name__}")
        _speak(error, lambda: store.check(["told"]), lambda: store.set("told", ""))
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _speak(error: BaseException, told: Callable[[], bool], tell: Callable[[], None]) -> None:
    """The first process speaks for all; where it is the one that died, another does."""
    if is_main():
        tell()
        return
    until = time.monotonic() + 4 * LOOK_EVERY
    while not told():
        if time.monotonic() > until:
            tell()
            print(f"error: {error}", file=sys.__stderr__, flush=True)
            return
        time.sleep(0.05)
