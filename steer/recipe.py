"""A recipe: a steering set with all that its replies depend on but the prompt, as one TOML file that people can read.

    format = "steer-recipe"         name, created, notes; error, special_tokens; system, seed, max_tokens
    [[edit]]                        the edit as written, muted or not; what its strength came to, and its latent's max
    [sampling]                      temperature and the rest, as far as they were given
    [model]  [[sae]]                what it was made with (`steer/made_with.py` says what differs here)

Nothing but `format` and `version` has to be there: a recipe written by hand is three lines. A key that is not known, a
value of another type and a number that cannot be are refused by name, since a setting that is silently left out would
be another recipe. The files of vectors are meant from the recipe's own folder. Written whole or not at all.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from steer.edits import Edit, SteeringSet
from steer.errors import SteerError, sentence
from steer.events import CONTROL, clean
from steer.files import write_whole
from steer.session import Sampling, check_max_tokens, check_seed

FORMAT, VERSION = "steer-recipe", 1
LARGEST = 1 << 20
"""Bytes; a recipe of a thousand edits has a tenth of it."""

_OTHERS = "`steer recipe import` makes a recipe of what other tools wrote"

Table = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line:
    """One edit of a recipe, and what it meant where the recipe was made."""

    edit: Edit
    raw: float | None = None
    """What its strength came to; None where that was not known, and for edits without a strength in units."""
    max: float | None = None
    """The max that was recorded of its latent."""
    above: float | None = None
    """What the strength of its condition came to."""
    sha256: str = ""
    """Of the file of a vector."""
    label: str = ""
    """What its latent was called."""


@dataclass(frozen=True, slots=True)
class ModelMark:
    """The model that a recipe was made with."""

    name: str = ""
    sha256: str = ""
    """`made_with.model_hash`, or empty."""
    tokenizer: str = ""
    """`made_with.tokenizer_hash`, or empty."""
    width: int | None = None
    layers: int | None = None
    dtype: str = ""
    device: str = ""
    """cpu, cuda or mps: replies may round apart between them."""


@dataclass(frozen=True, slots=True)
class SAEMark:
    """One of the SAEs that a recipe was made with; the first is meant by edits that name no hook point."""

    hook: str
    sha256: str = ""
    """Of its weights' file."""
    d_sae: int | None = None
    d_in: int | None = None
    kind: str = ""
    """Its activation function, with its k where it has one."""
    names: tuple[str, ...] = ()
    """What others call it: `neuronpedia:MODEL/SOURCE`, `sparsify:REPO`, `sae_lens:RELEASE/ID`, `goodfire:MODEL`."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A steering set, how replies are drawn, and what it was made with."""

    lines: tuple[Line, ...] = ()
    error: Literal["keep", "drop"] = "keep"
    special_tokens: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that are given; the others are left to the model."""
    seed: int | None = None
    max_tokens: int | None = None
    system: str | None = None
    name: str = ""
    created: str = ""
    notes: str = ""
    steer: str = ""
    """The version that wrote it."""
    model: ModelMark | None = None
    saes: tuple[SAEMark, ...] = ()

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_seed(self.seed)
        if self.max_tokens is not None:
            check_max_tokens(self.max_tokens)
        Sampling(**self.sampling)

    @classmethod
    def of(cls, *edits: Edit, **given: Any) -> Recipe:
        """A recipe of edits, without what they meant anywhere."""
        return cls(tuple(Line(edit) for edit in edits), **given)

    @property
    def steering(self) -> SteeringSet:
        return SteeringSet(tuple(line.edit for line in self.lines), self.error, self.special_tokens)

    @property
    def settings(self) -> dict[str, Any]:
        """What it gives of `Settings`."""
        given = dict(self.sampling) | {"seed": self.seed, "max_tokens": self.max_tokens, "system": self.system}
        return {name: value for name, value in given.items() if value is not None}

    def hook_of(self, edit: Edit) -> str:
        """Where an edit of it acts, as written; empty where nothing says so."""
        return edit.hook or (self.saes[0].hook if self.saes else "")

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe in a file; a `SteerError` names the key and the value that is wrong with it."""
        try:
            if path.stat().st_size > LARGEST:
                raise SteerError(f"`{path}` is no recipe: it has more than {LARGEST:,} bytes")
            text = path.read_bytes().decode()
        except OSError as error:
            raise SteerError(f"the recipe `{path}` cannot be read: {error.strerror}", "check the path") from error
        except UnicodeDecodeError as error:
            raise SteerError(f"`{path}` is no recipe: it is not text") from error
        try:
            recipe = cls.parse(text)
        except SteerError as error:
            raise SteerError(f"the recipe `{path}` cannot be used: {error}", error.hint) from error
        return recipe._with_files(lambda file: str(path.parent / Path(os.path.expanduser(file))))

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all; `SteerError` when it cannot be written."""
        here = path.parent.absolute()

        def as_seen_from_here(file: str) -> str:
            whole = Path(os.path.abspath(Path(os.path.expanduser(file))))
            return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(whole)

        write_whole(path, self._with_files(as_seen_from_here).text().encode())

    def _with_files(self, named: Callable[[str], str]) -> Recipe:
        """The same with the files of its vectors named otherwise."""
        lines = [
            replace(line, edit=replace(line.edit, file=named(line.edit.file))) if line.edit.file else line
            for line in self.lines
        ]
        return replace(self, lines=tuple(lines))

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe that a text of TOML holds."""
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise SteerError(f"it is no TOML: {sentence(error)}", _OTHERS) from error
        if data.pop("format", None) != FORMAT:
            raise SteerError(f'it does not say `format = "{FORMAT}"`', _OTHERS)
        version = data.pop("version", None)
        if type(version) is not int or not 1 <= version <= VERSION:
            raise SteerError(f"its version is {_shown(version)}, this steer reads up to {VERSION}", "update steer")
        lines = tuple(_line(entry, number) for number, entry in enumerate(_tables(data, "edit"), 1))
        saes = tuple(_build(SAEMark, entry, "[[sae]]") for entry in _tables(data, "sae"))
        model = _build(ModelMark, _table(data, "model"), "[model]") if "model" in data else None
        sampling = _sampling(_table(data, "sampling"))
        rest = {key: value for key, value in data.items() if key not in ("edit", "sae", "model", "sampling")}
        return _build(cls, rest, "", lines=lines, saes=saes, model=model, sampling=sampling)

    def text(self) -> str:
        """It as TOML."""
        own = {name: getattr(self, name) for name in ("name", "created", "steer", "notes")}
        own = {name: value for name, value in own.items() if value}
        own |= {"error": self.error, "special_tokens": self.special_tokens}
        own |= {name: getattr(self, name) for name in ("system", "seed", "max_tokens")}
        blocks = [_keys({"format": FORMAT, "version": VERSION} | own)]
        for line in self.lines:
            written = {"edit": str(replace(line.edit, muted=False)), "muted": line.edit.muted or None}
            blocks.append("[[edit]]\n" + _keys(written | _told(line)))
        if self.sampling:
            blocks.append("[sampling]\n" + _keys(self.sampling))
        if self.model:
            blocks.append("[model]\n" + _keys(_told(self.model)))
        blocks += ["[[sae]]\n" + _keys(_told(sae)) for sae in self.saes]
        return "\n\n".join(blocks) + "\n"


