"""Files of a user, written whole or not at all.

What is written goes to a name of its own beside the file, onto the disk, and then over the file in one step: a full
disk or a kill leaves what was there, and two processes that write one file do not write into each other.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from steer.errors import SteerError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, with the same ending, which becomes `path` at the end; `SteerError` when that cannot be.
    What is no file, as a pipe, is written to as it is."""
    real = Path(os.path.realpath(path))  # a link stays one
    if not real.name or real.is_dir():
        raise SteerError(f"`{path}` cannot be written: it is a folder")
    straight = real.exists() and not real.is_file()  # a pipe or a device
    partial = real if straight else real.with_name(f".{uuid.uuid4().hex}.partial{real.suffix}")
    try:
        yield partial
        if not straight:
            with partial.open("r+b") as written:
                os.fsync(written.fileno())
            if real.exists():
                shutil.copymode(real, partial)
            os.replace(partial, real)
    except OSError as error:
        raise SteerError(f"`{path}` cannot be written: {error.strerror or error}") from error
    finally:
        if not straight:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file; `SteerError` when it cannot be written."""
    with replacing(path) as partial:
        partial.write_bytes(content)
