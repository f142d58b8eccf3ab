"""`steer why`: which latents pushed a token up or down, or, with `--latent`, which tokens made a latent fire."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steer.cli import engines
from steer.cli.options import Chat, Json, command, given_text, narrate, put, put_row
from steer.config import Settings
from steer.errors import SteerError
from steer.events import clean, clean_line

if TYPE_CHECKING:
    from llama_3.hooks import HookPoint
    from llama_3.tokenizer import Tokenizer
    from sae.model import SAE
    from steer.analysis.attribution import Choice, LatentEffect, WhyLatent, WhyToken
    from steer.engine import Engine

CHECKED = 20
"""Latents that are ablated one by one where `--top` says nothing."""
SHOWN = 10


By = Literal["raw", "normalised"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What both questions are asked with."""

    index: int | None
    by: By
    top: int | None
    json: bool

    @property
    def check(self) -> int:
        """How many latents are ablated one by one."""
        return self.top or (CHECKED if self.json else SHOWN)


@command()
def why(
    settings: Settings,
    prompt: Annotated[str | None, typer.Argument(help="The text; without it, all of stdin.")] = None,
    token: Annotated[
        int | None,
        typer.Option(
            help="Its index, as `steer inspect` numbers them (BOS is 0); without it, the token that would come next.",
            metavar="N",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help='Explain the difference to this token: an id in digits alone, else a text (" 4").',
            metavar="TEXT_OR_ID",
        ),
    ] = None,
    latent: Annotated[
        int | None, typer.Option(help="Explain why this latent is on at the token.", metavar="ID")
    ] = None,
    through: Annotated[
        str | None,
        typer.Option(help="With --latent: by the latents of this SAE of an earlier layer.", metavar="DIR"),
    ] = None,
    by: Annotated[
        By,
        typer.Option(help="Rank by effect, or by effect over max activation times log of rarity."),
    ] = "raw",
    top: Annotated[
        int | None, typer.Option(help="So many rows (default 10, with --json all), each checked.", metavar="N")
    ] = None,
    chat: Chat = False,
    json: Json = False,
) -> None:
    """Say which features pushed a token up or down, or what made a feature fire."""
    if top is not None and top < 1:
        raise SteerError(f"--top is {top}", "give at least 1")
    if latent is None and through is not None:
        raise SteerError("--through goes with --latent", "add `--latent ID`, or leave it out")
    if latent is not None and through is None and by != "raw":
        raise SteerError(f"--by {by} ranks latents, and --latent alone ranks tokens", "add `--through DIR`")
    if latent is not None and against is not None:
        raise SteerError("--against explains a token, --latent a latent", "leave one of them out")
    wanted = given_text(prompt, "prompt")
    if prompt in (None, "-"):
        wanted = wanted.removesuffix("\n")  # what `echo` adds is no part of the prompt
    engine = engines.load_engine(settings)
    if engine.sae is None:
        raise SteerError("there is no SAE to read features with", "pass `--sae FOLDER`")
    tokens = prompt_tokens(engine, wanted, chat)
    ask = Wanted(token, by, top, json)
    if latent is None:
        _why_token(engine, tokens, against, ask)
    else:
        _why_latent(engine, tokens, latent, through, ask)


def _why_token(engine: Engine, tokens: list[int], against: str | None, ask: Wanted) -> None:
    from steer.analysis.attribution import why_token
    from steer.resolve import hook_of

    assert engine.sae is not None
    other = None if against is None else one_token(engine.tokenizer, against, "--against")
    hook = hook_of(engine.sae)
    found = why_token(
        engine.model, engine.tokenizer, engine.sae, hook, tokens, ask.index, against=other, check=ask.check, by=ask.by
    )
    if ask.json:
        about = {"index": found.index, "target": _choice(found.target)}
        about |= {"against": found.against and _choice(found.against)}
        _put_latents(found.latents[: ask.top], engine.labels, about | _totals(found))
        return
    said = f"token {found.index} {_shown(found.target)}"
    if found.against is not None:
        print(f"{said}, against {_shown(found.against)}")
    else:
        print(said)
    print("  likeliest: " + ", ".join(_shown(choice) for choice in found.likeliest[:3]))
    _print_latents(found.latents[: ask.check], engine.labels, tokens, engine.tokenizer)
    _print_totals(found, len(found.latents), "latents")