# -- reading -----------------------------------------------------------------------------------------------------

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list of texts"}


def _shown(value: object) -> str:
    return clean(repr(value))[:60]


def _table(data: Table, name: str) -> Table:
    value = data.get(name, {})
    if not isinstance(value, dict):
        raise SteerError(f"`{name}` is {_shown(value)}, but it should be a table `[{name}]`")
    return value


def _tables(data: Table, name: str) -> list[Table]:
    value = data.get(name, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise SteerError(f"`{name}` is {_shown(value)}, but it should be tables `[[{name}]]`")
    return value


def _build(kind: type[T], data: Table, where: str, **made: Any) -> T:
    """A dataclass from a table: unknown keys and values of another type than its fields' are refused."""
    wanted = {name: hint for name, hint in get_type_hints(kind).items() if name not in made}
    known = [entry.name for entry in fields(kind) if entry.name not in made]  # type: ignore[arg-type]  # a dataclass
    for key in data:
        if key not in known:
            raise _unknown(key, where, [*known, *(("edit", "sae", "model", "sampling") if kind is Recipe else ())])
    values = {key: _typed(value, wanted[key], _at(key, where)) for key, value in data.items()}
    if kind is SAEMark and not values.get("hook"):
        raise SteerError(f"`hook` of {where} is missing")
    return kind(**values, **made)


def _unknown(key: str, where: str, known: list[str]) -> SteerError:
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
    return SteerError(f"{_at(key, where)} is no key that is known", hint)


def _at(key: str, where: str) -> str:
    return f"`{clean(key)}`" + (f" of {where}" if where else "")


def _typed(value: Any, wanted: Any, what: str) -> Any:
    kinds = get_args(wanted)
    if kinds and all(isinstance(kind, str) for kind in kinds):  # a Literal
        if value not in kinds:
            raise SteerError(f"{what} is {_shown(value)}, and it may be {' or '.join(kinds)}")
        return value
    if str(wanted).startswith("tuple"):
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise SteerError(f"{what} is {_shown(value)}, but it should be {_WORDS[tuple]}")
        return tuple(value)
    kind = next(kind for kind in (kinds or (wanted,)) if kind is not type(None))
    if kind is float and type(value) is int and abs(value) < 10**300:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise SteerError(f"{what} is {_shown(value)}, but it should be {_WORDS[kind]}")
    return value


def _line(data: Table, number: int) -> Line:
    where, data = f"edit {number}", dict(data)
    muted = _typed(data.pop("muted", False), bool, f"`muted` of {where}")
    written = _typed(data.pop("edit", ""), str, f"`edit` of {where}")
    if not written:
        raise SteerError(f"{where} does not say `edit`", 'write `edit = "2229 +0.4x"`')
    return _build(Line, data, where, edit=replace(Edit.parse(written), muted=muted))


def _sampling(data: Table) -> Table:
    wanted, read = get_type_hints(Sampling), {}
    for name, value in data.items():
        what = f"`{name}` of [sampling]"
        if name not in wanted:
            raise _unknown(name, "[sampling]", list(wanted))
        if name != "logit_bias":
            read[name] = _typed(value, wanted[name], what)
            continue
        try:
            pairs = tuple((token, float(bias)) for token, bias in value)
        except (TypeError, ValueError, OverflowError) as error:
            raise SteerError(f"{what} is {_shown(value)}, but it should be pairs `[[128009, -5.0]]`") from error
        if not all(type(token) is int for token, _ in pairs):
            raise SteerError(f"{what} is {_shown(value)}, and a token id is a whole number")
        read[name] = pairs
    return read


# -- writing -----------------------------------------------------------------------------------------------------


def _told(mark: Line | ModelMark | SAEMark) -> Table:
    """The fields of a mark that say something."""
    named = {entry.name: getattr(mark, entry.name) for entry in fields(mark) if entry.name != "edit"}
    return {name: value for name, value in named.items() if value not in ("", ())}


def _keys(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} = {_value(value)}" for name, value in table.items() if value is not None)


def _value(value: Any) -> str:
    """A value as TOML; what a terminal would obey stands escaped, so that the file may be printed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)  # `inf` and `nan` too are TOML's own
    if isinstance(value, str):
        quoted = json.dumps(value.encode("utf-8", "replace").decode(), ensure_ascii=False)
        return re.sub(CONTROL, lambda match: f"\\u{ord(match[0]):04x}", quoted)
    return "[" + ", ".join(_value(each) for each in value) + "]"
