"""`steer complete`: text goes on from where it stops. Several prompts are rows of one batch."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer

from steer.batch import steers
from steer.cli import engines
from steer.cli.options import (
    Chat,
    Edits,
    Error,
    Json,
    RecipeFile,
    command,
    given_text,
    narrate,
    put,
    put_row,
    steering_set,
)
from steer.compare import Comparison, compare
from steer.config import Settings
from steer.edits import SteeringSet
from steer.errors import EXPLAINED, ExitCode, SteerError, sentence
from steer.events import Event, Failed, Finished, LatentHit, Report, TokenEvent, clean, clean_line, counted
from steer.session import MAX_SEED, EngineLike, Prompt, Role, check_max_tokens

DEFAULT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the replies to all prompts have in common."""

    settings: Settings
    limit: int
    """The most tokens of a reply."""
    ends: tuple[str, ...]
    hits: int
    json: bool


@dataclass(slots=True)
class Row:
    """One prompt and what came of it."""

    prompt: str
    seed: int
    events: list[TokenEvent] = field(default_factory=list)
    finished: Finished | None = None
    failed: str | None = None

    @property
    def text(self) -> str:
        shown = "".join(event.text for event in self.events if not event.special)
        return shown + (self.finished.text if self.finished else "")


@command(sampled=True)
def complete(
    settings: Settings,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Several are one batch; without any, one a line on stdin.", metavar="PROMPT..."),
    ] = None,
    edit: Edits = None,
    recipe: RecipeFile = None,
    error: Error = None,
    chat: Chat = False,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; repeatable.", metavar="TEXT")
    ] = None,
    beside: Annotated[
        bool, typer.Option("--compare", help="Write each reply without and with the edits, and say what differs.")
    ] = False,
    spliced: Annotated[
        bool, typer.Option("--spliced", help="Compare also with what the SAEs alone do: no edit, their errors dropped.")
    ] = False,
    hits: Annotated[int, typer.Option(help="Features of each token in --json, the N strongest.", metavar="N")] = 0,
    json: Json = False,
) -> int:
    """Go on from a text."""
    steering, ends = steering_set(edit, error, recipe), tuple(stop or ())
    if hits < 0 or (hits and not json):
        raise SteerError(f"--hits is {hits}", "give a number of features, with --json")
    if "" in ends:
        raise SteerError("--stop is empty", "give the text that a reply should end before")
    texts = prompts or []
    if texts in ([], ["-"]):
        texts = [line for line in given_text("-" if texts else None, "prompt").splitlines() if line.strip()]
    many = beside or spliced or len(texts) > 1
    engine = engines.make_engine(settings, chat=chat, recipe=recipe, many=many)
    engines.check_edits(engine, steering)
    context = engine.info.context
    limit = (
        min(DEFAULT_TOKENS, context) if settings.max_tokens is None else check_max_tokens(settings.max_tokens, context)
    )
    seeds = [random.SystemRandom().randint(0, MAX_SEED) if settings.seed is None else settings.seed for _ in texts]
    head: tuple[tuple[Role, str], ...] = (("system", settings.system),) if settings.system else ()
    asks = [Prompt(messages=(*head, ("user", text))) if chat else Prompt(text=text) for text in texts]
    wanted = Wanted(settings, limit, ends, hits, json)
    if beside or spliced:
        sets = {"baseline": SteeringSet(), "steered": steering}
        sets |= {"spliced": SteeringSet(error="drop")} if spliced else {}
        if not (steering.live or steering.error == "drop"):
            none = "all edits are muted" if steering.edits else "no edit is given"
            narrate(f"{none}: the steered reply is the baseline")
        return _compare_replies(engine, list(zip(texts, asks, seeds, strict=True)), sets, wanted)
    rows = [Row(text, seed) for text, seed in zip(texts, seeds, strict=True)]
    live = len(rows) == 1 and not json and sys.stdout.isatty()
    with engines.interruptible() as cancel:
        events = _events(engine, asks, [steering] * len(asks), seeds, wanted, cancel, hits=hits > 0)
        _follow(events, rows, live, lambda row: _show(row, engine, steering, wanted, live=live, many=len(rows) > 1))
    if any(row.failed for row in rows):
        return ExitCode.MISTAKE
    return ExitCode.INTERRUPTED if cancel.is_set() else ExitCode.DONE


