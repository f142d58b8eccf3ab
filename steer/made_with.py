"""What a recipe was made with, told from the files themselves, and what differs here.

A model is known by a hash that takes milliseconds and does not depend on how it is loaded (`--dtype`, `--quantize`):
its config, and of every file of its weights the size and 16 pieces of 64 KiB that lie evenly in it. A copy has the same
hash, a fine-tuned model another; so has the same model in another layout. A tokenizer is known by its files, an SAE by
the sha256 of `sae.safetensors`, which label indexes name too.

What differs is said and a recipe runs; it cannot run where an edit, or an error that is dropped, has no SAE at its hook
point, where that SAE has another number of latents, or where the engine refuses an edit.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer import __version__
from steer.config import DEMO_MODEL, DEMO_SAE, Settings
from steer.edits import Edit, SteeringSet, Strength
from steer.errors import EXPLAINED, SteerError, sentence
from steer.recipe import Line, ModelMark, Recipe, SAEMark
from steer.session import EngineLike

PIECES, PIECE = 16, 1 << 16
CONFIGS = ("config.json", "params.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
CLOSE = 1e-6
"""Strengths that differ by a smaller share are the same."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a recipe says about where it was made, beside what is here."""

    what: str
    ok: bool
    message: str
    then: Any = None
    now: Any = None
    blocks: bool = False
    """Whether the recipe cannot run because of it."""


