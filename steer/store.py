"""Sessions on disk: one versioned JSON file each, written whole or not at all.

A file holds the turns, every reply with its token events and steering timeline, and the settings they were made with.
Edits stand there as people write them. Numbers are rounded to six digits, far below what a view can show. A token of a
prompt that the reply before it had already read is stored as 0: a long chat would else hold its beginning many times.

Files may come from elsewhere: everything read is converted to the type it should have, all of it before the session is
touched, and nothing in a name leads out of the folder.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from steer.edits import Edit, SteeringSet
from steer.errors import SteerError
from steer.events import (
    Alternative,
    Carried,
    EditReport,
    Failed,
    Finished,
    LatentHit,
    PromptRead,
    Report,
    TokenEvent,
    clean,
)
from steer.files import write_whole
from steer.session import Mode, Reply, Role, Sampling, Session, Turn, check_max_tokens, check_seed

FORMAT = "steer-session"
VERSION = 1
LAST = "last"
"""Names the session that was saved last."""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version n -> what turns a snapshot of version n into one of version n + 1."""

Json = dict[str, Any]


def clean_name(name: str) -> str:
    """A file name made of `name`: letters, digits, space and `._-` stay, it cannot begin with a dot or be a path."""
    kept = "".join(char if char.isalnum() or char in " ._-" else "-" for char in name).strip(" .-")[:60].rstrip(" .-")
    if not kept or kept == LAST:
        raise SteerError(f"`{clean(name)}` is no name for a session", "use letters and digits")
    return kept


