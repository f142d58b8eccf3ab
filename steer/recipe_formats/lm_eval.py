"""The steering CSV of lm-evaluation-harness (`lm_eval/models/hf_steered.py`, its model type `steered`).

    loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description

It acts on the output of the module `hookpoint` at every token, the first and special ones too:

    add     x + c * W_dec[i]                                    our `add c on all+special`
    clamp   y + b_dec, y = x - b_dec with its part along        our `project` and, beside it, an `add` of
            u = W_dec[i] / |W_dec[i]| replaced by c * u         (c + b_dec . u) / |W_dec[i]|, both on all+special

Its clamp sets a projection and not the latent, so our `clamp` cannot be said. The harness itself keeps one row for each
hookpoint, the last, and (its closures are bound late) adds the last row's direction wherever it adds. All rows are
read and written here; that they would not all act there is said.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from pathlib import Path

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

TITLE = "lm-evaluation-harness CSV"
READS, WRITES = frozenset({"hook"}), frozenset({"sae_name"})
COLUMNS = (
    "loader",
    "action",
    "sparse_model",
    "hookpoint",
    "feature_index",
    "steering_coefficient",
    "head_index",
    "sae_id",
    "description",
)
ONE_ROW = (
    "lm-evaluation-harness itself acts on the last row of a hookpoint alone, and where rows of several add, with the "
    "last one's direction"
)
_MODULES = {
    "resid_post": "layers.{}",
    "mlp_out": "layers.{}.mlp",
    "attn_out": "layers.{}.self_attn",
    "attn_norm": "layers.{}.input_layernorm",
    "mlp_norm": "layers.{}.post_attention_layernorm",
}
"""By our site, the module whose output it is."""


def read(path: Path, asked: Asked, decoder: Callable[[], Decoder]) -> Read:
    """The recipe of a CSV; a clamp needs the SAE, for the length of its row and its bias."""
    rows, notes = _rows(path)
    lines: list[Line] = []
    marks: dict[str, SAEMark] = {}
    for number, row in rows:
        what = f"line {number} of `{path}`"
        if row.get("head_index"):
            notes.append(f"left out: {what}: steering single heads (head_index {clean(row['head_index'])}) is not done")
            continue
        hook = _hook(row, asked, what)
        mark = SAEMark(hook, names=tuple(filter(None, [_name(row)])))
        if marks.setdefault(hook, mark) != mark:
            notes.append(f"left out: {what}: it is of another SAE than the rows before it at {hook}")
            continue
        latent = as_latent(row.get("feature_index"), f"feature_index in {what}")
        value = as_number(row.get("steering_coefficient"), f"steering_coefficient in {what}")
        add = Edit(latent, "add", Strength(value), place="all+special", hook=hook)
        label = clean(row.get("description", ""))
        match row.get("action") or "add":
            case "add":
                lines.append(Line(add, label=label))
            case "clamp":
                lines += [Line(edit, label=label) for edit in _clamp(add, decoder())]
            case action:
                raise SteerError(f"the action in {what} is `{clean(action)}`", "it knows add and clamp")
    if len(lines) > 1:
        notes.append(f"assumed: all rows are meant to act; {ONE_ROW}")
    return Read(imported(path, TITLE, lines, list(marks.values())), notes)


def _rows(path: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """The rows with their line numbers, and a sentence on columns that are not known."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restkey="", strict=True)
        names = [(name or "").strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        found = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise SteerError(f"`{path}` is no CSV: {sentence(error)}") from error
    for name in ("feature_index", "steering_coefficient"):
        if name not in names:
            raise SteerError(f"`{path}` has no column `{name}`", f"the columns are {','.join(COLUMNS)}")
    known = [
        (line, {name: value.strip() for name, value in row.items() if name in COLUMNS and isinstance(value, str)})
        for line, row in found
    ]
    odd = [clean(name) for name in names if name and name not in COLUMNS]
    return known, [f"left out: the columns {', '.join(odd)}, which are not known"] if odd else []


def _hook(row: dict[str, str], asked: Asked, what: str) -> str:
    given = asked.hook or row.get("hookpoint", "")
    if not given:
        raise SteerError(f"{what} names no hookpoint: the SAE's own is meant", "say it: `--hook blocks.L.hook_SITE`")
    try:
        return canonical(given)
    except ValueError as error:
        raise SteerError(f"the hookpoint in {what}: {sentence(error)}", getattr(error, "hint", None)) from error


def _name(row: dict[str, str]) -> str:
    model = clean(row.get("sparse_model", ""))
    if not model:
        return ""
    loader = row.get("loader") or "sparsify"
    sae_id = clean(row.get("sae_id", "")) if loader == "sae_lens" else ""
    return f"{clean(loader)}:{model}" + (f"/{sae_id}" if sae_id else "")


def _clamp(add: Edit, decoder: Decoder) -> list[Edit]:
    """A clamp to the coefficient that `add` has, as our edits."""
    assert add.strength is not None
    project = Edit(add.latent, "project", place="all+special", hook=add.hook)
    length, bias = _length(project, decoder), decoder.along_bias(project)
    value = add.strength.number + bias
    if abs(value) <= 1e-9 * abs(bias):
        return [project]
    return [project, Edit(add.latent, "add", Strength(round_off(value / length)), place="all+special", hook=add.hook)]


def _length(edit: Edit, decoder: Decoder) -> float:
    length = math.hypot(*decoder.row(edit))
    if not length:
        raise SteerError(f"the decoder direction of latent {edit.latent} is zero, so nothing can be clamped along it")
    return length


def write(recipe: Recipe, asked: Asked, decoder: Callable[[], Decoder]) -> Written:
    """The CSV of the edits that it can express."""
    notes: list[str] = []
    kept = [line for line in recipe.lines if _expressible(recipe, line.edit, notes)]
    rows: list[list[object]] = []
    hooks: list[str] = []
    while kept:
        line = kept.pop(0)
        edit, hook = line.edit, canonical(recipe.hook_of(line.edit))
        if edit.kind == "add":
            action, value = "add", raw_of(line, decoder, notes)
        else:
            beside = next((other for other in kept if _beside(recipe, other.edit, edit)), None)
            push = 0.0
            if beside:
                kept.remove(beside)
                push = raw_of(beside, decoder, notes)
            action, value = "clamp", push * _length(edit, decoder()) - decoder().along_bias(edit)
        loader, model, sae_id = _sae_cells(recipe, hook, asked)
        hooks.append(hook)
        rows.append([loader, action, model, _module(hook), edit.latent, repr(value), "", sae_id, line.label])
    if any(not row[2] for row in rows):
        notes.append("left out: sparse_model: say what the SAE is called there, `--sae-name sparsify:REPO`")
    if len(rows) > 1:
        notes.append(f"changed: {ONE_ROW}")
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return Written(text.getvalue().encode("utf-8", "replace"), notes + unsaid(recipe), len(rows))


def _expressible(recipe: Recipe, edit: Edit, notes: list[str]) -> bool:
    """Whether the format has an edit; a sentence in `notes` when it has not, or not quite."""
    why, hook = why_not(recipe, edit, ("add", "project")), recipe.hook_of(edit)
    if edit.kind == "clamp" and not edit.muted:
        why = "its clamp sets the stream's part along the direction, not the latent (`project` and `add` together do)"
    if not why and _module(canonical(hook)) is None:
        why = f"no module's output stands at {hook}"
    if why:
        notes.append(left_out(edit, why))
    elif place_of(recipe, edit) == "all":
        notes.append(special_note(edit))
    return not why


def _beside(recipe: Recipe, other: Edit, edit: Edit) -> bool:
    """Whether an edit adds along the latent that another one projects out."""
    same_hook = canonical(recipe.hook_of(other)) == canonical(recipe.hook_of(edit))
    return other.kind == "add" and other.latent == edit.latent and same_hook


def _module(hook: str) -> str | None:
    """The module whose output stands at a hook point."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", hook)
    if match and (match[1], match[2]) == ("0", "resid_pre"):
        return "embed_tokens"
    return _MODULES[match[2]].format(match[1]) if match and match[2] in _MODULES else None


def _sae_cells(recipe: Recipe, hook: str, asked: Asked) -> tuple[str, str, str]:
    """loader, sparse_model and sae_id of the SAE at a hook point; empty where the recipe does not know them."""
    known = [name for mark in recipe.saes if canonical(mark.hook) == hook for name in mark.names]
    for name in ([asked.sae_name] if asked.sae_name else []) + known:
        loader, _, called = name.partition(":")
        if loader == "sparsify":
            return loader, called, ""
        if loader == "sae_lens":
            release, _, sae_id = called.partition("/")
            return loader, release, sae_id
    return "sparsify", "", ""
