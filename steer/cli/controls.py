"""`steer controls`: an edit beside a random direction, its opposite, another latent, and a plain request."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli import engines
from steer.cli.options import Chat, Json, command, narrate, put
from steer.config import Settings
from steer.edits import GRAMMAR, Edit
from steer.errors import ExitCode, SteerError
from steer.events import clean_line
from steer.session import Prompt, Role, check_max_tokens, check_seed

if TYPE_CHECKING:
    from steer.analysis.controls import Control

ASKS = {True: "{prompt} It should be about {topic}.", False: "A story about {topic}. {prompt}"}
"""How a prompt asks for the topic, in a chat and in a text that goes on."""


@command(sampled=True)
def controls(
    settings: Settings,
    edit: Annotated[str, typer.Argument(help=f"{GRAMMAR}; one that adds to a latent.", metavar="EDIT")],
    topic: Annotated[str, typer.Option(help="Words that are counted; the first names it.", metavar="WORDS,WORDS...")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What replies begin with; repeatable.", metavar="TEXT")
    ] = None,
    ask: Annotated[
        str | None,
        typer.Option(help="The prompt that asks for the topic, with {prompt} and {topic}.", metavar="TEXT"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Replies to each prompt under each condition.", metavar="N")] = 50,
    chat: Chat = False,
    json: Json = False,
) -> int:
    """Run an edit against its controls: share of replies on the topic, its words, perplexity, with intervals.

    Replies take the seeds from --seed on, 0 where none is given.
    """
    if seeds < 2:
        raise SteerError(f"--seeds is {seeds}", "give at least 2: an interval needs more than one reply")
    parsed, words = Edit.parse(edit), [word.strip() for word in topic.split(",") if word.strip()]
    texts = prompt or ["Tell me a story." if chat else "Once upon a time"]
    asked = [
        (ask or ASKS[chat]).replace("{prompt}", text).replace("{topic}", words[0] if words else "") for text in texts
    ]
    first = check_seed(settings.seed or 0)
    check_seed(first + seeds - 1)
    limit = 60 if settings.max_tokens is None else check_max_tokens(settings.max_tokens)
    from steer.analysis.controls import run_controls

    engine = engines.load_engine(settings, many=True)
    found = run_controls(
        engine,
        parsed,
        words,
        [_prompt(text, chat, settings.system) for text in texts],
        [_prompt(text, chat, settings.system) for text in asked],
        seeds=seeds,
        seed=first,
        tokens=limit,
        sampling=settings.sampling(engine.defaults),
        on_done=lambda done, of: narrate(f"{done} of {of} replies"),
    )
    if json:
        for one in found:
            put({"condition": one.name, "edit": str(parsed), "asked": asked[0]} | asdict(one))
    else:
        _show(found)
        narrate(f"asked: {clean_line(asked[0])}")
    return ExitCode.DONE


def _prompt(text: str, chat: bool, system: str | None) -> Prompt:
    head: tuple[tuple[Role, str], ...] = (("system", system),) if system else ()
    return Prompt(messages=(*head, ("user", text))) if chat else Prompt(text=text)


def _show(found: list[Control]) -> None:
    """A line for each condition, with 95% intervals."""
    print("condition   replies on topic        words in 100            perplexity")
    for one in found:
        rate = f"{one.rate.value:4.0%}  {one.rate.low:3.0%} to {one.rate.high:3.0%}"
        words = f"{one.words.value:5.1f}  {one.words.low:4.1f} to {one.words.high:4.1f}"
        perplexity = f"{one.perplexity.value:6.1f}  {one.perplexity.low:5.1f} to {one.perplexity.high:5.1f}"
        print(f"{one.name:<10} {rate:<23} {words:<23} {perplexity}")
