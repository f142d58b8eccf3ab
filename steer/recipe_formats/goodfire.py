"""Goodfire's JSON: variants (`variants/variants.py` of its SDK) and controllers (`controller/controller.py`).

    variant     {"base_model", "edits": [{"feature_id", "feature_label", "index_in_sae", "value"}], "scopes"}
    controller  {"interventions": [{"mode", "features": {"features": [...]}, "value"}], "scopes", "name", ...}

    nudge v     `add vx`          pin v   `clamp vx`          mul v   `scale v`
    a scope with one condition, one feature > a number        `when OTHER > X`

What the hosted service computes was never published: a value is taken as a share of the latent's recorded max, which is
what its scale of -1 to 1 suggests, and tokens as ours by default. Features are those of the two SAEs it published, at
the output of block 19 of Llama 3.1 8B and of block 50 of Llama 3.3 70B; anything else is refused unless it is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steer.edits import Condition, Edit, Strength
from steer.errors import SteerError
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
    read_json,
    unsaid,
    why_not,
)

TITLE = "Goodfire file"
READS, WRITES = frozenset({"hook", "sae_name"}), frozenset({"sae_name"})
MODELS = {
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "blocks.19.hook_resid_post",
    "meta-llama/Llama-3.3-70B-Instruct": "blocks.50.hook_resid_post",
}
"""Where the SAE stands that each model's features are of."""
D_SAE = 65_536
DEEPEST = 4
"""Scopes in scopes that are looked into."""


def read(path: Path, asked: Asked, decoder: Callable[[], Decoder]) -> Read:
    """The recipe of a variant or a controller."""
    data = read_json(path)
    if not isinstance(data, dict) or not {"edits", "interventions"} & data.keys():
        raise SteerError(f"`{path}` is no variant and no controller: it has neither `edits` nor `interventions`")
    told = asked.sae_name.removeprefix("goodfire:")
    model = clean(str(told or data.get("base_model") or ""))
    hook = (canonical(asked.hook) if asked.hook else "") or MODELS.get(model, "")
    if not hook:
        what = f"is of `{model[:80]}`, whose features are not known" if model else "does not name its model"
        hint = f"pass `--sae-name goodfire:MODEL` with {' or '.join(MODELS)}, or `--hook` where its SAE stands"
        raise SteerError(f"`{path}` {what}", hint)
    notes = [
        "assumed: a value is a share of the latent's recorded max, and special tokens are left alone: the service "
        "does not tell"
    ]
    lines = [Line(edit, label=label) for edit, label in _edits(data, hook, None, notes, str(path))]
    limits = ("nonzero_strength_threshold", "min_nudge_entropy", "max_nudge_entropy")
    notes += [f"left out: {name}: steering here knows no such limit" for name in limits if data.get(name) is not None]
    known = model in MODELS and MODELS[model] == hook
    mark = SAEMark(hook, d_sae=D_SAE if known else None, names=(f"goodfire:{model}",) if model else ())
    return Read(imported(path, TITLE, lines, [mark]), notes)


def _edits(
    data: dict[str, Any], hook: str, when: Condition | None, notes: list[str], path: str, depth: int = 0
) -> Iterator[tuple[Edit, str]]:
    """The edits of a variant or controller with their labels, then those of its scopes."""
    for entry in _objects(data, "edits", path):
        told = entry.get("value")
        old = told if isinstance(told, dict) else {"value": told}  # an older SDK wrote mode and value
        value, mode = old.get("value"), str(old.get("mode", "nudge"))
        yield _edit(entry, mode, value, hook, when, path), clean(str(entry.get("feature_label", "")))
    for entry in _objects(data, "interventions", path):
        for feature in _features(entry.get("features"), path):
            edit = _edit(feature, str(entry.get("mode")), entry.get("value"), hook, when, path)
            yield edit, clean(str(feature.get("label", "")))
    for number, scope in enumerate(_objects(data, "scopes", path), 1):
        inner = scope.get("controller") or scope.get("nested_variant")
        condition, why = _condition(scope.get("conditionals") or scope.get("condition"), notes, path)
        if scope.get("event_name"):
            why = f"it interrupts the reply with `{clean(str(scope['event_name']))[:40]}`"
        elif when or depth >= DEEPEST:
            why = "it stands in another scope, and an edit has one condition"
        if why or not isinstance(inner, dict):
            notes.append(f"left out: scope {number} of `{path}`: {why or 'it holds nothing'}")
            continue
        yield from _edits(inner, hook, condition, notes, path, depth + 1)


