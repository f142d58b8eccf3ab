"""`steer batch`: a file of requests becomes a file of results, and goes on where it was stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.batch import GROUP, Entry, Reply, Results, admit, groups, read_lines, steers, survey, write
from steer.cli import engines
from steer.cli.complete import DEFAULT_TOKENS, hit_entry, report_entry
from steer.cli.options import Chat, Edits, Error, Json, RecipeFile, command, narrate, one_line, put, steering_set
from steer.config import Settings
from steer.edits import SteeringSet
from steer.errors import ExitCode, SteerError
from steer.events import counted
from steer.requests import SAMPLING, Defaults
from steer.session import check_max_tokens

if TYPE_CHECKING:
    from steer.engine import Engine

TELL_EVERY = 10.0
"""Seconds between two lines of progress where stderr is no terminal."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the replies of all lines have in common."""

    batch_size: int
    baseline: bool
    hits: int
    logprobs: bool
    ends: tuple[str, ...]


@command(sampled=True)
def batch(
    settings: Settings,
    source: Annotated[Path, typer.Argument(help="Requests, one JSON object a line; also .xz, .gz.", metavar="IN")],
    out: Annotated[Path, typer.Argument(help="Results, one a line, in the order of IN.", metavar="OUT")],
    edit: Edits = None,
    recipe: RecipeFile = None,
    error: Error = None,
    chat: Chat = False,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; repeatable.", metavar="TEXT")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Write each reply without its edits, too.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Replies written at a time.", metavar="N")] = 16,
    hits: Annotated[int, typer.Option(min=0, help="Features of each token, the N strongest.", metavar="N")] = 0,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="The log-probability of each token.")] = False,
    json: Json = False,
) -> int:
    """Answer a file of requests; run again, it goes on where it stopped."""
    steering, wanted = (
        steering_set(edit, error, recipe),
        Wanted(batch_size, baseline, hits, logprobs, tuple(stop or ())),
    )
    if "" in wanted.ends:
        raise SteerError("--stop is empty", "give the text that a reply should end before")
    seen = survey(source)
    if seen.example is not None:
        first, second = seen.example
        have = "has" if seen.repeated == 1 else "have"
        one = f"{counted(seen.repeated, 'line')} {have} the id of an earlier one: line {second} that of line {first}"
        narrate(one if seen.repeated == 1 else f"{one}, for one")
    options = _options(settings, steering, hits > 0) | {
        "--edit": [str(one) for one in steering.live],
        "--error": steering.error,
        "special tokens": steering.special_tokens,
        "--chat": chat,
        "--stop": wanted.ends,
    }
    options |= {"--baseline": baseline, "--hits": hits, "--logprobs": logprobs}
    with Results(out, source, seen, options, batch_size) as results, engines.interruptible() as cancel:
        if (done := results.state.lines) < seen.lines:
            if done:
                narrate(f"{done} of {seen.lines} lines are in {out}: going on")
            if results.resized:
                narrate(
                    f"--batch-size was {results.resized}: from here on the last digits may be others than with that"
                )
            engine = engines.load_engine(settings, many=True)
            if engine.info.notice:
                narrate(engine.info.notice)
            if recipe:
                engines.tell_differences(recipe, settings, engine)
            engines.check_edits(engine, steering)
            if hits and not engine.saes:
                raise SteerError("there is no SAE to read features with", "pass `--sae FOLDER`, or leave out `--hits`")
            results.run_on(f"{engine.info.model} in {engine.info.dtype} on {engine.info.device.partition(':')[0]}")
            context = engine.info.context
            limit = min(DEFAULT_TOKENS, context) if settings.max_tokens is None else settings.max_tokens
            defaults = Defaults(
                settings.sampling(engine.defaults),
                steering,
                settings.seed,
                results.state.seed,
                check_max_tokens(limit, context),
                settings.system,
                chat,
            )
            _answer(engine, source, results, defaults, wanted, cancel)
        state = results.state
    if state.lines < state.total:
        narrate(f"{state.lines} of {state.total} lines are in {out}: the same command goes on")
        return ExitCode.INTERRUPTED
    narrate(f"all {state.lines} lines are in {out}, {state.failed} of them with an error")
    if json:
        put({"lines": state.lines, "failed": state.failed, "tokens": state.tokens})
    return ExitCode.DONE


