"""Many requests from one file, and a file of results that no kill can spoil.

The requests of a file are taken in groups of `GROUP` times the batch size, by their order. Within a group they are
sorted by length and written by continuous batching: the place of a row that is done goes to the next in line. A group
ends before the next one begins, and its results are added to the file together, in the order of the requests. So what
runs beside a request, and how its numbers round, follows from the input and the options alone: a run that was killed
repeats the group it was in, and its file is that of an undisturbed run, byte for byte.

`Results` adds a group in three steps: the lines to OUT, fsync, then the count of lines and bytes to `OUT.progress`,
by replacing that file. What OUT holds beyond that count was torn off by a kill, and is cut off on the way back.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import random
import threading
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol, Self

from steer.edits import SteeringSet
from steer.errors import EXPLAINED, SteerError, sentence
from steer.events import Event, Finished, TokenEvent, clean
from steer.requests import Defaults, Request, name_of, read_object, read_request
from steer.session import MAX_SEED, Prompt, Sampling

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

GROUP = 8
"""Batches of requests that are written together. At the end of a group places stay empty; a kill costs a group."""
ROOM = 1024
"""Tokens of prompt and reply up to which a full batch is run; of longer ones fewer run together, by powers of two, so
that their keys and values take no more memory."""
Options = Mapping[str, Any]
"""What was asked for, by flag, in values that JSON holds."""


class BatchEngine(Protocol):
    """What writing a batch needs of an engine."""

    def measure(self, prompt: Prompt, steering: SteeringSet, sampling: Sampling, max_tokens: int) -> int: ...

    def stream(
        self,
        prompts: Sequence[Prompt],
        steering: Sequence[SteeringSet],
        *,
        sampling: Sequence[Sampling],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        stop: threading.Event,
        hits: bool,
        alternatives: int,
        stop_strings: Sequence[str],
        places: int,
    ) -> Iterator[Event]: ...


# -- requests -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of an input before any of it is run."""

    sha256: str
    lines: int
    """Those that are not blank: each gets a result."""
    repeated: int
    """Lines whose id stands on an earlier one."""
    example: tuple[int, int] | None
    """Two lines with the same id."""


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank; `.xz` and `.gz` are read as they are. A `SteerError` for what
    cannot be read."""
    packed = {".xz": lzma.LZMAFile, ".gz": gzip.GzipFile}.get(path.suffix.lower())
    try:
        with packed(path) if packed else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise SteerError(f"{path} is damaged: {sentence(error)}", "copy or download it again") from error
    except OSError as error:
        raise SteerError(f"{path} cannot be read: {error.strerror or error}") from error


def survey(path: Path) -> Survey:
    """One reading of an input, of which eight bytes a line are kept."""
    import numpy as np

    digest, ids, lines = hashlib.sha256(), array("q"), array("q")
    for number, line in read_lines(path):
        digest.update(b"%d " % number + line.strip() + b"\n")
        lines.append(number)
        try:
            given = read_object(line).get("id")
        except SteerError:
            given = None
        # of its text: Python's hash is the same for -1 and -2
        ids.append(hash(repr(given if type(given) in (str, int) else (number,))))
    _, first, inverse = np.unique(np.array(ids, dtype=np.int64), return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(ids)))
    example = (lines[first[inverse[again[0]]]], lines[again[0]]) if len(again) else None
    return Survey(digest.hexdigest(), len(lines), len(again), example)


def groups(lines: Iterable[tuple[int, bytes]], size: int) -> Iterator[list[tuple[int, bytes]]]:
    """The lines in lists of `size`, the last one shorter."""
    rest = iter(lines)
    while group := list(islice(rest, size)):
        yield group


# -- replies --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Reply:
    """What came of a request."""

    events: list[TokenEvent] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def text(self) -> str:
        shown = "".join(event.text for event in self.events if not event.special)
        return shown + (self.finished.text if self.finished else "")


@dataclass(frozen=True, slots=True)
class Row:
    """One row to run: a request, as it asks or with an empty set."""

    request: Request
    steering: SteeringSet
    tokens: int
    """Those of the prompt and the most of the reply."""
    baseline: bool = False


Entry = dict[str, Any]
"""A result as JSON."""


def admit(
    engine: BatchEngine, group: Iterable[tuple[int, bytes]], defaults: Defaults, baseline: bool
) -> tuple[list[Row], dict[int, Entry]]:
    """The rows to run for the lines of a group, and what the result of each line begins with: `id`, and `error` where
    it cannot run. With `baseline` a request that steers has a second row, without its edits."""
    rows, entries = [], {}
    for line, raw in group:
        name: Entry = {"id": None, "line": line}
        try:
            given = read_object(raw)
            name = name_of(given, line)
            ask = read_request(given, line, defaults)
            tokens = engine.measure(ask.prompt, ask.steering, ask.sampling, ask.max_tokens) + ask.max_tokens
        except EXPLAINED as error:
            hint = getattr(error, "hint", None)
            entries[line] = name | {"error": sentence(error)} | ({"hint": clean(hint)} if hint else {})
            continue
        entries[line] = name
        rows.append(Row(ask, ask.steering, tokens))
        if baseline and steers(ask.steering):
            rows.append(Row(ask, SteeringSet(), tokens, baseline=True))
    return rows, entries


def steers(steering: SteeringSet) -> bool:
    """Whether a set does anything at all."""
    return bool(steering.edits) or steering.error == "drop"


def write(
    engine: BatchEngine,
    rows: Sequence[Row],
    batch_size: int,
    stop: threading.Event,
    *,
    hits: bool = False,
    stop_strings: Sequence[str] = (),
) -> Iterator[tuple[int, Reply]]:
    """The replies to a group of rows, each with its row's place, as they are done; none after `stop` is set."""
    order = sorted(range(len(rows)), key=lambda place: -rows[place].tokens)
    for share, run in groupby(order, key=lambda place: _share(rows[place].tokens)):
        places = list(run)
        asks, replies = [rows[place].request for place in places], [Reply() for _ in places]
        events = engine.stream(
            [ask.prompt for ask in asks],
            [rows[place].steering for place in places],
            sampling=[ask.sampling for ask in asks],
            seeds=[ask.seed for ask in asks],
            max_tokens=[ask.max_tokens for ask in asks],
            stop=stop,
            hits=hits,
            alternatives=0,
            stop_strings=stop_strings,
            places=max(1, batch_size // share),
        )
        for event in events:
            if isinstance(event, TokenEvent):
                replies[event.row].events.append(event)
            elif isinstance(event, Finished):
                if event.finish == "cancelled":
                    return
                replies[event.row].finished = event
                yield places[event.row], replies[event.row]


def _share(tokens: int) -> int:
    """By what the batch is divided for rows of so many tokens."""
    return 1 << max(0, (tokens - 1).bit_length() - (ROOM - 1).bit_length())


# -- results --------------------------------------------------------------------------------------------------------


def _unset(value: object) -> bool:
    """Whether an option is as if it had not been typed."""
    return value is None or value is False or value == []


@dataclass(slots=True)
class Progress:
    """What `OUT.progress` says."""

    sha256: str
    """Of the input."""
    total: int
    options: dict[str, Any]
    seed: int
    """What the seeds of lines without one are drawn from."""
    batch_size: int
    runs: str = ""
    """Model, dtype and device."""
    lines: int = 0
    bytes: int = 0
    failed: int = 0
    tokens: int = 0
    format: str = "steer-batch"
    version: int = 1


class Results:
    """The file of results, open to be added to; one process at a time. Use as a context manager."""

    def __init__(self, out: Path, source: Path, seen: Survey, options: Options, batch_size: int) -> None:
        """Begins OUT, or takes it up where it was left. A `SteerError` says why neither can be: it holds something
        else, the input or an option has changed, another process writes it. The batch size may change, since a
        smaller one may be all that fits: what follows is then no longer that of an undisturbed run to the last digit.
        """
        self.path, self._beside = out, out.with_name(out.name + ".progress")
        if out.suffix.lower() in (".xz", ".gz"):
            raise SteerError(f"{out} would be packed, and results are added to it line by line", "name it .jsonl")
        if out.exists() and (not out.is_file() or os.path.samefile(out, source)):
            what = "the input" if out.is_file() else "no file"
            raise SteerError(f"results cannot go to {out}: it is {what}", "choose another name")
        try:
            # Without a buffer: on a full disk, closing the file would try what is left in it once more.
            self._file = out.open("a+b", buffering=0)
        except OSError as error:
            raise SteerError(f"{out} cannot be written: {error.strerror or error}") from error
        try:
            self._lock()
            self.state = self._take_up(seen, json.loads(json.dumps(options)), batch_size)
            self.resized = self.state.batch_size if self.state.batch_size != batch_size else None
            """The batch size that OUT was left with, where it is another one now."""
            self.state.batch_size = batch_size
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def run_on(self, runs: str) -> None:
        """Say on what the requests run; a `SteerError` where it was something else before."""
        self._compare({"the model": self.state.runs or runs}, {"the model": runs})
        self.state.runs = runs

    def add(self, lines: Sequence[str], failed: int, tokens: int) -> None:
        """The results of a group, one a line; safe on the disk when this returns."""
        text, state = "".join(f"{line}\n" for line in lines).encode(), self.state
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
            self._save(
                replace(
                    state,
                    lines=state.lines + len(lines),
                    bytes=state.bytes + len(text),
                    failed=state.failed + failed,
                    tokens=state.tokens + tokens,
                )
            )
        except OSError as error:
            raise SteerError(
                f"{self.path} cannot be added to: {error.strerror or error}",
                f"what is in it is safe: once that is put right, the same command goes on after {state.lines} lines",
            ) from error

    def _take_up(self, seen: Survey, options: dict[str, Any], batch_size: int) -> Progress:
        size = os.fstat(self._file.fileno()).st_size
        if not size:
            self._save(
                Progress(seen.sha256, seen.lines, options, random.SystemRandom().randint(0, MAX_SEED), batch_size)
            )
            return self.state
        state = self._read()
        if (state.sha256, state.total) != (seen.sha256, seen.lines):
            raise SteerError(f"the input has changed since {self.path} was begun", self._anew())
        self._compare(state.options, options)
        if size < state.bytes:
            lost = f"{self.path} has {size} bytes, and {state.bytes} were written to it"
            raise SteerError(lost, self._anew())
        if size > state.bytes:
            self._file.truncate(state.bytes)
        return state

    def _compare(self, before: Options, now: Options) -> None:
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                was = f"without {name}" if _unset(before.get(name)) else f"with {name} {json.dumps(before[name])}"
                given = "it is not given" if _unset(now.get(name)) else f"it is {json.dumps(now[name])}"
                raise SteerError(f"{self.path} was begun {was}, and now {given}", self._anew())

    def _anew(self) -> str:
        return f"delete {self.path} to begin anew, or choose another name"

    def _read(self) -> Progress:
        try:
            said = json.loads(self._beside.read_text(encoding="utf-8"))
            if (said["format"], said["version"]) != ("steer-batch", 1):
                raise SteerError(f"{self._beside} is of another version of steer", "choose another name")
            return Progress(**said)
        except FileNotFoundError as error:
            raise SteerError(
                f"{self.path} is not empty, and no {self._beside.name} says what it holds", "choose another name"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise SteerError(f"{self._beside} is damaged", f"choose another name than {self.path}") from error

    def _save(self, state: Progress) -> None:
        temporary = self._beside.with_name(self._beside.name + ".tmp")
        with temporary.open("wb") as handle:
            handle.write(json.dumps(asdict(state)).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, self._beside)
        self.state = state

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SteerError(f"another process writes {self.path}", "wait for it, or choose another name") from error
        except OSError:  # a file system without locks
            pass