def model_hash(path: Path) -> str:
    """What a model on disk is known by, in hexadecimal."""
    from llama_3.checkpoint import weight_files
    from llama_3.config import find_layout

    folder, digest = find_layout(path)[1], hashlib.sha256()
    for config in (folder / name for name in CONFIGS):
        if config.is_file():
            digest.update(file_hash(config).encode())
    for file in weight_files(path):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as handle:
            for number in range(PIECES):
                handle.seek(max(0, (size - PIECE) * number // (PIECES - 1)))
                digest.update(handle.read(PIECE))
    return digest.hexdigest()


def tokenizer_hash(path: Path) -> str:
    """What the tokenizer beside a model is known by; empty for a GGUF file, whose words stand in its weights' file."""
    files = [path / name for name in TOKENIZERS if path.is_dir() and (path / name).is_file()]
    return hashlib.sha256(b"".join(file_hash(file).encode() for file in files)).hexdigest() if files else ""


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal; `SteerError` when it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise SteerError(f"`{path}` cannot be read: {error.strerror}", "check the path") from error


def sae_folders(settings: Settings) -> list[Path]:
    """The folders of the SAEs in use, the first one's features being shown."""
    if settings.sae is None:
        return [] if settings.model else [DEMO_SAE]
    return [Path(one) for one in (settings.sae, *settings.more_saes)]


def model_mark(settings: Settings, engine: EngineLike | None) -> ModelMark:
    """The model in use; without its name, dtype and device where it is not loaded."""
    from llama_3.config import read_config
    from llama_3.hub import resolve_model

    path = resolve_model(settings.model) if settings.model else DEMO_MODEL
    config = read_config(path)
    mark = ModelMark("", model_hash(path), tokenizer_hash(path), config.d_model, config.n_layers)
    if engine is None:
        return mark
    info = engine.info
    return replace(mark, name=info.model, dtype=info.dtype, device=info.device.partition(":")[0])


def sae_marks(settings: Settings, hashed: bool = True) -> tuple[SAEMark, ...]:
    """The SAEs in use; without `hashed` not their hashes, for which all of their weights are read."""
    from llama_3.hooks import HookPoint
    from sae.checkpoint import read_config

    marks = []
    for folder in sae_folders(settings):
        config = read_config(folder)
        kind = f"{config.activation}-{config.k}" if config.k else config.activation
        hook = str(HookPoint.parse(config.hook)) if config.hook else ""
        sha256 = file_hash(folder / "sae.safetensors") if hashed else ""
        marks.append(SAEMark(hook, sha256, config.d_sae, config.d_in, kind))
    return tuple(marks)


def make_recipe(steering: SteeringSet, settings: Settings, engine: EngineLike, **given: Any) -> Recipe:
    """The recipe of a set that is in use, with everything that its edits mean here."""
    return Recipe(
        tuple(describe(edit, engine) for edit in steering.edits),
        steering.error,
        steering.special_tokens,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        steer=__version__,
        model=model_mark(settings, engine),
        saes=sae_marks(settings),
        **given,
    )


def describe(edit: Edit, engine: EngineLike) -> Line:
    """An edit with what it means here, as far as that is known."""
    here, first = edit.hook, engine.info.hook
    own = not here or (first is not None and _canonical(here) == _canonical(first))
    maximum = (
        _raw(engine, Edit(edit.latent, "add", Strength(1.0, "max"), hook=here)) if edit.latent is not None else None
    )
    return Line(
        edit,
        _raw(engine, edit),
        maximum,
        _raw(engine, Edit(edit.when.latent, "add", edit.when.above, hook=here)) if edit.when else None,
        file_hash(Path(os.path.expanduser(edit.file))) if edit.file else "",
        "" if edit.latent is None or not own else engine.labels([edit.latent]).get(edit.latent, ""),
    )


def _raw(engine: EngineLike, edit: Edit) -> float | None:
    """What a strength comes to, None where it has no units or cannot run."""
    told = engine.readout(edit)
    return float(f"{told.raw:.9g}") if told else None


# -- what differs ------------------------------------------------------------------------------------------------


def compare(recipe: Recipe, settings: Settings, engine: EngineLike | None) -> list[Check]:
    """Everything that a recipe says about where it was made, beside what is here.

    Without an engine only what the files tell: nothing of dtype and device, and nothing of what the edits mean.
    """
    saes = sae_marks(settings, any(mark.sha256 for mark in recipe.saes))
    checks = list(_compare_model(recipe.model, model_mark(settings, engine))) if recipe.model else []
    live = [edit for edit in recipe.steering.live if edit.kind != "vector" or edit.when or not edit.hook]
    at, bare = {_canonical(recipe.hook_of(edit)) for edit in live}, any(not edit.hook for edit in live)
    for place, mark in enumerate(recipe.saes):
        needed = recipe.error == "drop" or _canonical(mark.hook) in at
        checks += _compare_sae(mark, saes, meant=place == 0 and bare, needed=needed)
    if engine is None or any(check.blocks for check in checks):
        return checks
    for number, line in enumerate(recipe.lines, 1):
        checks += _compare_edit(number, line, engine)
    return checks


def differences(checks: Sequence[Check]) -> list[str]:
    """A sentence for each thing that differs; `SteerError` when the recipe cannot run because of one."""
    for check in checks:
        if check.blocks:
            raise SteerError(f"this recipe cannot run here: {check.message}", "`steer recipe check` lists what differs")
    return [check.message for check in checks if not check.ok]


def _canonical(hook: str) -> str:
    """A hook point as we write it; as it is, where it is none."""
    from llama_3.hooks import HookPoint

    try:
        return str(HookPoint.parse(hook))
    except ValueError:
        return hook


def _same(what: str, name: str, then: Any, now: Any, why: str = "") -> Check:
    ok = then == now
    told = f"{what}: {name} is {_short(now)}" + ("" if ok else f", the recipe was made with {_short(then)}")
    return Check(f"{what} {name}", ok, told + ("" if ok or not why else f": {why}"), then, now)


def _short(value: Any) -> str:
    """A hash by its first digits."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _compare_model(then: ModelMark, now: ModelMark) -> Iterator[Check]:
    rounds = "replies may round apart"
    for name, why in (
        ("sha256", "it is another model, or another layout of its weights"),
        ("tokenizer", "the same text may be other tokens"),
        ("width", ""),
        ("layers", ""),
        ("dtype", rounds),
        ("device", rounds),
    ):
        before, here = getattr(then, name), getattr(now, name)
        if before not in ("", None) and here not in ("", None):
            yield _same("model", name, before, here, why)


def _compare_sae(then: SAEMark, saes: Sequence[SAEMark], *, meant: bool, needed: bool) -> Iterator[Check]:
    """`meant`, whether edits without a hook point mean it; `needed`, whether any edit does."""
    hook = _canonical(then.hook)
    now = next((mark for mark in saes if mark.hook == hook), None)
    if now is None:
        where = f"the SAE here stands at {', '.join(mark.hook for mark in saes)}" if saes else "no SAE is loaded"
        message = f"{where}, the recipe was made with one at {hook}"
        yield Check("sae hook", False, message, hook, [mark.hook for mark in saes], needed)
        return
    what = f"sae at {hook}"
    if meant and saes[0] is not now:
        yield Check("sae order", False, f"{what}: it is not the first one here", hook, saes[0].hook, True)
    for name, why in (
        ("d_sae", "its latents are others"),
        ("d_in", ""),
        ("kind", ""),
        ("sha256", "its latents may be others"),
    ):
        if getattr(then, name) not in ("", None):
            check = _same(what, name, getattr(then, name), getattr(now, name), why)
            yield replace(check, blocks=needed and name == "d_sae" and not check.ok)


def _compare_edit(number: int, then: Line, engine: EngineLike) -> Iterator[Check]:
    what, edit = f"edit {number}", then.edit
    try:
        engine.check(edit)
        now = describe(edit, engine)
    except EXPLAINED as error:
        yield Check(what, False, f"{what}: {sentence(error)}", str(edit), None, not edit.muted)
        return
    told = (
        ("raw", "its strength comes to", "it came to"),
        ("max", f"the max of latent {edit.latent} is", "it was"),
        ("above", f"its condition `{edit.when}` means a bound of", "it meant"),
    )
    differs = False
    for name, here, before in told:
        old, new = getattr(then, name), getattr(now, name)
        if old is not None and (new is None or abs(new - old) > CLOSE * max(abs(old), abs(new))):
            differs = True
            new_text = "not known" if new is None else f"{new:.6g}"
            message = f"{what}: `{edit}`: {here} {new_text}, where the recipe was made {before} {old:.6g}"
            yield Check(f"{what} {name}", False, message, old, new)
    if then.sha256 and then.sha256 != now.sha256:
        differs = True
        message = f"{what}: `{edit}`: the file is another one than where the recipe was made"
        yield Check(f"{what} sha256", False, message, then.sha256, now.sha256)
    if not differs:
        yield Check(what, True, f"{what}: `{edit}`" + (" (muted)" if edit.muted else ""), then.raw, now.raw)
