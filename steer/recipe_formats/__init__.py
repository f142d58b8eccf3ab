"""Steering files of other tools, read into recipes and written from them: one file for each format.

Each reader and writer returns sentences beside its result: what was lost, with the edit and why, and what was assumed.
What a format can express comes back from it as the same edits. Files are bounded in size and damage is one sentence.
Whoever needs the SAE (its rows, its recorded max) gets it by calling `decoder`, which loads a model only then.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from steer.edits import Edit, Strength
from steer.errors import SteerError, sentence
from steer.events import clean
from steer.recipe import Line, Recipe, SAEMark
from steer.session import Sampling

FORMATS = {
    "lm-eval": "lm_eval",
    "gguf": "control_vector",
    "neuronpedia": "neuronpedia",
    "goodfire": "goodfire",
}
"""What a format is called on the command line, and its module here."""
LARGEST = 1 << 22
"""Bytes of a text file; the longest known is a preset of a few thousand."""
MOST_EDITS = 10_000


class Decoder(Protocol):
    """What formats ask of the SAE in use."""

    def raw(self, edit: Edit) -> float:
        """What the strength of an edit comes to; `SteerError` when it cannot run here."""

    def maximum(self, edit: Edit) -> float | None:
        """The recorded max of its latent."""

    def row(self, edit: Edit) -> Sequence[float]:
        """What a strength of 1 adds: the latent's decoder direction, or that of its file."""

    def along_bias(self, edit: Edit) -> float:
        """How far the decoder's bias reaches along the latent's direction, b_dec . d / |d|."""

    def scaled(self, edit: Edit) -> bool:
        """Whether its SAE scales what it adds by each token's size, which no other tool does."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a person said on the command line beside the file."""

    hook: str = ""
    """Where the edits act, for files that do not say or are not believed."""
    sae_name: str = ""
    """What the tool calls the SAE."""
    strength: Strength = field(default_factory=lambda: Strength(1.0, "max"))
    """Of features that come without one."""
    coefficient: float = 1.0
    """Of a control vector."""


@dataclass(slots=True)
class Read:
    """A recipe that was read, and what there is to say about it."""

    recipe: Recipe
    notes: list[str]


@dataclass(slots=True)
class Written:
    """A file's content, and what there is to say about it."""

    content: bytes
    notes: list[str]
    entries: int
    """How many edits, or layers with a direction, it holds; a file of none is not worth writing."""


class Format(Protocol):
    """The module of a format."""

    TITLE: str
    READS: Collection[str]
    """The fields of `Asked` that reading heeds."""
    WRITES: Collection[str]

    def read(self, path: Path, asked: Asked, decoder: Callable[[], Decoder]) -> Read: ...

    def write(self, recipe: Recipe, asked: Asked, decoder: Callable[[], Decoder]) -> Written: ...


def find_format(name: str | None, file: str, what: str) -> Format:
    """The format of a name, else of what a file is called; `SteerError` when neither tells."""
    if name is None:
        suffix = Path(file).suffix.lower()
        links = "neuronpedia.org/" in file
        name = "neuronpedia" if links else {".csv": "lm-eval", ".gguf": "gguf"}.get(suffix)
        if name is None and suffix == ".json" and what == "read":
            data = read_json(Path(file))
            fields = data if isinstance(data, dict) else {}
            name = "goodfire" if {"edits", "interventions", "scopes"} & fields.keys() else "neuronpedia"
        elif name is None and suffix in (".txt", ".md") and what == "read":
            name = "neuronpedia"
    if name not in FORMATS:
        flag = "--from" if what == "read" else "--to"
        told = f"`{clean(name)}` is no format" if name else f"nothing tells the format of `{clean(file)}`"
        raise SteerError(told, f"pass `{flag}` with one of {', '.join(FORMATS)}")
    module: Any = importlib.import_module(f"steer.recipe_formats.{FORMATS[name]}")
    return module  # type: ignore[no-any-return]  # a module with the functions of `Format`


