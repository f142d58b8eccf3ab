"""`steer recipe`: steering sets that can be kept, shared and run again, and those that other tools wrote."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer import __version__
from steer.cli import engines
from steer.cli.complete import DEFAULT_TOKENS, complete
from steer.cli.options import Chat, Edits, Error, Json, app, command, narrate, put, steering_set
from steer.config import DEMO_LABELS, Settings, sessions_folder
from steer.edits import FORMULAS, SteeringSet, Strength
from steer.errors import ExitCode, SteerError
from steer.events import clean, clean_line, counted
from steer.files import write_whole
from steer.recipe import Line, Recipe
from steer.session import Sampling, Session

if TYPE_CHECKING:
    from steer.made_with import Check
    from steer.recipe_formats import Asked, Decoder

recipe = typer.Typer(
    help="Steering sets to keep, to share and to run again.",
    epilog="`check` exits 0 when the recipe runs here, with what differs listed, and 1 when it cannot. `import` and "
    "`export` say on stderr what was lost or assumed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(recipe, name="recipe")

File = Annotated[Path, typer.Argument(help="The recipe, a TOML file.", metavar="FILE")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


@command(recipe, sampled=True)
def save(
    settings: Settings,
    file: File,
    edit: Edits = None,
    session: Annotated[
        str | None,
        typer.Option(help="Take set, sampling and seed of a saved session; `last` is the newest.", metavar="NAME"),
    ] = None,
    error: Error = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Edit the first token and the special ones too.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None,
    name: Annotated[str, typer.Option(help="What the recipe is called.", metavar="TEXT")] = "",
    notes: Annotated[str, typer.Option(help="What people should know about it.", metavar="TEXT")] = "",
    force: Force = False,
) -> None:
    """Write edits and settings to a file, with what they were made with."""
    from steer.made_with import make_recipe

    _check_free(file, force)
    steering = replace(steering_set(edit, error), special_tokens=special_tokens)
    engine = engines.make_engine(settings)
    for one in steering.edits:
        engine.check(one)
    talk = Session(engine, sampling=settings.sampling, seed=settings.seed, system=settings.system)
    given: dict[str, Any] = {"seed": settings.seed, "system": settings.system, "max_tokens": settings.max_tokens}
    if session is not None:
        steering = _of_session(talk, session, steering, error is not None)
        typed = _typed(settings)
        sampling = replace(talk.sampling, **{key: value for key, value in typed.items() if key not in given})
        kept = {"seed": talk.seed, "system": talk.system, "max_tokens": talk.max_tokens}
        given = kept | {key: value for key, value in typed.items() if key in given}
    else:
        sampling = talk.sampling
        if given["max_tokens"] is None:  # as `steer complete` has it
            given["max_tokens"] = min(DEFAULT_TOKENS, engine.info.context)
    if not steering.edits and session is not None:
        raise SteerError(
            f"session {clean(talk.name or session)} has no edits", "steer in it and save it, or give `--edit` as well"
        )
    if not steering.edits:
        raise SteerError("there is nothing to save: no edit is given", "give `--edit` or `--session`")
    if system is not None:
        given["system"] = system
    made = make_recipe(
        steering, settings, engine, sampling=asdict(sampling), name=name or file.stem, notes=notes, **given
    )
    made.write(file)
    narrate(f"wrote {file}: {counted(len(made.lines), 'edit')}")


def _of_session(talk: Session, name: str, typed: SteeringSet, error_typed: bool) -> SteeringSet:
    """The set of a saved session, with what was typed added; fills `talk` with the rest of it."""
    from steer.store import Store

    if notice := Store(sessions_folder()).restore(name, talk):
        narrate(notice)
    held = talk.steering
    return SteeringSet(
        (*held.edits, *typed.edits),
        typed.error if error_typed else held.error,
        typed.special_tokens or held.special_tokens,
    )


def _typed(settings: Settings) -> dict[str, Any]:
    """What of sampling, seed and length was typed, and is not from `steer.toml`."""
    file, names = Settings.load(), [*(entry.name for entry in fields(Sampling)), "seed", "max_tokens"]
    told = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in told.items() if value is not None and value != getattr(file, name)}


@command(recipe)
def show(settings: Settings, file: File, json: Json = False) -> None:
    """Print a recipe: what each edit adds, and what it was made with."""
    read = Recipe.read(file)
    names = _labels(read, settings)
    if json:
        put(_entry(read, names))
        return
    for text in _page(read, names):
        print(clean(text))


@command(recipe, sampled=True)
def apply(
    settings: Settings,
    recipe: File,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Several are one batch; without any, one a line on stdin.", metavar="PROMPT..."),
    ] = None,
    edit: Edits = None,
    error: Error = None,
    chat: Chat = False,
    json: Json = False,
) -> int:
    """Go on from a text as `steer complete --recipe FILE` does."""
    ran: int = complete(
        settings=settings,
        prompts=prompts,
        edit=edit,
        recipe=recipe,
        error=error,
        chat=chat,
        json=json,
    )
    return ran


@command(recipe)
def check(settings: Settings, file: File, json: Json = False) -> int:
    """Compare a recipe with the model and SAE in use."""
    from steer.made_with import compare

    read = Recipe.read(file)
    checks = compare(read, settings, engines.make_engine(settings))
    for one in checks:
        if json:
            put(_check_entry(one))
        else:
            print(("same    " if one.ok else "BLOCKS  " if one.blocks else "differs ") + clean_line(one.message))
    blocked, differing = sum(one.blocks for one in checks), sum(not one.ok for one in checks)
    if not any((read.model, read.saes)):
        narrate("this recipe does not say what it was made with")
    if blocked:
        narrate("it cannot run here")
    else:
        narrate("it runs here" + (f"; {differing} of {len(checks)} differ" if differing else ", as it was made"))
    return ExitCode.MISTAKE if blocked else ExitCode.DONE


def _check_entry(one: Check) -> dict[str, Any]:
    told = {"check": one.what, "ok": one.ok, "blocks": one.blocks, "then": one.then, "now": one.now}
    return told | {"message": one.message}


Hook = Annotated[str | None, typer.Option(help="Where the edits act, for a file that does not say.", metavar="HOOK")]
SAEName = Annotated[
    str | None,
    typer.Option(
        help="The SAE's name there: neuronpedia:MODEL/SOURCE, sparsify:REPO, sae_lens:RELEASE/ID, goodfire:MODEL.",
        metavar="NAME",
    ),
]


@command(recipe, name="import")
def import_(
    settings: Settings,
    source: Annotated[str, typer.Argument(help="A file of another tool, or a Neuronpedia link.", metavar="SOURCE")],
    file: File,
    format: Annotated[
        str | None,
        typer.Option("--from", help="lm-eval, gguf, neuronpedia or goodfire; else by the file.", metavar="FORMAT"),
    ] = None,
    hook: Hook = None,
    sae_name: SAEName = None,
    strength: Annotated[
        str | None, typer.Option(help="Of features that come without one (default 1x).", metavar="STRENGTH")
    ] = None,
    coefficient: Annotated[float | None, typer.Option(help="Of a control vector (default 1).", metavar="X")] = None,
    force: Force = False,
) -> None:
    """Make a recipe of what another tool wrote."""
    from steer.recipe_formats import find_format

    _check_free(file, force)
    form, parsed = find_format(format, source, "read"), None if strength is None else Strength.parse(strength)
    asked = _asked(form.TITLE, form.READS, hook=hook, sae_name=sae_name, strength=parsed, coefficient=coefficient)
    done = form.read(Path(source), asked, _decoder(settings))
    for note in done.notes:
        narrate(note)
    if not done.recipe.lines:
        raise SteerError(f"nothing of `{clean(source)}` can be said as an edit", "see what was left out above")
    replace(done.recipe, steer=__version__, created=time.strftime("%Y-%m-%dT%H:%M:%S%z")).write(file)
    narrate(f"wrote {file}: {counted(len(done.recipe.lines), 'edit')}")


@command(recipe)
def export(
    settings: Settings,
    file: File,
    out: Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT")],
    format: Annotated[
        str | None, typer.Option("--to", help="lm-eval, gguf, neuronpedia or goodfire; else by OUT.", metavar="FORMAT")
    ] = None,
    sae_name: SAEName = None,
    force: Force = False,
) -> None:
    """Write a recipe for another tool."""
    from steer.recipe_formats import find_format

    _check_free(out, force)
    read = Recipe.read(file)
    form = find_format(format, str(out), "write")
    done = form.write(read, _asked(form.TITLE, form.WRITES, sae_name=sae_name), _decoder(settings))
    for note in done.notes:
        narrate(note)
    if not done.entries:
        raise SteerError(f"no edit of `{file}` can be said in this format", "see what was left out above")
    write_whole(out, done.content)
    narrate(f"wrote {out}")


def _asked(title: str, heeded: Collection[str], **typed: Any) -> Asked:
    """What was typed for a format; a `SteerError` for what it does not heed."""
    given = {name: value for name, value in typed.items() if value is not None}
    for name in given:
        if name not in heeded:
            raise SteerError(f"--{name.replace('_', '-')} has no meaning for this format: {title}", "leave it out")
    from steer.recipe_formats import Asked

    return Asked(**given)


def _decoder(settings: Settings) -> Callable[[], Decoder]:
    """What loads the engine when a format asks for the SAE, once."""

    @functools.cache
    def load() -> Decoder:
        from steer.recipe_formats.decoder import EngineDecoder

        return EngineDecoder(engines.load_engine(settings))

    return load


def _check_free(file: Path, force: bool) -> None:
    if file.exists() and not force:
        raise SteerError(f"`{file}` is there already", "choose another name, or pass `--force`")
    if not file.absolute().parent.is_dir():
        raise SteerError(f"there is no folder `{file.parent}` for `{file.name}`")


# -- the page ----------------------------------------------------------------------------------------------------


def _labels(read: Recipe, settings: Settings) -> dict[int, str]:
    """By latent, the labels that the recipe holds, else those of the index in use where it is of the same SAE."""
    names = {line.edit.latent: line.label for line in read.lines if line.label and line.edit.latent is not None}
    path = settings.labels or (DEMO_LABELS if not settings.model and not settings.sae else None)
    wanted = {line.edit.latent for line in read.lines if line.edit.latent is not None and not line.edit.hook}
    if path is None or not read.saes or wanted <= names.keys():
        return names
    from labels.index import LabelIndex

    with LabelIndex(Path(path), read_only=True) as index:
        ours = index.meta().get("sae/sae.safetensors") == read.saes[0].sha256
        return (index.labels_of(sorted(wanted)) if ours else {}) | names


def _label(line: Line, names: dict[int, str]) -> str:
    """What the latent of an edit is called; `names` are of the first SAE, and an edit with a hook point may not be."""
    latent = line.edit.latent
    return line.label or (names.get(latent, "") if latent is not None and not line.edit.hook else "")


def _page(read: Recipe, names: dict[int, str]) -> list[str]:
    """The recipe for a person, a line an entry."""
    lines = [read.name or "a recipe without a name"]
    made = [f"made {read.created}" if read.created else "", f"with steer {read.steer}" if read.steer else ""]
    lines += ["  " + " ".join(filter(None, made))] if any(made) else []
    lines += [f"  {text}" for text in read.notes.splitlines()]
    lines += ["", counted(len(read.lines), "edit")]
    for number, line in enumerate(read.lines, 1):
        lines += _told(number, line, names)
    error = "kept" if read.error == "keep" else "dropped: x is replaced by what the edited latents decode to"
    special = "edited too" if read.special_tokens else "left alone, but for edits on all+special"
    lines += ["", f"  error           {error}", f"  special tokens  {special}"]
    lines += ["", "settings"]
    settings = {"system": read.system, "seed": read.seed, "max_tokens": read.max_tokens} | dict(read.sampling)
    told = {name: value for name, value in settings.items() if value not in (None, ())}
    lines += [f"  {name:<18}  {clean_line(str(value))}" for name, value in told.items()]
    if len(lines) and lines[-1] == "settings":
        lines[-1] = "settings: those of the model"
    lines += ["", "made with" if read.model or read.saes else "made with: it does not say"]
    if mark := read.model:
        size = f"{mark.layers} blocks of width {mark.width}" if mark.layers else ""
        lines.append("  model  " + ", ".join(filter(None, (mark.name, size, mark.dtype, mark.device))))
        hashes = {"sha256": mark.sha256, "tokenizer": mark.tokenizer}
        lines += [f"    {name} {value}" for name, value in hashes.items() if value]
    for sae in read.saes:
        lines.append(
            "  sae    " + ", ".join(filter(None, (sae.hook, f"{sae.d_sae} latents" if sae.d_sae else "", sae.kind)))
        )
        lines += [f"    sha256 {sae.sha256}"] if sae.sha256 else []
        lines += [f"    {clean_line(name)}" for name in sae.names]
    return lines


def _told(number: int, line: Line, names: dict[int, str]) -> list[str]:
    """One edit: as written, what it adds, what that meant."""
    edit = line.edit
    lines = [f"  {number}. {edit}{'  (muted)' if edit.muted else ''}"]
    lines.append(f"     adds {FORMULAS[edit.kind]}")
    meant = {"v": line.raw, "the latent's max": line.max, "the condition's bound": line.above}
    if told := [f"{what} = {value:.6g}" for what, value in meant.items() if value is not None]:
        lines.append(f"     {', '.join(told)}")
    if label := _label(line, names):
        lines.append(f"     latent {edit.latent}: {clean_line(label)}")
    return lines


def _entry(read: Recipe, names: dict[int, str]) -> dict[str, Any]:
    """The recipe as JSON."""
    lines = []
    for line in read.lines:
        edit = line.edit
        entry = {"edit": str(edit), "muted": edit.muted, "latent": edit.latent, "adds": FORMULAS[edit.kind]}
        entry |= {"raw": line.raw, "max": line.max, "above": line.above}
        lines.append(entry | {"label": _label(line, names)})
    told = asdict(replace(read, lines=()))
    del told["lines"]
    return {"edits": lines} | told