def _objects(data: dict[str, Any], name: str, path: str) -> list[dict[str, Any]]:
    value = data.get(name) or []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise SteerError(f"`{name}` of `{path}` is no list of objects")
    return value


def _features(group: object, path: str) -> list[dict[str, Any]]:
    return _objects(group if isinstance(group, dict) else {}, "features", path)


def _edit(feature: dict[str, Any], mode: str, value: object, hook: str, when: Condition | None, path: str) -> Edit:
    latent = as_latent(feature.get("index_in_sae"), f"index_in_sae in `{path}`")
    if mode == "pin" and isinstance(value, bool):
        value = 0.5 if value else -0.5  # as its SDK does
    number = as_number(value, f"the value of feature {latent} in `{path}`")
    match mode:
        case "nudge":
            return Edit(latent, "add", _share(number), hook=hook, when=when)
        case "pin":
            return Edit(latent, "clamp", _share(number), hook=hook, when=when)
        case "mul":
            return Edit(latent, "scale", Strength(number), hook=hook, when=when)
    raise SteerError(f"the mode of feature {latent} in `{path}` is `{clean(mode)[:40]}`", "known are nudge, pin, mul")


def _condition(group: object, notes: list[str], path: str) -> tuple[Condition | None, str | None]:
    """What our `when` can say of a group of conditions, or why it cannot."""
    all_of = _objects(group if isinstance(group, dict) else {}, "conditionals", path)
    if len(all_of) != 1:
        return None, f"it has {len(all_of)} conditions, and an edit has one"
    [one] = all_of
    left, right, operator = _features(one.get("left_hand"), path), one.get("right_hand"), one.get("operator")
    if len(left) != 1 or isinstance(right, dict | list | bool) or right is None:
        return None, "it compares groups of features, and a condition is one latent above a number"
    if operator not in (">", ">="):
        return None, f"its condition is `{clean(str(operator))[:10]}`, and ours is `>`"
    if operator == ">=":
        notes.append("changed: a condition `>=` is read as `>`")
    other = as_latent(left[0].get("index_in_sae"), f"index_in_sae of a condition in `{path}`")
    notes.append("assumed: a condition once met stays met for the reply")
    return Condition(other, _share(as_number(right, f"a condition in `{path}`"))), None


def _share(number: float) -> Strength:
    """A share of a latent's max; none of it is 0 whatever the max."""
    return Strength(number, "max") if number else Strength(0.0)


def write(recipe: Recipe, asked: Asked, decoder: Callable[[], Decoder]) -> Written:
    """A variant where all edits add, each to a latent of its own and without conditions; else a controller."""
    notes: list[str] = []
    written: list[tuple[Line, str, float, float]] = []
    for line in recipe.lines:
        why = why_not(recipe, line.edit, ("add", "clamp", "scale", "ablate"), ("when",), hooked=False)
        values = None if why else _values(line, decoder, notes)
        if not why and values is None:
            why = "its latent has no recorded max, of which the format's values are shares"
        if why or values is None:
            notes.append(left_out(line.edit, why or ""))
            continue
        if line.edit.kind == "ablate":
            notes.append(f"changed: `{line.edit}` is written as a pin to 0, which does the same")
        if place_of(recipe, line.edit) == "all+special":
            notes.append(f"changed: `{line.edit}`: the format does not say that special tokens are edited too")
        written.append((line, *values))
    model = _model(recipe, [line for line, *_ in written], asked, notes)
    latents = [line.edit.latent for line, *_ in written]
    plain = all(mode == "nudge" and line.edit.when is None for line, mode, *_ in written)
    if written:
        notes.append("left out: feature ids, by which the service knows its features: a recipe has their numbers alone")
    if plain and len(set(latents)) == len(latents):
        edits = [
            {"feature_id": "", "feature_label": line.label, "index_in_sae": line.edit.latent, "value": value}
            for line, _, value, _ in written
        ]
        content: dict[str, Any] = {"base_model": model, "edits": edits, "scopes": []}
    else:
        notes.append(f"left out: the model's name ({model}), which a controller does not hold")
        content = _controller(recipe.name, written)
    return Written((json.dumps(content, indent=2) + "\n").encode(), notes + unsaid(recipe), len(written))


