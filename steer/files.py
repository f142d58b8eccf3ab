"""Files of a user, written whole or not at all.

What is written goes to a name of its own beside the file, onto the disk, and then over the file in one step: a full
disk or a kill leaves what was there, and two processes that write one file do not write into each other.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from steer.errors import SteerError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, with the same ending, which becomes `path` at the end; `SteerError` when that cannot be."""
    partial = path.with_name(f".{uuid.uuid4().hex}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise SteerError(f"`{path}` cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file; `SteerError` when it cannot be written."""
    with replacing(path) as partial:
        partial.write_bytes(content)