def _why_latent(engine: Engine, tokens: list[int], latent: int, through: str | None, ask: Wanted) -> None:
    from steer.analysis.attribution import why_latent
    from steer.resolve import hook_of

    assert engine.sae is not None
    below = None if through is None else _other_sae(engine, Path(through))
    hook = hook_of(engine.sae)
    found = why_latent(
        engine.model, engine.tokenizer, engine.sae, hook, tokens, latent, ask.index,
        through=below, check=ask.check, by=ask.by,
    )  # fmt: skip
    name = engine.labels([latent]).get(latent, "")
    if ask.json:
        about = {"index": found.index, "of": latent, "activation": _number(found.activation)}
        _put_latents(found.latents[: ask.top], lambda _: {}, about | _totals(found))
        for effect in found.tokens[: ask.top]:
            figures = {"attribution": _number(effect.attribution), "ablation": _number(effect.removed)}
            put({"index": effect.index, "token": effect.token, "text": effect.text} | figures | {"about": about})
        return
    text = clean(repr(engine.tokenizer.token_text(tokens[found.index])))
    print(f"latent {latent} is at {found.activation:.2f} on token {found.index} {text}  {clean_line(name)}".rstrip())
    if below is not None:
        _print_latents(found.latents[: ask.check], lambda _: {}, tokens, engine.tokenizer)
        _print_totals(found, len(found.latents), f"latents at {below[1]}")
        return
    print(f"{'token':>7}  {'replaced':>8} {'once':>8}")
    for effect in found.tokens[: ask.check]:
        print(f"{effect.index:>7}  {_signed(effect.removed)} {_signed(effect.attribution)}  {clean(repr(effect.text))}")
    if len(found.tokens) < found.index:
        narrate(f"only the nearest {len(found.tokens)} tokens were tried")


def prompt_tokens(engine: Engine, text: str, chat: bool) -> list[int]:
    """The token ids of a prompt as `steer inspect` reads it; a `SteerError` for one that the model cannot hold."""
    from llama_3.chat_format import Message

    context, tokenizer = engine.model.config.max_context, engine.tokenizer
    if chat:
        return engine.chat_format.fit_dialog([Message("user", text)], context)[0]
    tokens = tokenizer.encode(text.removeprefix(tokenizer.token_text(tokenizer.bos_id)), bos=True)
    if len(tokens) > context:
        raise SteerError(f"the prompt has {len(tokens)} tokens, the model holds {context}", "shorten it")
    return tokens


def one_token(tokenizer: Tokenizer, given: str, option: str) -> int:
    """The id that was typed in digits and nothing else, or that of a text which is one token; ` 4` is a text."""
    if given.isdecimal() and given.isascii():
        token = int(given)
        if token >= tokenizer.vocab_size and token not in tokenizer.special_ids:
            raise SteerError(f"{option} is {token}, and the vocabulary has {tokenizer.vocab_size:,} tokens, from 0")
        return token
    found = tokenizer.encode(given)
    if len(found) != 1:
        split = " ".join(repr(tokenizer.token_text(token)) for token in found) or "nothing"
        raise SteerError(
            f"{option} {given!r} is {len(found)} tokens: {split}",
            "give the text of one, its space included, or its id",
        )
    return found[0]


def _other_sae(engine: Engine, folder: Path) -> tuple[SAE, HookPoint]:
    """The SAE in a folder, fit for the engine's model, and where it stands."""
    from sae.checkpoint import load_sae
    from steer.resolve import check_together, hook_of

    sae = load_sae(folder, str(engine.model.device))
    check_together(engine.model.config, sae, None)
    return sae, hook_of(sae)


def _number(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _choice(choice: Choice) -> dict[str, Any]:
    return {"token": choice.token, "text": choice.text, "logprob": _number(choice.logprob)}


def _shown(choice: Choice) -> str:
    return f"{clean(repr(choice.text))} {math.exp(choice.logprob):.1%}"


def _signed(value: float | None) -> str:
    return f"{'':>8}" if value is None else f"{value:>+8.3f}"


def _totals(found: WhyToken | WhyLatent) -> dict[str, Any]:
    return {
        "error": _number(found.error),
        "error_ablation": _number(found.error_removed),
        "total": _number(found.total),
        "together": _number(found.together),
    }


def _put_latents(effects: Sequence[LatentEffect], labels: Any, about: dict[str, Any]) -> None:
    names = labels([effect.latent for effect in effects])
    for effect in effects:
        places = [
            {"index": place.index, "activation": _number(place.activation), "attribution": _number(place.attribution)}
            for place in effect.places
        ]
        entry: dict[str, Any] = {"latent": effect.latent, "attribution": _number(effect.attribution)}
        entry |= {"gradient": _number(effect.gradient), "ablation": _number(effect.removed)}
        entry |= {"normalised": _number(effect.normalised), "label": names.get(effect.latent, "")}
        put(entry | {"places": places, "about": about})


def _print_latents(effects: Sequence[LatentEffect], labels: Any, tokens: Sequence[int], tokenizer: Tokenizer) -> None:
    names = labels([effect.latent for effect in effects])
    print(f"{'latent':>7}  {'ablated':>8} {'estimate':>8} {'norm.':>8}  most at")
    for effect in effects:
        place = effect.places[0].index
        where = f"{place} {clean(repr(tokenizer.token_text(tokens[place])))}"
        figures = f"{_signed(effect.removed)} {_signed(effect.attribution)} {_signed(effect.normalised)}"
        put_row(f"{effect.latent:>7}  {figures}  {where:<16}  {clean_line(names.get(effect.latent, ''))}")


def _print_totals(found: WhyToken | WhyLatent, count: int, what: str) -> None:
    print(f"{'error':>7}  {_signed(found.error_removed)} {_signed(found.error)}")
    narrate(f"{count} {what} and the error: the estimates add up to {found.total:+.3f};")
    narrate(f"all removed at once take {found.together:+.3f}, since each estimate speaks of one removal alone")
