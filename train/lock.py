"""One process for a folder: `lock` in it names the one that trains (or captures) there.

The system holds the lock for as long as that process lives, so that one left behind by a kill is no lock: the next
process takes the file over. On a file system without such locks the number in the file decides: it counts while a
process of this machine has it.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train.errors import TrainError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextmanager
def only_process(folder: Path, does: str = "trains", hint: str | None = None) -> Iterator[None]:
    """Keeps others out of `folder`. Raises `TrainError` naming the process that is there already."""
    with (folder / "lock").open("a+", encoding="utf-8") as handle:
        handle.seek(0)
        holder = handle.read(200).strip()
        if not _taken(handle.fileno(), holder):
            raise TrainError(
                f"process {holder or 'of unknown number'} {does} in {folder} already",
                hint or f"`steer train stop {folder}` asks it to end; or choose another folder",
            )
        handle.truncate(0)
        handle.write(f"{os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)


def is_taken(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`, as far as the system tells."""
    try:
        with (folder / "lock").open("r+", encoding="utf-8") as handle:
            holder = handle.read(200).strip()
            if fcntl is None or holder.partition(" on ")[2] != socket.gethostname():
                return bool(holder)  # where the system cannot be asked, the file is believed
            return not _taken(handle.fileno(), holder)
    except OSError:  # no such file: nobody ever was there
        return False


def _taken(descriptor: int, holder: str) -> bool:
    """Takes the lock, if it is free."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    number, _, host = holder.partition(" on ")
    if not number.isdecimal() or host != socket.gethostname() or int(number) == os.getpid():
        return True
    with suppress(PermissionError):
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
    return False