def _compare_replies(
    engine: EngineLike, asks: Sequence[tuple[str, Prompt, int]], sets: dict[str, SteeringSet], wanted: Wanted
) -> int:
    """The reply to each (text, prompt, seed) with each set, the baseline's being empty: in one batch, with one seed."""
    many = len(asks) > 1
    with engines.interruptible() as cancel:
        for text, ask, seed in asks:
            if cancel.is_set():
                break
            rows = [Row(text, seed) for _ in sets]
            prompts, seeds, watched = [ask] * len(rows), [seed] * len(rows), range(1, len(rows))
            events = _events(engine, prompts, list(sets.values()), seeds, wanted, cancel, hits=True, watch=watched)
            _follow(events, rows, False, lambda row: None)
            if any(row.failed for row in rows):  # what there is of them is not compared
                for name, row, used in zip(sets, rows, sets.values(), strict=True):
                    if wanted.json:
                        put(_entry(row, engine, used, wanted.hits) | {"row": name})
                    elif row.text:
                        print(f"{name}:\n{clean(row.text)}\n", flush=True)
                return ExitCode.MISTAKE
            if many and not wanted.json:
                print(f"prompt: {clean_line(text)}\n")
            for name, row, used in zip(sets, rows, sets.values(), strict=True):
                found = compare(rows[0].events, row.events)
                if wanted.json:
                    entry = _entry(row, engine, used, wanted.hits) | {"row": name}
                    put(entry if name == "baseline" else entry | comparison_entry(found, row.events, engine))
                    continue
                print(f"{name}:\n{clean(row.text)}\n", flush=True)
                if name == "baseline":
                    continue
                both = min(len(rows[0].events), len(row.events))
                for line in (
                    *comparison_lines(found, engine, name, both),
                    *(report_lines(row.finished.report) if row.finished and steers(used) else ()),
                    "",
                ):
                    put_row(line)
            if not wanted.json:
                ends = (f"{name} {_end(row)}" for name, row in zip(sets, rows, strict=True))
                narrate(f"seed {seed}; {'; '.join(ends)}")
    return ExitCode.INTERRUPTED if cancel.is_set() else ExitCode.DONE


def _events(
    engine: EngineLike,
    asks: list[Prompt],
    sets: list[SteeringSet],
    seeds: list[int],
    wanted: Wanted,
    cancel: threading.Event,
    *,
    hits: bool,
    watch: Sequence[int] = (),
) -> Iterable[Event]:
    """The engine's stream, its errors as `Failed` too: a batch that breaks still tells what it has."""
    try:
        yield from engine.stream(
            asks,
            sets,
            sampling=wanted.settings.sampling(engine.defaults),
            seeds=seeds,
            max_tokens=wanted.limit,
            stop=cancel,
            hits=hits,
            alternatives=0,
            stop_strings=wanted.ends,
            watch=watch,
        )
    except EXPLAINED as error:
        yield Failed(sentence(error), getattr(error, "hint", None))


def _follow(events: Iterable[Event], rows: list[Row], live: bool, show: Any) -> None:
    """Fills the rows; each is shown when it and all before it are done."""
    shown = 0
    for event in events:
        match event:
            case TokenEvent():
                rows[event.row].events.append(event)
                if live and not event.special:
                    print(clean(event.text), end="", flush=True)
            case Finished():
                rows[event.row].finished = event
            case Failed():
                narrate(f"error: {clean(event.message)}" + (f"\n\nhint: {clean(event.hint)}" if event.hint else ""))
                for row in rows:
                    row.failed = None if row.finished else event.message
            case _:
                pass
        while shown < len(rows) and (rows[shown].finished or rows[shown].failed):
            show(rows[shown])
            shown += 1


def _show(row: Row, engine: EngineLike, steering: SteeringSet, wanted: Wanted, *, live: bool, many: bool) -> None:
    if wanted.json:
        put(_entry(row, engine, steering, wanted.hits))
        return
    if row.failed is None or (row.text and not live):
        print(
            clean(row.finished.text) if live and row.finished else clean(row.text),
            end="\n\n" if many else "\n",
            flush=True,
        )
    if row.finished:
        narrate(f"seed {row.seed}, {_end(row)}")
        for line in report_lines(row.finished.report) if steers(steering) else ():
            narrate(line)