def read_text(path: Path) -> str:
    """The text of a file of others; `SteerError` when it is none, or too large."""
    try:
        if path.stat().st_size > LARGEST:
            raise SteerError(f"`{path}` has more than {LARGEST:,} bytes, and no steering file is so large")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SteerError(f"`{path}` cannot be read: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise SteerError(f"`{path}` is no text") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise SteerError(f"`{path}` is no JSON: {sentence(error)}") from error


def as_number(value: object, what: str) -> float:
    """A finite number, also from text; `SteerError` names what is none."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SteerError(f"{what} is {clean(repr(value))[:60]}, and should be a number")
    return number


def as_latent(value: object, what: str) -> int:
    """The number of a latent, also from text."""
    number = as_number(value, what)
    if number != int(number) or not 0 <= number < 10**12:
        raise SteerError(f"{what} is {clean(repr(value))[:60]}, and a latent is a whole number from 0")
    return int(number)


def round_off(number: float) -> float:
    """A number without the last digits, which arithmetic there and back leaves behind."""
    return float(f"{number:.12g}")


def canonical(hook: str) -> str:
    """A hook point in our spelling; ValueError for none."""
    from llama_3.hooks import HookPoint

    return str(HookPoint.parse(hook))


def imported(path: Path | str, title: str, lines: Sequence[Line], marks: Sequence[SAEMark], **given: Any) -> Recipe:
    """The recipe of what was read; `SteerError` for more edits than are read, and for a setting that cannot be."""
    if len(lines) > MOST_EDITS:
        raise SteerError(f"`{path}` holds {len(lines):,} edits, and at most {MOST_EDITS:,} are read")
    given = {"name": clean(Path(path).stem), "notes": f"from the {title} {clean(Path(path).name)}"} | given
    try:
        return Recipe(tuple(lines), saes=tuple(marks), **given)
    except SteerError as error:
        raise SteerError(f"`{path}` cannot be used: {error}", error.hint) from error


# -- what a format cannot express --------------------------------------------------------------------------------


def raw_of(line: Line, decoder: Callable[[], Decoder], notes: list[str]) -> float:
    """What the strength of an edit comes to: as written, as the recipe holds it, else with the SAE in use; a sentence
    in `notes` where that is not as written."""
    strength = line.edit.strength
    assert strength is not None
    if strength.unit == "raw":
        return strength.number
    raw = line.raw if line.raw is not None else decoder().raw(line.edit)
    where = "where the recipe was made" if line.raw is not None else "with the SAE in use"
    notes.append(f"changed: `{line.edit}`: {strength} comes to {raw:.6g} {where}: it is raw in the file")
    return raw


def place_of(recipe: Recipe, edit: Edit) -> str:
    """Where an edit acts; in a set that edits special tokens too, `all` is `all+special`."""
    return "all+special" if recipe.special_tokens and edit.place == "all" else edit.place


def why_not(
    recipe: Recipe, edit: Edit, kinds: Collection[str], clauses: Collection[str] = (), hooked: bool = True
) -> str | None:
    """Why a format without conditions, schedules and places cannot express an edit: its kind, a clause, where it acts
    (`hooked`, its hook point has to be known); None when it can."""
    if edit.muted:
        return "it is muted"
    if edit.kind not in kinds:
        return f"the format has no `{edit.kind}`"
    for name, said, what in (
        ("if_on", "if on", "restriction to tokens where the latent is active"),
        ("when", str(edit.when), "condition"),
        ("lasts", f"for {edit.lasts}", "end"),
        ("ramp", f"ramp {edit.ramp}", "schedule"),
        ("decay", f"decay {edit.decay}", "schedule"),
    ):
        if getattr(edit, name) and name not in clauses:
            return f"the format has no {what} (`{said}`)"
    if (place := place_of(recipe, edit)) not in ("all", "all+special"):
        return f"the format does not tell tokens apart, and it acts on {place}"
    return "nothing says where it acts: give it `at HOOK`" if hooked and not recipe.hook_of(edit) else None


def left_out(edit: Edit, why: str) -> str:
    """The note on an edit that a format cannot express."""
    return f"left out: `{edit}`: {why}"


def special_note(edit: Edit) -> str:
    """The note on an edit that acts on more tokens once it is exported."""
    return f"changed: `{edit}` leaves the first token and special ones alone, the file acts on them too"


def unsaid(recipe: Recipe, carried: Collection[str] = ()) -> list[str]:
    """A sentence on the settings that a format does not carry, as far as they are not ours by default."""
    notes = []
    if recipe.error == "drop":
        notes.append("left out: `error = drop`: other tools keep the SAE's reconstruction error")
    usual = asdict(Sampling())
    names = [name for name, value in recipe.settings.items() if name not in carried and usual.get(name) != value]
    if names:
        notes.append(f"left out: {', '.join(names)}: the format has no place for {'it' if len(names) == 1 else 'them'}")
    return notes
