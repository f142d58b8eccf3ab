"""Neuronpedia: links to features, steering presets, and requests of the steering API, which have the same fields.

    {"name", "features": [{"modelId", "layer": "19-llamascope-res-32k", "index", "strength"}], "steer_method",
     "strength_multiplier", "steer_special_tokens", "temperature", "n_tokens", "freq_penalty", "seed"}

`c` is the strength times the multiplier, `d` the decoder's row as it is, u = d / |d|:

    SIMPLE_ADDITIVE     x + c d                         our `add c`
    ORTHOGONAL_DECOMP   x - (1 - c) (x . u) u           our `project`, 1 - c times, for c = 0, -1, -2 ...
    PROJECTION_CAP      (x . u) at most c               none of ours: `cap` bounds the latent, not the projection

Tokens: all of them where `steer_special_tokens` is true or not said, `all` of ours where it is false. A link has no
strength; in a file of links one may follow it. Names of fields are read in snake_case and in camelCase.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.edits import Edit, Strength
from steer.errors import SteerError, sentence
from steer.events import clean
from steer.recipe import Line, Recipe, SAEMark
from steer.recipe_formats import (
    Asked,
    Decoder,
    Read,
    Written,
    as_latent,
    as_number,
    canonical,
    imported,
    left_out,
    place_of,
    raw_of,
    read_text,
    round_off,
    special_note,
    unsaid,
    why_not,
)

TITLE = "Neuronpedia file"
READS, WRITES = frozenset({"hook", "strength"}), frozenset({"sae_name"})
LINK = re.compile(r"https?://(?:www\.)?neuronpedia\.org/([^/\s?#]+)/([^/\s?#]+)/([0-9]{1,12})(?:[?#]\S*)?")
ADDS, PROJECTS, CAPS = "SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP", "PROJECTION_CAP"
STRONGEST, MULTIPLIERS = 300, (1, 2, 4, 8)
"""The site's own bounds: what a feature's strength may be, and powers of two, by which nothing is rounded, up to its
largest multiplier of 10."""
MOST_TIMES = 8
_SETTINGS = {
    "temperature": "temperature",
    "freq_penalty": "frequency_penalty",
    "seed": "seed",
    "n_tokens": "max_tokens",
}
_OTHER = {
    "prompt",
    "model_id",
    "default_chat_messages",
    "steered_chat_messages",
    "name",
    "description",
    "alias",
    "stream",
}
"""Fields that say nothing of the set."""


def read(path: Path, asked: Asked, decoder: Callable[[], Decoder]) -> Read:
    """The recipe of a preset, of an API request, of a file of links, or of a link given in place of a path."""
    link = LINK.fullmatch(re.sub(r"^(https?:/)(?=[^/])", r"\1/", str(path)))  # a path has lost one of its slashes
    text = link[0] if link else read_text(path)
    if not text.lstrip().startswith(("{", "[")):
        named = {"name": "/".join(link.groups()), "notes": f"from {clean(text)}"} if link else {}
        return _read_links(path, text, asked, named)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SteerError(f"`{path}` is no JSON: {sentence(error)}") from error
    preset = _snake(data if isinstance(data, dict) else {"features": data})
    return _read_preset(path, preset, asked)


def _read_links(path: Path, text: str, asked: Asked, named: dict[str, str]) -> Read:
    lines, marks, notes = [], dict[str, SAEMark](), []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        match = LINK.fullmatch(words[0])
        if match is None or len(words) > 2:
            raise SteerError(
                f"line {number} of `{path}` is no link to a feature: `{clean(line)[:80]}`",
                "a link reads https://www.neuronpedia.org/MODEL/LAYER-SOURCE/INDEX, and a strength may follow",
            )
        hook = _mark(marks, match[1], match[2], asked)
        strength = Strength.parse(words[1]) if len(words) == 2 else asked.strength
        if len(words) == 1:
            notes.append(f"assumed: strength {strength} for feature {match[3]}: a link has none")
        lines.append(Line(Edit(int(match[3]), "add", strength, hook=hook)))
    return Read(imported(path, TITLE, lines, list(marks.values()), **named), notes)


def _read_preset(path: Path, preset: dict[str, Any], asked: Asked) -> Read:
    lines, marks, notes = [], dict[str, SAEMark](), []
    method = str(preset.pop("steer_method", ADDS)).upper()
    if method not in (ADDS, PROJECTS, CAPS):
        raise SteerError(f"the steer_method of `{path}` is `{clean(method)[:60]}`", f"known are {ADDS}, {PROJECTS}")
    multiplier = as_number(preset.pop("strength_multiplier", 1), f"strength_multiplier of `{path}`")
    features = preset.pop("features", None)
    if not isinstance(features, list):
        raise SteerError(f"`{path}` has no list `features`", "it reads presets and requests of the steering API")
    place = "all" if preset.pop("steer_special_tokens", True) is False else "all+special"
    if preset.pop("normalize_steering", False):
        notes.append("changed: it asks for directions of length 1, and here the decoder's rows are taken as they are")
    for place_in, entry in enumerate(features, 1):
        what = f"feature {place_in} of `{path}`"
        one = _snake(entry) if isinstance(entry, dict) else {}
        if "index" not in one:
            notes.append(f"left out: {what}: it has no index, so it is a vector or something else")
            continue
        latent = as_latent(one["index"], f"index of {what}")
        model, source = (str(one.get(name) or preset.get(name) or "") for name in ("model_id", "layer"))
        hook = _mark(marks, model, source or str(one.get("source", "")), asked)
        if one.get("strength") is None:
            strength = asked.strength
            notes.append(f"assumed: strength {strength} for feature {latent}: none is given")
        else:
            number = as_number(one["strength"], f"strength of {what}")
            strength = Strength(number * multiplier if multiplier in MULTIPLIERS else round_off(number * multiplier))
        edit = Edit(latent, "add", strength, place=place, hook=hook)
        lines += [Line(one) for one in _by_method(method, edit, notes)]
    settings: dict[str, Any] = {}
    for field, name in _SETTINGS.items():
        if (value := preset.pop(field, None)) is not None:
            told = as_number(value, f"{field} of `{path}`")
            settings[name] = int(told) if name in ("seed", "max_tokens") else told
    odd = sorted(
        clean(name) for name, value in preset.items() if name not in _OTHER and value not in (None, "", [], {})
    )
    notes += [f"left out: {', '.join(odd)}: not part of a steering set"] if odd else []
    rest = {name: settings.pop(name) for name in ("seed", "max_tokens") if name in settings}
    name = clean(str(preset.get("name") or path.stem))
    return Read(imported(path, TITLE, lines, list(marks.values()), sampling=settings, name=name, **rest), notes)


def _by_method(method: str, edit: Edit, notes: list[str]) -> list[Edit]:
    """What one feature does under a method, as our edits."""
    if method == ADDS:
        return [edit]
    assert edit.strength is not None
    share = edit.strength.number
    if method == PROJECTS and edit.strength.unit == "raw" and 1 - share in range(MOST_TIMES + 1):
        return [Edit(edit.latent, "project", place=edit.place, hook=edit.hook)] * int(1 - share)
    why = (
        f"no edit keeps {share:g} times what lies along its direction"
        if method == PROJECTS
        else "it caps what lies along its direction, and `cap` bounds the latent"
    )
    notes.append(f"left out: feature {edit.latent}: {why}")
    return []


def _mark(marks: dict[str, SAEMark], model: str, source: str, asked: Asked) -> str:
    """The hook point of a source; its SAE is added to `marks`."""
    try:
        hook = canonical(asked.hook or source)
    except ValueError as error:
        hint = "say where it stands: `--hook blocks.L.hook_SITE`"
        raise SteerError(f"the source `{clean(source)[:60]}` does not tell a hook point", hint) from error
    name = f"neuronpedia:{clean(model)}/{clean(source)}"
    mark = marks.setdefault(hook, SAEMark(hook, names=(name,)))
    if mark.names != (name,):
        raise SteerError(f"two SAEs stand at {hook}: {mark.names[0]} and {name}", "import their features one by one")
    return hook


def _snake(data: dict[str, Any]) -> dict[str, Any]:
    """The same with the names of its fields in snake_case."""
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower(): value for name, value in data.items()}


def write(recipe: Recipe, asked: Asked, decoder: Callable[[], Decoder]) -> Written:
    """A preset, which the steering API takes too. One has one method: `add` where there is one, else `project`."""
    notes: list[str] = []
    kept = [line for line in recipe.lines if _expressible(recipe, line.edit, asked, notes)]
    kinds = {line.edit.kind for line in kept}
    method = PROJECTS if kinds == {"project"} else ADDS
    if len(kinds) > 1:
        why = f"a preset has one method, and this one adds ({ADDS})"
        notes += [left_out(line.edit, why) for line in kept if line.edit.kind == "project"]
        kept = [line for line in kept if line.edit.kind == "add"]
    places = {place_of(recipe, line.edit) for line in kept}
    if len(places) > 1:
        notes += [special_note(line.edit) for line in kept if place_of(recipe, line.edit) == "all"]
    if method == PROJECTS:
        values = _projected(recipe, kept, notes)
    else:
        values = [(line, raw_of(line, decoder, notes)) for line in kept]
    times, features = _multiplier(values, notes), []
    for line, value in values:
        model, source = _name(recipe, line.edit, asked)
        features.append({"modelId": model, "layer": source, "index": line.edit.latent, "strength": value / times})
    told = {field: recipe.settings[name] for field, name in _SETTINGS.items() if name in recipe.settings}
    preset: dict[str, Any] = {
        "name": recipe.name,
        "modelId": features[0]["modelId"] if features else "",
        "features": features,
    }
    preset |= {"steer_method": method, "strength_multiplier": times, "steer_special_tokens": places != {"all"}} | told
    return Written(
        (json.dumps(preset, indent=2) + "\n").encode(), notes + unsaid(recipe, _SETTINGS.values()), len(features)
    )


def _multiplier(values: list[tuple[Line, float]], notes: list[str]) -> int:
    """What all strengths of a file are divided by, so that the site takes them; a sentence in `notes` on each that is
    too large without, or even so."""
    largest = max((abs(value) for _, value in values), default=0.0)
    times = next((each for each in MULTIPLIERS if largest <= STRONGEST * each), MULTIPLIERS[-1])
    for line, value in values:
        if abs(value) > STRONGEST:
            how = f"{value / times:.6g} and a strength_multiplier of {times}"
            over = ", and the site may still cut it" if abs(value) > STRONGEST * times else ""
            notes.append(
                f"changed: `{line.edit}`: the site takes strengths up to {STRONGEST}: the file has {how}{over}"
            )
    return times


def _expressible(recipe: Recipe, edit: Edit, asked: Asked, notes: list[str]) -> bool:
    """Whether a preset has an edit; a sentence in `notes` when not."""
    why = why_not(recipe, edit, ("add", "project"))
    if not why and not _name(recipe, edit, asked)[1]:
        where = recipe.hook_of(edit)
        why = f"nothing says what its SAE at {where} is called: pass `--sae-name neuronpedia:MODEL/SOURCE`"
    if why:
        notes.append(left_out(edit, why))
    return not why


def _projected(recipe: Recipe, kept: list[Line], notes: list[str]) -> list[tuple[Line, float]]:
    """Each latent once, with what is kept of its part of the stream: 0 when it is projected out once, -1 when twice."""
    by_latent: dict[tuple[str, int | None], list[Line]] = {}
    for line in kept:
        by_latent.setdefault((canonical(recipe.hook_of(line.edit)), line.edit.latent), []).append(line)
    if any(count > 1 for count in Counter(hook for hook, _ in by_latent).values()):
        notes.append(
            "changed: Neuronpedia projects one direction out after another, here all read the same stream; the same "
            "only where directions are at right angles"
        )
    return [(lines[0], 1.0 - len(lines)) for lines in by_latent.values()]


def _name(recipe: Recipe, edit: Edit, asked: Asked) -> tuple[str, str]:
    """modelId and source of the SAE that an edit is of; empty where the recipe does not know them."""
    hook = canonical(recipe.hook_of(edit))
    known = [name for mark in recipe.saes if canonical(mark.hook) == hook for name in mark.names]
    for name in ([asked.sae_name] if asked.sae_name else []) + known:
        scheme, _, called = name.partition(":")
        model, _, source = called.partition("/")
        if scheme == "neuronpedia" and source and _hook(source) in (hook, ""):
            return model, source
    return "", ""


def _hook(source: str) -> str:
    """The hook point that the name of a source tells; empty when it tells none."""
    try:
        return canonical(source)
    except ValueError:
        return ""
