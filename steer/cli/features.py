"""`steer features`: find features by their labels, and look at one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from steer.cli import engines
from steer.cli.options import Json, app, command, narrate, put
from steer.config import Settings
from steer.errors import SteerError
from steer.events import clean, clean_line
from steer.session import FeatureCard

features = typer.Typer(help="Find features and look at them.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(features, name="features")


@command(features)
def search(
    settings: Settings,
    query: Annotated[
        str, typer.Argument(help="Words of the label; also `id:`, `max:>5`, `density:<1%`, `is:unlabelled`.")
    ],
    limit: Annotated[int, typer.Option(help="At most so many.", metavar="N")] = 20,
    json: Json = False,
) -> None:
    """List the features whose labels match, best first."""
    if limit < 1:
        raise SteerError(f"--limit is {limit}", "give at least 1")
    found = engines.make_engine(settings).search(query, limit)
    for card in found[:limit]:
        if json:
            put(_entry(card))
        else:
            print(_line(card))
    if not found:
        narrate(f"no feature matches `{clean(query)}`")


@command(features)
def show(
    settings: Settings,
    latent: Annotated[int, typer.Argument(help="The latent's number.", metavar="ID")],
    limit: Annotated[int | None, typer.Option(help="At most so many examples of each kind.", metavar="N")] = None,
    json: Json = False,
) -> None:
    """Show one feature: label, statistics, what it promotes, examples."""
    card = engines.make_engine(settings).card(latent)
    examples = [example for place, example in enumerate(card.examples) if limit is None or _nth(card, place) < limit]
    if json:
        put(_entry(card) | _details(card, examples))
        return
    print(_line(card))
    for what, tokens in (("promotes", card.promotes), ("suppresses", card.suppresses)):
        print(f"{what:>10}  " + "  ".join(f"{clean(repr(token))} {effect:+.2f}" for token, effect in tokens))
    for kind, texts, activations in examples:
        most = max(activations, default=0.0)
        marked = "".join(
            f"[{text}]" if on > most / 2 > 0 else text for text, on in zip(texts, activations, strict=True)
        )
        print(f"{kind:>10}  {most:6.2f}  {clean_line(marked)}")


def _nth(card: FeatureCard, place: int) -> int:
    """How many examples of the same kind stand before one."""
    return sum(example[0] == card.examples[place][0] for example in card.examples[:place])


def _entry(card: FeatureCard) -> dict[str, Any]:
    return {
        "latent": card.latent,
        "label": card.label,
        "author": card.author,
        "max_activation": card.max_activation,
        "mean_on": card.mean_on,
        "density": card.density,
    }


def _details(card: FeatureCard, examples: list[tuple[str, tuple[str, ...], tuple[float, ...]]]) -> dict[str, Any]:
    return {
        "examples": [
            {"kind": kind, "tokens": texts, "activations": activations} for kind, texts, activations in examples
        ],
        "promotes": [{"text": text, "effect": effect} for text, effect in card.promotes],
        "suppresses": [{"text": text, "effect": effect} for text, effect in card.suppresses],
    }


def _line(card: FeatureCard) -> str:
    most = "" if card.max_activation is None else f"{card.max_activation:.2f}"
    density = "" if card.density is None else f"{card.density:.3%}"
    return f"{card.latent:>7}  max {most:>7}  on {density:>8}  {clean_line(card.label)}".rstrip()
