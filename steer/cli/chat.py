"""`steer chat`: the screens, or line by line with `--plain` and `--json` for pipes and screen readers."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import typer

from steer.cli import engines
from steer.cli.options import Edits, Error, Json, RecipeFile, command, steering_set
from steer.config import Settings, log_path, sessions_folder
from steer.errors import SteerError


@command(sampled=True)
def chat(
    settings: Settings,
    edit: Edits = None,
    recipe: RecipeFile = None,
    error: Error = None,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None,
    session: Annotated[
        str | None, typer.Option(help="Go on with a saved session; `last` is the newest.", metavar="NAME")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Line by line; each line is a message or a /command.")] = False,
    json: Json = False,
) -> int:
    """Talk to the model: screens in a terminal, or plain lines."""
    from steer.store import Store

    steering, store = steering_set(edit, error, recipe), Store(sessions_folder())
    if session is not None:
        store.open(session)  # a wrong name is told before the model is loaded
    options: dict[str, Any] = {
        "store": store,
        "system": settings.system if system is None else system,
        "sampling": settings.sampling,
        "seed": settings.seed,
    }
    options |= {} if settings.max_tokens is None else {"max_tokens": settings.max_tokens}
    if plain or json:
        from steer.cli.plain import PlainChat

        engine = engines.make_engine(settings, chat=True, recipe=recipe)
        engines.check_edits(engine, steering)
        return PlainChat(engine, options, steering, session, json=json).run(_lines(json))
    if not on_terminal():
        raise SteerError("the chat's screens need a terminal", "pass `--plain` to talk through a pipe")
    import app

    if settings.model:  # a download draws its progress here, before the screens
        from llama_3.hub import resolve_model

        settings = replace(settings, model=str(resolve_model(settings.model)))
    if recipe:
        engines.tell_differences(recipe, settings, None)
    # One core is left to the screen, so that keys are answered while a reply streams.
    settings = replace(settings, threads=settings.threads or max(1, (os.cpu_count() or 1) - 1))
    load = functools.partial(engines.load_engine, settings)  # tells what it has to say on the screen
    return app.run(load, settings, options | {"steering": steering, "open": session}, log=log_path())


def on_terminal() -> bool:
    """Whether screens can be drawn and keys be read."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _lines(json: bool) -> Iterator[str]:
    """The lines a person types; a pipe without any is a mistake."""
    shown, none = sys.stdin.isatty() and not json, True
    while True:
        if shown:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        if line.strip():
            none = False
            yield line.rstrip("\n")
    if none and not sys.stdin.isatty():
        raise SteerError("there is no message: the input is empty", "for example `echo Hello | steer chat --plain`")