class Store:
    """The sessions in a folder, which is made when the first is saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, session: Session, name: str | None = None) -> Path:
        """Writes the session under `name`, the name it has, or one made of the time; the file.

        `SteerError` when another session has the name.
        """
        name = clean_name(name or session.name or f"{time.strftime('%Y-%m-%d %H.%M.%S')} {uuid.uuid4().hex[:4]}")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json"
        if name != session.name and path.exists():
            raise SteerError(f"there is a session `{name}` already", "choose another name, or open that one")
        export(session, path)
        session.name = name
        return path

    def names(self) -> list[str]:
        """The names of all sessions, the last saved first."""
        if not self.folder.is_dir():
            return []
        found = [(path.stat().st_mtime_ns, path.stem) for path in self.folder.glob("*.json") if path.name[0] != "."]
        return [name for _, name in sorted(found, reverse=True)]

    def open(self, name: str) -> Json:
        """The snapshot of a session, of the present version; `last` is the one saved last."""
        if name == LAST and not (names := self.names()):
            raise SteerError(f"no session has been saved in `{self.folder}` yet")
        path = self.folder / f"{names[0] if name == LAST else clean_name(name)}.json"
        if not path.is_file():
            raise SteerError(f"there is no session `{clean(name)}` in `{self.folder}`", self._hint())
        try:
            data = json.loads(path.read_bytes().decode("utf-8", errors="surrogatepass"), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise SteerError(f"session `{path}` is damaged: it is not JSON ({clean(str(error))})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("version"), int):
            raise SteerError(f"`{path}` is no session of steer")
        if data["version"] > VERSION:
            raise SteerError(
                f"session `{path}` has version {data['version']}, this steer reads up to {VERSION}", "update steer"
            )
        for version in range(data["version"], VERSION):
            if version not in MIGRATIONS:
                raise SteerError(f"session `{path}` has version {version}, which never was")
            data = MIGRATIONS[version](data)
        return dict(data)

    def restore(self, name: str, session: Session) -> str | None:
        """Makes `session` what was saved. One sentence when something of it cannot be had here, else None."""
        data = self.open(name)
        if session.busy:
            raise SteerError("a reply is still being written", "stop it first")
        try:
            mode: Mode = _one_of(data["mode"], get_args(Mode))
            biases = tuple((int(token), float(bias)) for token, bias in data["sampling"].pop("logit_bias", ()))
            numbers = {key: type(getattr(Sampling(), key))(value) for key, value in data["sampling"].items()}
            sampling = Sampling(**numbers, logit_bias=biases)
            seed = None if data["seed"] is None else check_seed(int(data["seed"]))
            max_tokens = check_max_tokens(int(data["max_tokens"]))
            system = None if data["system"] is None else str(data["system"])
            steering = _steering(data["steering"])
            turns = _turns(data["turns"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, SteerError) as error:
            why = f"{clean(str(error))} is missing" if isinstance(error, KeyError) else clean(str(error))
            raise SteerError(f"session `{clean(name)}` in `{self.folder}` is damaged: {why}") from error
        session.mode, session.sampling, session.seed, session.max_tokens = mode, sampling, seed, max_tokens
        session.system, session.turns[:] = system, turns
        session.name = self.names()[0] if name == LAST else clean_name(name)
        return _resume(session, steering)

    def _hint(self) -> str | None:
        names = self.names()
        return f"there are {', '.join(f'`{clean(name)}`' for name in names[:5])}" if names else None


def _resume(session: Session, steering: SteeringSet) -> str | None:
    """Steers as far as this engine can; what had to be left out, in one sentence."""
    able, why = [], ""
    for edit in steering.edits:
        try:
            session.engine.check(edit)
            able.append(edit)
        except SteerError as error:
            why = why or str(error)
    session.steering = replace(steering, edits=tuple(able))
    lost = len(steering.edits) - len(able)
    return f"{lost} of {len(steering.edits)} edits cannot run here and were left out: {why}" if lost else None


def export(session: Session, path: Path) -> None:
    """Writes the session to a file of its own, which no store lists."""
    text = json.dumps(snapshot(session), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    write_whole(path, text.encode("utf-8", "surrogatepass"))


def snapshot(session: Session) -> Json:
    """What a file holds of a session: plain values, ready for JSON."""
    info = session.engine.info
    turns: list[Json] = []
    before: list[list[Any]] = []
    for turn in session.turns:
        entry: Json = {"role": turn.role, "content": turn.content}
        if turn.reply is not None:
            entry["reply"], before = _reply_out(turn.reply, before)
        turns.append(entry)
    return {
        "format": FORMAT,
        "version": VERSION,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "made_with": {"model": info.model, "hook": info.hook, "dtype": info.dtype, "device": info.device},
        "mode": session.mode,
        "system": session.system,
        "seed": session.seed,
        "max_tokens": session.max_tokens,
        "sampling": asdict(session.sampling) | {"logit_bias": _biases_out(session.sampling)},
        "steering": _steering_out(session.steering),
        "turns": turns,
    }


def _round(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else float(f"{number:.6g}")


def _biases_out(sampling: Sampling) -> list[list[Any]]:
    """Pairs of token and bias; -inf, which forbids a token, as a string: JSON has no such number."""
    return [[token, bias if math.isfinite(bias) else str(bias)] for token, bias in sampling.logit_bias]


def _steering_out(steering: SteeringSet) -> Json:
    return {
        "edits": [{"edit": str(edit), "muted": edit.muted} for edit in steering.edits],
        "error": steering.error,
        "special_tokens": steering.special_tokens,
        "bypass": steering.bypass,
        "factor": steering.factor,
    }


def _token_out(event: TokenEvent) -> list[Any]:
    return [
        event.index,
        event.token,
        event.text,
        int(event.special),
        [[hit.latent, _round(hit.activation)] for hit in event.hits],
        _round(event.logprob),
        _round(event.entropy),
        [[other.text, _round(other.probability)] for other in event.alternatives],
    ]


def _reply_out(reply: Reply, before: list[list[Any]]) -> tuple[Json, list[list[Any]]]:
    """A reply as plain values, and all tokens read by its end; `before` are those read by the end of the one before."""
    prompt = [_token_out(event) for event in reply.prompt.tokens] if reply.prompt else []
    tokens = [_token_out(event) for event in reply.events]
    known = [same[:5] == token[:5] for same, token in zip(before, prompt, strict=False)]
    packed = [0 if place < len(known) and known[place] else token for place, token in enumerate(prompt)]
    data: Json = {
        "seed": reply.seed,
        "steering": _steering_out(reply.steering),
        "timeline": [[count, _steering_out(steering)] for count, steering in reply.timeline],
        "prompt": {"dropped": reply.prompt.dropped, "tokens": packed} if reply.prompt else None,
        "tokens": tokens,
    }
    if end := reply.finished:
        data["finished"] = asdict(end) | {"tokens_per_second": _round(end.tokens_per_second)}
        for edit in data["finished"]["report"]["edits"]:
            edit |= {"before": _round(edit["before"]), "after": _round(edit["after"])}
    if reply.failed:
        data["failed"] = asdict(reply.failed)
    return data, prompt + tokens


def _one_of(value: object, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return value


def _steering(data: Json) -> SteeringSet:
    edits = tuple(replace(Edit.parse(entry["edit"]), muted=bool(entry["muted"])) for entry in data["edits"])
    error = _one_of(data["error"], ("keep", "drop"))
    factor = float(data.get("factor", 1.0))
    if not 0 <= factor <= 1:
        raise ValueError(f"factor {factor}")
    return SteeringSet(edits, error, bool(data["special_tokens"]), bool(data["bypass"]), factor)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _number(value: object) -> float | None:
    return None if value is None else float(str(value))


def _token(data: list[Any]) -> TokenEvent:
    index, token, text, special, hits, logprob, entropy, others = data
    return TokenEvent(
        0,
        int(index),
        int(token),
        str(text),
        bool(special),
        _number(logprob),
        _number(entropy),
        tuple(Alternative(str(other), _number(probability) or 0.0) for other, probability in others),
        tuple(LatentHit(int(latent), _number(activation) or 0.0) for latent, activation in hits),
    )


def _turns(data: list[Json]) -> list[Turn]:
    turns: list[Turn] = []
    before: list[TokenEvent] = []
    for entry in data:
        reply = None
        if "reply" in entry:
            reply = _reply(entry["reply"], before)
            before = [*(reply.prompt.tokens if reply.prompt else ()), *reply.events]
        turns.append(Turn(_one_of(entry["role"], get_args(Role)), str(entry["content"]), reply))
    return turns


def _reply(data: Json, before: list[TokenEvent]) -> Reply:
    prompt = None
    if data["prompt"] is not None:
        tokens = [
            replace(before[place], logprob=None, entropy=None, alternatives=()) if token == 0 else _token(token)
            for place, token in enumerate(data["prompt"]["tokens"])
        ]
        prompt = PromptRead(0, tuple(tokens), int(data["prompt"]["dropped"]))
    return Reply(
        int(data["seed"]),
        _steering(data["steering"]),
        [(int(count), _steering(steering)) for count, steering in data["timeline"]],
        prompt,
        [_token(token) for token in data["tokens"]],
        _finished(data["finished"]) if "finished" in data else None,
        Failed(str(data["failed"]["message"]), data["failed"]["hint"]) if "failed" in data else None,
    )


def _finished(data: Json) -> Finished:
    report = data["report"]
    edits = tuple(
        EditReport(
            str(edit["text"]),
            int(edit["positions"]),
            _number(edit["before"]),
            _number(edit["after"]),
            int(edit["lost"]),
        )
        for edit in report["edits"]
    )
    first, last = (None if report[end] is None else int(report[end]) for end in ("first", "last"))
    carried = tuple(Carried(int(one["first"]), tuple(map(str, one["edits"]))) for one in report.get("carried", ()))
    dropped = int(report.get("dropped", 0))
    return Finished(
        0,
        _one_of(data["finish"], ("stop", "length", "cancelled")),
        int(data["seed"]),
        Report(int(report["steps"]), int(report["applied"]), edits, first, last, carried, dropped),
        float(data["tokens_per_second"] or 0),
        str(data["text"]),
    )
