"""`steer inspect`: the features of every token of a text, or the latents ranked over the whole text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from llama_3.ranks import world
from steer.cli import engines
from steer.cli.complete import hit_entry
from steer.cli.options import Chat, Json, command, given_text, narrate, put, put_row
from steer.config import Settings
from steer.errors import SteerError
from steer.events import LatentHit, TokenEvent, clean, clean_line
from steer.files import write_whole

if TYPE_CHECKING:
    from steer.engine import Engine

Aggregate = Literal["mean", "last", "max"]


@command()
def inspect(
    settings: Settings,
    text: Annotated[str | None, typer.Argument(help="The text; without it, all of stdin.")] = None,
    top: Annotated[
        int | None, typer.Option(help="Features per token, or of the text (default 5, 20).", metavar="N")
    ] = None,
    chat: Chat = False,
    by: Annotated[
        Literal["token", "text"], typer.Option(help="Features of each token, or ranked over the text.")
    ] = "token",
    aggregate: Annotated[
        Aggregate | None,
        typer.Option(help="How `--by text` ranks: over tokens but the first and special (default mean)."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.", metavar="FILE")] = None,
    ablate: Annotated[
        int | None,
        typer.Option(help="How the log-likelihood of each token changes without this latent.", metavar="ID"),
    ] = None,
    json: Json = False,
) -> None:
    """Show which features are active on each token of a text."""
    if top is not None and top < 1:
        raise SteerError(f"--top is {top}", "give at least 1")
    if ablate is not None and (by == "text" or html is not None):
        raise SteerError("--ablate goes token by token", "leave out `--by text` and `--html`")
    if aggregate is not None and by != "text":
        raise SteerError("--aggregate is how a text's features are ranked", "add `--by text`, or leave it out")
    for name, typed in (("--by text", by == "text"), ("--top", top is not None), ("--json", json)):
        if typed and html is not None:
            raise SteerError(f"--html writes a page of every token, and {name} is not for it", "leave one of them out")
    wanted = given_text(text, "text")
    engine = engines.load_engine(settings) if ablate is not None else engines.make_engine(settings)
    if engine.info.hook is None:
        raise SteerError("there is no SAE to read features with", "pass `--sae FOLDER`")
    tokens = engine.inspect(wanted, chat=chat)
    if ablate is not None:
        _ablated(cast("Engine", engine), tokens, ablate, top, json)
        return
    names = engine.labels(sorted({hit.latent for token in tokens for hit in token.hits}))
    if html is not None:
        from steer.cli.page import page

        write_whole(html, page(tokens, names, engine.info).encode())
        narrate(f"wrote {html}")
    elif by == "text":
        _by_text(tokens, names, aggregate or "mean", top or 20, json)
    elif json:
        for token in tokens:
            hits = [hit_entry(hit, names) for hit in token.hits[:top]]
            put({"index": token.index, "token": token.token, "text": token.text, "hits": hits})
    else:
        for token in tokens:
            named = [
                f"{hit.latent:>6} {hit.activation:>8.2f}  {clean_line(names.get(hit.latent, ''))}"
                for hit in token.hits[: top or 5]
            ]
            first, *more = named or [""]
            put_row(f"{token.index:>5}  {clean(repr(token.text)):<18}  {first}")
            for line in more:
                put_row(f"{'':27}{line}")


def rank(tokens: Sequence[TokenEvent], aggregate: Aggregate) -> list[tuple[int, float, int]]:
    """(latent, value, tokens it is active on), highest value first; where the SAE is not read does not count."""
    read = [token for token in tokens if token.index > 0 and not token.special]
    activations: dict[int, list[float]] = defaultdict(list)
    for token in read[-1:] if aggregate == "last" else read:
        for hit in token.hits:
            activations[hit.latent].append(hit.activation)
    whole = len(read) if aggregate == "mean" else 1
    value = {latent: (max(some) if aggregate == "max" else sum(some) / whole) for latent, some in activations.items()}
    return sorted(
        ((latent, value[latent], len(some)) for latent, some in activations.items()), key=lambda row: (-row[1], row[0])
    )


def _by_text(tokens: Sequence[TokenEvent], names: dict[int, str], aggregate: Aggregate, top: int, json: bool) -> None:
    for latent, value, count in rank(tokens, aggregate)[:top]:
        if json:
            put(hit_entry(LatentHit(latent, value), names) | {"aggregate": aggregate, "tokens": count})
        else:
            on = f"on {count:>4} token{' ' if count == 1 else 's'}"
            put_row(f"{latent:>7}  {value:>8.3f}  {on}  {clean_line(names.get(latent, ''))}")


def _ablated(engine: Engine, tokens: Sequence[TokenEvent], latent: int, top: int | None, json: bool) -> None:
    """The tokens with their log-likelihoods, and how those change when the latent is taken out."""
    from steer.analysis.attribution import ablate
    from steer.resolve import hook_of

    if world() > 1:
        raise SteerError("--ablate is for one process", "leave out torchrun")
    assert engine.sae is not None
    ids = [token.token for token in tokens]
    changes = ablate(engine.model, engine.tokenizer, engine.sae, hook_of(engine.sae), ids, latent)
    names = engine.labels(sorted({latent, *(hit.latent for token in tokens for hit in token.hits)}))
    if json:
        for token, change in zip(tokens, changes, strict=True):
            hits = [hit_entry(hit, names) for hit in token.hits[:top]]
            entry = {"index": token.index, "token": token.token, "text": token.text, "hits": hits, "ablated": latent}
            values = {"activation": change.activation, "logprob": change.logprob, "change": change.change}
            put(entry | {name: None if value is None else float(f"{value:.6g}") for name, value in values.items()})
        return
    print(f"{'token':>5}  {'':<18}  {'log-prob':>8}  {'change':>8}  activation of {latent}")
    for token, change in zip(tokens, changes, strict=True):
        figures = "" if change.change is None else f"{change.logprob:>8.3f}  {change.change:>+8.3f}"
        on = f"{change.activation:.2f}" if change.activation else ""
        print(f"{token.index:>5}  {clean(repr(token.text)):<18}  {figures:>18}  {on}".rstrip())
    total = sum(change.change or 0.0 for change in changes)
    count = sum(change.activation > 0 for change in changes)
    name = f" ({names[latent]})" if names.get(latent) else ""
    narrate(f"latent {latent}{name} is on at {count} of {len(tokens)} tokens; without it the text's")
    narrate(f"log-likelihood changes by {total:+.3f} nats")
