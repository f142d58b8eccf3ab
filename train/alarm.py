"""How the processes that torchrun started for one capture or one run end together.

What stops one of them is told to the others through torchrun's own store, so that each ends with that one sentence;
torchrun asks those to end (SIGTERM) that outlive a killed one. Those of a capture never wait for one another while they
work, and look at the store (`together`); those of a training run meet at every step, and look there once the others
are not at the next one (`explained`).
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from llama_3.ranks import is_main, world
from train.errors import GoneError, TrainError
from train.signals import StoppedError

LOOK_EVERY = 0.5
"""Seconds between two looks at what the others say."""
AGAIN = "run the same call again: it goes on where each process stopped"
RESUME = "start all again with --resume: nothing written is lost"


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
    store = _store("capture")
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
        _speak(error, store)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def explained() -> Iterator[None]:
    """Around a training run: what stops one process is said once, by the first or, where that one died, by another.

    A `GoneError` becomes what the process that is gone said last, if it could. With one process it does nothing.
    """
    if world() == 1:
        yield
        return
    from torch import distributed

    store = _store("train")

    def on_terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one sentence is enough
        raise GoneError("another process of this run is gone, so all end", RESUME)

    before = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    except StoppedError:
        raise
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told: Exception = error
        with suppress(RuntimeError):  # the store may be gone as well
            if not isinstance(error, GoneError):
                store.set("fault", f"process {rank()} of this run stopped: {error or type(error).__name__}")
            elif _soon(lambda: store.check(["fault"])):
                told = TrainError(store.get("fault").decode(), RESUME)
        if distributed.is_initialized():
            distributed.destroy_process_group()  # the others, who may be waiting for this one, must come to hear of it
        _speak(told, store)
        raise told from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _store(name: str) -> Any:
    """torchrun's store, which outlives the processes, with keys of our own in it."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    return PrefixStore(name, next(rendezvous("env://"))[0])


def _speak(error: BaseException, store: Any) -> None:
    """The first process speaks for all; where it is the one that died, another does."""
    with suppress(RuntimeError):
        if is_main():
            store.add("told", 1)
            return
        if _soon(lambda: store.check(["told"])) or store.add("told", 1) > 1:
            return
    hint = getattr(error, "hint", None)
    print(f"error: {error}" + (f"\n\nhint: {hint}" if hint else ""), file=sys.__stderr__, flush=True)


def _soon(come: Callable[[], bool]) -> bool:
    """Whether it comes within some looks."""
    until = time.monotonic() + 4 * LOOK_EVERY
    while not (there := come()) and time.monotonic() < until:
        time.sleep(0.05)
    return there