def _end(row: Row) -> str:
    """How long a reply is, and why it ends."""
    return counted(len(row.events), "token") + (f", {row.finished.finish}" if row.finished else "")


def _entry(row: Row, engine: EngineLike, steering: SteeringSet, hits: int) -> dict[str, Any]:
    """The JSON object of a reply."""
    entry: dict[str, Any] = {"prompt": row.prompt, "text": row.text, "tokens": [event.token for event in row.events]}
    entry |= {"finish": row.finished.finish if row.finished else None, "seed": row.seed}
    entry |= {"edits": [str(edit) for edit in steering.edits]}
    entry |= {"report": report_entry(row.finished.report) if row.finished else None}
    if hits > 0:
        kept = [event.hits[:hits] for event in row.events]
        names = engine.labels(sorted({hit.latent for some in kept for hit in some}))
        entry["hits"] = [[hit_entry(hit, names) for hit in some] for some in kept]
    return entry | ({"error": row.failed} if row.failed else {})


def hit_entry(hit: LatentHit, names: dict[int, str]) -> dict[str, Any]:
    """One active latent as JSON: `latent`, `activation`, `label`."""
    activation = float(f"{hit.activation:.6g}")
    return {"latent": hit.latent, "activation": activation, "label": names.get(hit.latent, "")}


def report_entry(report: Report) -> dict[str, Any]:
    """The engine's report as JSON."""
    return asdict(report) | {"steered": report.steered}


def report_lines(report: Report) -> list[str]:
    """The engine's report for a person."""
    ran = f"the set ran in {report.applied} of {counted(report.steps, 'step')}"
    if not report.steered and report.applied:
        ran = f"no edit met its place or condition in {counted(report.steps, 'step')}"
    edited = any(edit.positions for edit in report.edits)
    lines = [f"{'steered' if edited else 'error dropped' if report.dropped else 'not steered'}: {ran}"]
    if report.dropped:
        lines.append(f"  the error was dropped at {counted(report.dropped, 'position')}")
    for edit in report.edits:
        change = (
            "" if edit.before is None or edit.after is None else f", activation {edit.before:.3g} -> {edit.after:.3g}"
        )
        lost = f", left its latent off at {edit.lost}" if edit.lost else ""
        lines.append(f"  {clean(edit.text)}: at {counted(edit.positions, 'position')}{change}{lost}")
    if len(report.carried) > 1:
        lines += [f"  from position {one.first}: {clean(', '.join(one.edits)) or 'no edit'}" for one in report.carried]
    return lines


def comparison_entry(found: Comparison, events: Sequence[TokenEvent], engine: EngineLike) -> dict[str, Any]:
    """What differs from the baseline, as JSON; `kl` and `surprisal` have a number for each token."""
    names = engine.labels([change.latent for change in found.changed])
    return {
        "kl": [event.kl for event in events],
        "surprisal": [event.surprisal for event in events],
        "comparison": asdict(found)
        | {"changed": [asdict(one) | {"label": names.get(one.latent, "")} for one in found.changed]},
    }


def comparison_lines(found: Comparison, engine: EngineLike, name: str, both: int) -> list[str]:
    """What differs from the baseline, for a person; `name` is the reply's, and `both` replies have so many tokens."""
    at = "none" if found.first_difference is None else f"{found.first_difference} (from 0)"
    lines = [f"first token that differs: {at}; {found.same} of {both} are the same, place by place"]
    if found.kl is not None and found.perplexity is not None:
        lines += [
            f"KL({name} | unsteered): {found.kl:.2f} nats a token",
            f"perplexity under the unsteered model: {found.perplexity:.1f} (baseline {found.baseline_perplexity:.1f})",
            f"4-grams repeated: {found.repeats:.0%} (baseline {found.baseline_repeats:.0%})",
        ]
    if found.changed:
        lines.append("features that changed most, by mean activation:")
    names = engine.labels([change.latent for change in found.changed])
    for one in found.changed:
        means = f"{one.difference:>+8.2f}  {one.baseline:>7.2f} -> {one.steered:>6.2f}"
        lines.append(f"  {one.latent:>6} {means}  {clean_line(names.get(one.latent, ''))}".rstrip())
    return lines
