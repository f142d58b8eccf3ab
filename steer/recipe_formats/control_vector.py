"""GGUF control vectors, as repeng writes them and llama.cpp reads them: one direction a layer, added to the stream.

`general.architecture` is "controlvector"; a tensor `direction.L`, float32 of the model's width, is added times a
coefficient to what block L puts out, at every token. L counts from 0 in both: repeng wraps `layers[L]` (`control.py`),
llama.cpp adds `direction.L` after block `il` = L (`llama-adapter.cpp`). llama.cpp refuses a whole file that has a
`direction.0`, or a tensor that is not float32 with one dimension (`common.cpp`). So `direction.L` is our
`vector FILE c on all+special at blocks.L.hook_resid_post`, and what is added to block L's input belongs to L - 1.

An export sums, by layer, what the edits add: it comes back as one edit a layer that adds the same.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.edits import Edit, Strength
from steer.errors import SteerError
from steer.events import clean
from steer.recipe import Line, Recipe
from steer.recipe_formats import (
    Asked,
    Decoder,
    Read,
    Written,
    canonical,
    imported,
    left_out,
    place_of,
    raw_of,
    special_note,
    unsaid,
    why_not,
)

TITLE = "GGUF control vector"
READS, WRITES = frozenset({"coefficient"}), frozenset[str]()
ARCHITECTURE = "controlvector"
COUNTED = (
    "direction.L is added to what block L puts out, counted from 0, as repeng and llama.cpp do; if its author counted "
    "from 1 it is one block late"
)
FLOAT32 = 0
"""ggml's number for it."""


def read(path: Path, asked: Asked, decoder: Callable[[], Decoder]) -> Read:
    """One `vector` edit for each direction of the file, which has to stay where it is."""
    from llama_3.gguf_file import read_header

    if not path.is_file():
        raise SteerError(f"there is no file `{path}`", "check the path")
    header = read_header(path)
    if (kind := header.metadata.get("general.architecture")) != ARCHITECTURE:
        raise SteerError(f"`{path}` is no control vector: it holds a {clean(str(kind))[:60]}")
    notes, layers, widths = [], [], set()
    for name, stored in header.tensors.items():
        match = re.fullmatch(r"direction\.([0-9]{1,4})", name)
        if match is None:
            notes.append(f"left out: the tensor {clean(name)[:60]}, which is no direction")
        elif stored.kind != FLOAT32 or len(stored.shape) != 1:
            notes.append(f"left out: {name}: it is not float32 with one dimension")
        elif stored.offset + 4 * stored.shape[0] > path.stat().st_size:
            raise SteerError(f"`{path}` is damaged: {name} reaches beyond its end")
        else:
            layers.append(int(match[1]))
            widths.add(stored.shape[0])
    if not layers or len(widths) > 1:
        why = f"directions of {len(widths)} widths" if layers else "no directions"
        raise SteerError(f"`{path}` cannot be used: it holds {why}")
    if 0 in layers:
        notes.append("assumed: direction.0 acts on what block 0 puts out; llama.cpp refuses a file that has one")
    hint = clean(str(header.metadata.get(f"{ARCHITECTURE}.model_hint", "")))[:60]
    if hint not in ("llama", ""):
        notes.append(f"assumed: it fits a Llama model; it says that it was made for `{hint}`")
    notes.append(f"assumed: {COUNTED}")
    lines = [
        Line(
            Edit(
                None,
                "vector",
                Strength(asked.coefficient),
                place="all+special",
                hook=f"blocks.{layer}.hook_resid_post",
                file=str(path),
            )
        )
        for layer in sorted(layers)
    ]
    return Read(imported(path, TITLE, lines, ()), notes)


def write(recipe: Recipe, asked: Asked, decoder: Callable[[], Decoder]) -> Written:
    """The file of the summed directions."""
    import numpy as np

    notes: list[str] = []
    directions: dict[int, Any] = {}
    for line in recipe.lines:
        layer = _layer(recipe, line.edit, decoder, notes)
        if layer is not None:
            added_D = raw_of(line, decoder, notes) * np.asarray(decoder().row(line.edit), np.float64)
            directions[layer] = directions.get(layer, 0.0) + added_D
    notes.append(f"assumed: {COUNTED}")
    for direction_D in directions.values():
        if not bool((np.abs(direction_D) <= np.finfo(np.float32).max).all()):
            raise SteerError("what the edits add is more than 32-bit numbers hold", "write smaller strengths")
    content = _file({layer: directions[layer].astype(np.float32) for layer in sorted(directions)})
    return Written(content, notes + unsaid(recipe), len(directions))


def _layer(recipe: Recipe, edit: Edit, decoder: Callable[[], Decoder], notes: list[str]) -> int | None:
    """The number of the direction that an edit belongs to; None, with a sentence in `notes`, when to none."""
    why, hook, layer = why_not(recipe, edit, ("add", "vector")), recipe.hook_of(edit), 0
    if not why:
        match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", canonical(hook))
        layer = int(match[1]) - (match[2] == "pre") if match else -1
        if layer < 0:
            why = f"a control vector is added to what a block puts out, and {hook} is no such place"
        elif layer == 0:
            why = "llama.cpp refuses a file with a direction.0, so nothing can be added after block 0"
        elif decoder().scaled(edit):
            why = "its SAE scales what it adds by each token's size"
    if why:
        notes.append(left_out(edit, why))
        return None
    if place_of(recipe, edit) == "all":
        notes.append(special_note(edit))
    return layer


def _file(directions: dict[int, Any]) -> bytes:
    """The file's content; the gguf package writes to a path alone."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", "llama")
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, direction_D in directions.items():
            writer.add_tensor(f"direction.{layer}", direction_D)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
