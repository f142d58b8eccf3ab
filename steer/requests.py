"""A request as one line of JSON: a prompt or messages, and what of the run's own options it replaces.

    {"id": "a", "prompt": "Once", "edits": ["2229 +0.4x"], "seed": 7, "max_tokens": 64, "temperature": 0.9}
    {"id": 2, "messages": [{"role": "user", "content": "hi"}], "system": "Be brief.", "meta": {"from": "set 3"}}

Whatever is wrong with a line is a `SteerError` of that line. A key that is not known is one, so that no wish is passed
over; `meta` comes back as it was given. `null` is as good as nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from steer.edits import Edit, SteeringSet
from steer.errors import SteerError
from steer.events import clean
from steer.session import MAX_SEED, Prompt, Role, Sampling, check_max_tokens, check_seed

SAMPLING = tuple(entry.name for entry in fields(Sampling))
KEYS = ("id", "prompt", "messages", "system", "edits", "seed", "max_tokens", *SAMPLING, "meta")
_WORDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Request:
    """One reply to write."""

    line: int
    """Its line in the file, from 1."""
    name: dict[str, Any]
    """What its result begins with: `id`, the line too where it has no id, and `meta`."""
    prompt: Prompt
    steering: SteeringSet
    sampling: Sampling
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a line that says nothing else runs with."""

    sampling: Sampling
    steering: SteeringSet = field(default_factory=SteeringSet)
    seed: int | None = None
    """None: each line gets one of its own, which follows from `drawn`."""
    drawn: int = 0
    max_tokens: int = 128
    system: str | None = None
    chat: bool = False
    """Whether a prompt is a message of a chat."""


def read_object(raw: bytes) -> dict[str, Any]:
    """The object on a line; a `SteerError` for what is none."""
    try:
        entry = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SteerError(f"the line is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        where = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise SteerError(f"the line is not JSON: {where}", 'write {"id": ..., "prompt": ...}') from error
    if not isinstance(entry, dict):
        raise SteerError(f"the line is {_kind(entry)}, not an object", 'write {"id": ..., "prompt": ...}')
    return entry


def name_of(entry: dict[str, Any], line: int) -> dict[str, Any]:
    """What says in a result which request it answers; a `SteerError` for an id that is neither text nor number."""
    given = entry.get("id")
    if type(given) not in (str, int, type(None)):
        raise SteerError(f"id is {_shown(given)}", "give text or a whole number")
    name = {"id": given} | ({"line": line} if given is None else {})
    return name | ({"meta": entry["meta"]} if "meta" in entry else {})


def read_request(entry: dict[str, Any], line: int, defaults: Defaults) -> Request:
    """The request that an object makes; a `SteerError` says what of it is wrong."""
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1, 0.6)
            hint = f"did you mean `{near[0]}`?" if near else "what should only come back goes into `meta`"
            raise SteerError(f"`{clean(key)}` is no key of a request", hint)
    edits, limit, seed = _get(entry, "edits", list), _get(entry, "max_tokens", int), _get(entry, "seed", int)
    steering = defaults.steering
    if edits is not None:
        steering = replace(steering, edits=tuple(Edit.parse(_of("edits", edit, str)) for edit in edits))
    if seed is None:
        seed = _draw(defaults.drawn, line) if defaults.seed is None else defaults.seed
    return Request(
        line,
        name_of(entry, line),
        _prompt(entry, defaults),
        steering,
        _sampling(entry, defaults.sampling),
        check_seed(seed),
        check_max_tokens(defaults.max_tokens if limit is None else limit),
    )


def _prompt(entry: dict[str, Any], defaults: Defaults) -> Prompt:
    text, messages, system = _get(entry, "prompt", str), _get(entry, "messages", list), _get(entry, "system", str)
    if (text is None) == (messages is None):
        what = "neither a prompt nor messages" if text is None else "both a prompt and messages"
        raise SteerError(f"the request has {what}", 'give "prompt", or "messages" for a chat')
    if text is not None and not defaults.chat:
        if system is not None:
            raise SteerError("a system message goes with messages, not with a prompt to go on from", "or pass `--chat`")
        return Prompt(text=_whole("prompt", text))
    said: list[tuple[Role, str]] = [_message(one, place) for place, one in enumerate(messages or ())]
    if text is not None:
        said = [("user", text)]
    if not said or said[-1][0] != "user":
        last = f"end with one of the {said[-1][0]}" if said else "are none"
        raise SteerError(f"messages {last}", "the last one is the user's, which the reply answers")
    first = system if system is not None else defaults.system
    if said[0][0] == "system":
        if system is not None:
            raise SteerError("the request has a system message twice", "give `system`, or the first of the messages")
    elif first:
        said.insert(0, ("system", first))
    return Prompt(messages=tuple((role, _whole("a message", content)) for role, content in said))


def _message(message: Any, place: int) -> tuple[Role, str]:
    what = f"messages[{place}]"
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        raise SteerError(f"{what} is {_shown(message)}", 'write {"role": "user", "content": "..."}')
    role, content = message["role"], _of(f"{what} content", message["content"], str)
    if role not in get_args(Role):
        raise SteerError(f"{what} has the role {_shown(role)}", f"roles are {', '.join(get_args(Role))}")
    return role, content


def _sampling(entry: dict[str, Any], sampling: Sampling) -> Sampling:
    given: dict[str, Any] = {}
    for name in SAMPLING:
        if entry.get(name) is None:
            continue
        if name == "logit_bias":
            given[name] = tuple(_bias(pair) for pair in _get(entry, name, dict).items())
        else:
            given[name] = _get(entry, name, int if name == "top_k" else float)
    return replace(sampling, **given)


def _bias(pair: tuple[str, Any]) -> tuple[int, float]:
    token, bias = pair
    if not (token.isascii() and token.isdecimal()) or len(token) > 18:
        raise SteerError(f"logit_bias names the token {_shown(token)}", 'write {"128009": -5}, with the token\'s id')
    return int(token), _of(f"logit_bias of {token}", bias, float)


def _get(entry: dict[str, Any], name: str, kind: type) -> Any:
    """A value of a kind, or None where there is none."""
    return None if entry.get(name) is None else _of(name, entry[name], kind)


def _of(name: str, value: Any, kind: type) -> Any:
    """A value of a kind; a `SteerError` where it is of another."""
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not kind:
        raise SteerError(f"{name} is {_shown(value)}", f"it should be {_WORDS[kind]}")
    return value


def _whole(what: str, text: str) -> str:
    """`text` itself; a `SteerError` where it holds half a character, as JSON can write one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SteerError(f"{what} holds half a character, {text[error.start]!r}, at {error.start}") from error
    return text


def _draw(drawn: int, line: int) -> int:
    """The seed of a line: any from 0 to `MAX_SEED`, the same whenever the line is read again."""
    return int.from_bytes(hashlib.sha256(f"{drawn} {line}".encode()).digest()[:8], "big") % (MAX_SEED + 1)


def _kind(value: Any) -> str:
    return "null" if value is None else _WORDS.get(type(value), "true or false")


def _shown(value: Any) -> str:
    """A value as JSON writes it, cut short."""
    text = clean(json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
