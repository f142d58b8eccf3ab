"""`steer patch`: where the run of one prompt carries what makes it end otherwise than another."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli import engines
from steer.cli.options import Chat, Json, command, narrate, put
from steer.cli.why import one_token, prompt_tokens
from steer.config import Settings
from steer.errors import SteerError
from steer.events import clean as cleaned

if TYPE_CHECKING:
    from llama_3.hooks import HookPoint
    from steer.analysis.patching import Patching
    from steer.engine import Engine

WIDTH = 8


@command()
def patch(
    settings: Settings,
    clean: Annotated[str, typer.Argument(help="The prompt whose activations are put into the other's run.")],
    corrupt: Annotated[str, typer.Argument(help="The prompt that is run; it has as many tokens.")],
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="Hook point, or a site such as resid_post (default) for all layers; repeatable.", metavar="HOOK"
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Positions, such as 4..7 or 5; default from the first that differs.", metavar="RANGE"),
    ] = None,
    latents: Annotated[
        str | None,
        typer.Option(help="Patch only what these latents contribute, at the SAE's hook.", metavar="ID,ID"),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="An id in digits alone, else a text; default: the clean prompt's likeliest token.",
            metavar="TEXT_OR_ID",
        ),
    ] = None,
    wrong: Annotated[
        str | None,
        typer.Option(
            help="An id in digits alone, else a text; default: the corrupt prompt's likeliest token.",
            metavar="TEXT_OR_ID",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw it too: .html, or .png, .svg, .pdf.", metavar="FILE")
    ] = None,
    chat: Chat = False,
    json: Json = False,
) -> None:
    """Put activations of one prompt into another's run, place by place."""
    from steer.cli.heatmap import check_picture, write_picture

    if picture is not None:
        check_picture(picture)
    wanted = _positions(tokens)
    chosen = _latents(latents)
    engine = engines.load_engine(settings)
    points = _points(engine, at, bool(chosen))
    for latent in chosen:
        engine.card(latent)  # refuses one that there is not
    from steer.analysis.patching import patch as run

    found = run(
        engine.model,
        engine.tokenizer,
        prompt_tokens(engine, clean, chat),
        prompt_tokens(engine, corrupt, chat),
        points,
        wanted,
        answer=None if answer is None else one_token(engine.tokenizer, answer, "--answer"),
        wrong=None if wrong is None else one_token(engine.tokenizer, wrong, "--wrong"),
        sae=engine.sae,
        latents=chosen,
    )
    if json:
        _put(found)
    else:
        _print(found)
    if picture is not None:
        write_picture(picture, found)
        narrate(f"wrote {picture}")


def _positions(text: str | None) -> range | None:
    """The positions of a RANGE: `4..7` (inclusive) or `5`; a `SteerError` for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text.strip(), re.ASCII)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise SteerError(f"--tokens is {text!r}", "write a range such as 4..7, or one position")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _latents(text: str | None) -> list[int]:
    """The numbers in a list of latents."""
    if text is None:
        return []
    parts = re.split(r"[,\s]+", text.strip())
    if not all(re.fullmatch(r"\d{1,9}", part, re.ASCII) for part in parts):
        raise SteerError(f"--latents is {text!r}", "write their numbers, such as 2229,2005")
    return [int(part) for part in parts]


def _points(engine: Engine, at: Sequence[str] | None, of_latents: bool) -> list[HookPoint]:
    """The hook points meant; a `SteerError` for latents anywhere but at their own SAE's."""
    from llama_3.hooks import SITES, HookPoint
    from steer.resolve import hook_of

    layers = range(engine.model.config.n_layers)
    points: list[HookPoint] = []
    for one in at or (["resid_post"] if not of_latents else []):
        points += [HookPoint(layer, one) for layer in layers] if one in SITES else [HookPoint.parse(one)]
    if of_latents:
        if engine.sae is None:
            raise SteerError("there is no SAE whose latents could be patched", "pass `--sae FOLDER`")
        own = hook_of(engine.sae)
        if any(point != own for point in points):
            raise SteerError(f"the latents stand at {own}", "leave out --at")
        points = [own]
    return list(dict.fromkeys(points))


def _put(found: Patching) -> None:
    about = {
        "answer": {"token": found.answer.token, "text": found.answer.text},
        "wrong": {"token": found.wrong.token, "text": found.wrong.text},
        "clean_difference": float(f"{found.clean:.6g}"),
        "corrupt_difference": float(f"{found.corrupt:.6g}"),
    }
    for cell in found.cells:
        ours, theirs = found.tokens[cell.index]
        recovered = None if cell.recovered is None else float(f"{cell.recovered:.6g}")
        entry = {"hook": cell.hook, "index": cell.index, "clean": ours, "corrupt": theirs}
        put(entry | {"difference": float(f"{cell.difference:.6g}"), "recovered": recovered} | about)


def _print(found: Patching) -> None:
    """One table of hooks by positions, in as many blocks as the terminal's width asks for."""
    answer, wrong = cleaned(repr(found.answer.text)), cleaned(repr(found.wrong.text))
    print(f"logit of {answer} less that of {wrong}: clean {found.clean:+.3f}, corrupt {found.corrupt:+.3f}")
    hooks = list(dict.fromkeys(cell.hook for cell in found.cells))
    names = [hook.removeprefix("blocks.").replace(".hook_", " ") for hook in hooks]
    first = max(map(len, names)) + 1
    of = {(cell.hook, cell.index): cell.difference for cell in found.cells}
    positions = sorted({cell.index for cell in found.cells})
    size = max(1, (shutil.get_terminal_size((80, 24)).columns - first) // WIDTH)
    for start in range(0, len(positions), size):
        some = positions[start : start + size]
        print()
        print(" " * first + "".join(f"{place:>{WIDTH}}" for place in some))
        for side in (0, 1):
            texts = (cleaned(repr(found.tokens[place][side])[1:-1])[: WIDTH - 1] for place in some)
            print(("clean", "corrupt")[side].ljust(first) + "".join(f"{text:>{WIDTH}}" for text in texts))
        for hook, name in zip(hooks, names, strict=True):
            print(name.ljust(first) + "".join(f"{of[hook, place]:>+{WIDTH}.2f}" for place in some))