def _answer(
    engine: Engine, source: Path, results: Results, defaults: Defaults, wanted: Wanted, cancel: threading.Event
) -> None:
    """Write what is missing of the results, until `cancel` is set."""
    told = Told(results.state.total, results.state.lines)
    lines = islice(read_lines(source), results.state.lines, results.state.total)
    try:
        for group in groups(lines, GROUP * wanted.batch_size):
            rows, entries = admit(engine, group, defaults, wanted.baseline)
            failed, replies = sum("error" in entry for entry in entries.values()), dict[int, Reply]()
            told.add(failed, 0)
            for place, reply in write(
                engine, rows, wanted.batch_size, cancel, hits=wanted.hits > 0, stop_strings=wanted.ends
            ):
                replies[place] = reply
                told.add(not rows[place].baseline, len(reply.events))
            if len(replies) < len(rows):
                return
            for place, row in enumerate(rows):
                found, own = reply_entry(replies[place], engine, wanted), entries[row.request.line]
                own |= {"baseline": found} if row.baseline else found
                if wanted.baseline and not steers(row.request.steering):
                    own["baseline"] = found
            tokens = sum(len(reply.events) for reply in replies.values())
            results.add([one_line(entry) for entry in entries.values()], failed, tokens)
            if cancel.is_set() and results.state.lines < results.state.total:
                return
    finally:
        told.clear()
    narrate(told.line())


def reply_entry(reply: Reply, engine: Engine, wanted: Wanted) -> Entry:
    """The columns of one reply."""
    assert reply.finished is not None
    entry: Entry = {"text": reply.text, "tokens": [event.token for event in reply.events]}
    entry |= {"finish": reply.finished.finish, "seed": reply.finished.seed}
    entry |= {"report": report_entry(reply.finished.report)}
    if wanted.logprobs:
        entry["logprobs"] = [event.logprob for event in reply.events]
    if wanted.hits:
        kept = [event.hits[: wanted.hits] for event in reply.events]
        names = engine.labels(sorted({hit.latent for some in kept for hit in some}))
        entry["hits"] = [[hit_entry(hit, names) for hit in some] for some in kept]
    return entry


@dataclass(slots=True)
class Told:
    """How far a run has come, on stderr: a line that changes on a terminal, else one now and then."""

    total: int
    before: int
    """Lines that an earlier run has written."""
    lines: int = 0
    tokens: int = 0
    _began: float = field(default_factory=time.monotonic)
    _last: float = field(default_factory=time.monotonic)

    def add(self, lines: int, tokens: int) -> None:
        """Count what is done, and tell it when it is time."""
        self.lines, self.tokens, now = self.lines + lines, self.tokens + tokens, time.monotonic()
        shown = sys.stderr.isatty()
        if now - self._last >= (0.2 if shown else TELL_EVERY):
            self._last = now
            if shown:
                width = shutil.get_terminal_size().columns - 1
                print(f"\r{self.line()[:width]}\x1b[K", end="", file=sys.stderr, flush=True)
            else:
                narrate(self.line())

    def clear(self) -> None:
        """Leave the terminal's line to others."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def line(self) -> str:
        """Lines done, tokens a second of this run, and the time that the rest will take at its pace."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        text = f"{self.before + self.lines} of {self.total} lines, {self.tokens / seconds:.0f} tokens/s"
        left = self.total - self.before - self.lines
        if not (self.lines and left):
            return text
        wait = round(left * seconds / self.lines)
        return f"{text}, {wait // 3600}:{wait // 60 % 60:02}:{wait % 60:02} left"


def _options(settings: Settings, steering: SteeringSet, labelled: bool) -> dict[str, Any]:
    """What of the settings a result depends on, by flag; of files also what tells that they have changed. Labels count
    where results hold them (`labelled`)."""
    names = ("model", "device", "dtype", "quantize", "quantize_all", "chat_format", "compile", "threads")
    drawn = ("seed", "max_tokens", "system", *SAMPLING)
    options = {f"--{name.replace('_', '-')}": getattr(settings, name) for name in (*names, *drawn)}
    saes = [settings.sae, *settings.more_saes] if settings.sae else []
    paths = (settings.model, *saes, *(edit.file for edit in steering.edits))
    files = {f"the state of {path}": _stamp(Path(path)) for path in filter(None, paths)}
    if labelled and settings.labels:
        files |= {"--labels": settings.labels, "the labels in it": _stamp_labels(Path(settings.labels))}
    return options | {"--sae": saes} | files


def _stamp(path: Path) -> str:
    """Eight digits that change with the name, size or date of a file, or of one in a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


def _stamp_labels(path: Path) -> str:
    """Eight digits that change with the labels of an index alone: opening one may write to it, and so may others."""
    from labels.index import LabelIndex

    digest = hashlib.sha256()
    with LabelIndex(path, read_only=not os.access(path, os.W_OK)) as index:
        for label in index.all_labels():
            digest.update(f"{label.latent} {label.text}\n".encode())
    return digest.hexdigest()[:8]