def _values(line: Line, decoder: Callable[[], Decoder], notes: list[str]) -> tuple[str, float, float] | None:
    """Mode, value and the bound of the condition (0 without one); None where a max that is needed is not known."""
    edit, bound = line.edit, 0.0
    if edit.when:
        above = edit.when.above
        raw = above.number if above.unit == "raw" else None
        if above.unit == "max":
            bound = above.number
        elif raw:
            maximum = decoder().maximum(Edit(edit.when.latent, "ablate", hook=edit.hook))
            if not maximum:
                return None
            bound = raw / maximum
            notes.append(
                f"changed: `{edit}`: its condition is written as {bound:.6g} times the max of {edit.when.latent}"
            )
    if edit.kind == "ablate":
        return "pin", 0.0, bound
    assert edit.strength is not None
    if edit.kind == "scale":
        return "mul", edit.strength.number, bound
    mode, value = "pin" if edit.kind == "clamp" else "nudge", edit.strength.number
    if edit.strength.unit != "max" and value:
        maximum = line.max or decoder().maximum(edit)
        if not maximum:
            return None
        raw = edit.strength.number if edit.strength.unit == "raw" else line.raw or decoder().raw(edit)
        value = raw / maximum
        notes.append(f"changed: `{edit}`: {edit.strength} is written as {value:.6g} times the max of its latent")
    return mode, value, bound


def _model(recipe: Recipe, lines: list[Line], asked: Asked, notes: list[str]) -> str:
    """The model whose SAE the edits are of; `SteerError` where it is none of Goodfire's and none was told."""
    hooks = {canonical(hook) for line in lines if (hook := recipe.hook_of(line.edit))}
    if not lines:
        return ""
    if told := asked.sae_name.removeprefix("goodfire:"):
        if hooks - {MODELS.get(told, "")}:
            where = f"its features stand at {MODELS[told]}" if told in MODELS else "it is not known to the service"
            notes.append(f"changed: the edits act at {', '.join(sorted(hooks))}, and of {clean(told)} {where}")
        return told
    named = {
        name.removeprefix("goodfire:") for mark in recipe.saes for name in mark.names if name.startswith("goodfire:")
    }
    sizes = {mark.d_sae for mark in recipe.saes if canonical(mark.hook) in hooks} - {None}
    found = [model for model, hook in MODELS.items() if hooks == {hook} and (not named or model in named)]
    if not found or not sizes <= {D_SAE} or (recipe.model and recipe.model.width not in (None, _width(found[0]))):
        raise SteerError(
            f"this recipe is not of one of Goodfire's SAEs: it acts at {', '.join(sorted(hooks)) or 'no hook point'}",
            f"theirs stand at {' and '.join(MODELS.values())}; `--sae-name goodfire:MODEL` writes it all the same",
        )
    return found[0]


def _width(model: str) -> int:
    return 4096 if "8B" in model else 8192


def _controller(name: str, written: list[tuple[Line, str, float, float]]) -> dict[str, Any]:
    def intervention(line: Line, mode: str, value: float) -> dict[str, Any]:
        return {"mode": mode, "features": {"features": [_feature(line.edit.latent, line.label)]}, "value": value}

    scopes = []
    for line, mode, value, bound in written:
        if when := line.edit.when:
            left = {"features": [_feature(when.latent, "")]}
            condition = {"left_hand": left, "right_hand": bound, "operator": ">"}
            group = {"conditionals": [condition], "operator": "AND"}
            inner = {"interventions": [intervention(line, mode, value)], "scopes": [], "name": ""}
            scopes.append({"conditionals": group, "controller": inner, "is_active": False, "event_name": None})
    plain = [intervention(line, mode, value) for line, mode, value, _ in written if not line.edit.when]
    limits = {"nonzero_strength_threshold": None, "min_nudge_entropy": None, "max_nudge_entropy": None}
    return {"interventions": plain, "scopes": scopes, "name": name} | limits


def _feature(latent: int | None, label: str) -> dict[str, Any]:
    return {"uuid": "", "label": label, "max_activation_strength": None, "index_in_sae": latent}
