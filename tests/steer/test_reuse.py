"""What a chat has read is not read again, and nobody can tell: tokens, hits and report are those of a fresh engine."""

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer.edits import SteeringSet
from steer.engine import Engine
from steer.events import Event, Finished, PromptRead, TokenEvent
from steer.session import Prompt, Sampling, Session
from tests.steer.test_engine import end, steering, tiny_sae, tokens
from tests.tiny import byte_tokenizer, tiny_model

torch.set_num_threads(1)

SETS = (
    steering(),
    steering("3 6"),
    steering("clamp 5 4", "7 -3"),
    steering("3 6 on generated"),
    steering("9 5 on prompt", "3 2"),
    steering("bias 4 3"),
    steering("3 6 when 5 > 0.1 ramp 4", "7 4 for 5 tokens"),
    steering("floor 9 3 on last", "cap 5 1 on 2..6", "project 11 on assistant"),
)


@pytest.fixture(scope="module")
def fresh() -> Engine:
    return Engine(tiny_model(), byte_tokenizer(), tiny_sae())


def engine_like(engine: Engine, hook: str | None = None) -> Engine:
    if hook is None:
        return Engine(engine.model, engine.tokenizer, engine.sae)
    return Engine(engine.model, engine.tokenizer, tiny_sae(hook=hook))


def reads(engine: Engine, block: int = 0) -> list[int]:
    """From now on, the number of tokens of each forward pass through a block."""
    counts: list[int] = []

    def count(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(output.shape[1])

    engine.model.blocks[block].register_forward_hook(count)
    return counts


# Letters only, so that a reply is read back as the very tokens that it was written in.
LETTERS = tuple((token, -math.inf) for token in range(272) if not 97 <= token <= 122 and token != 32)


def ask(engine: Engine, prompt: Prompt, sets: list[SteeringSet], reuse: bool) -> list[Event]:
    """One reply; after n tokens have come the nth of `sets` is in force, the last one to the end."""
    events: list[Event] = []
    for event in engine.stream(
        [prompt],
        lambda: sets[min(len(tokens(events)), len(sets) - 1)],
        sampling=Sampling(0.8, logit_bias=LETTERS),
        seeds=[7],
        max_tokens=9,
        reuse=reuse,
    ):
        events.append(event)  # noqa: PERF402 (the set is asked for while they come)
    return events


def assert_same(ours: list[Event], theirs: list[Event]) -> None:
    assert tokens(ours) == tokens(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert type(mine) is type(other)
        pairs = []
        if isinstance(mine, PromptRead) and isinstance(other, PromptRead):
            pairs = list(zip(mine.tokens, other.tokens, strict=True))
        elif isinstance(mine, TokenEvent) and isinstance(other, TokenEvent):
            pairs = [(mine, other)]
            assert mine.logprob == pytest.approx(other.logprob, rel=1e-4, abs=1e-5)
        for a, b in pairs:
            assert (a.index, a.token, a.text) == (b.index, b.token, b.text)
            assert {hit.latent: hit.activation for hit in a.hits} == pytest.approx(
                {hit.latent: hit.activation for hit in b.hits}, rel=1e-3, abs=1e-4
            )
    mine, other = end(ours), end(theirs)
    assert mine.finish == other.finish
    assert (mine.report.steps, mine.report.applied) == (other.report.steps, other.report.applied)
    assert (mine.report.first, mine.report.last) == (other.report.first, other.report.last)
    for a, b in zip(mine.report.edits, other.report.edits, strict=True):
        assert (a.text, a.positions, a.lost) == (b.text, b.positions, b.lost)
        assert a.before == pytest.approx(b.before, rel=1e-3, abs=1e-4)
        assert a.after == pytest.approx(b.after, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"])
@settings(max_examples=12, deadline=None)
@given(turns=st.lists(st.lists(st.sampled_from(SETS), min_size=1, max_size=4), min_size=2, max_size=4))
def test_a_chat_that_reuses_equals_one_that_reads_all_anew(
    fresh: Engine, hook: str, turns: list[list[SteeringSet]]
) -> None:
    chat, anew = engine_like(fresh, hook), engine_like(fresh, hook)
    text = "Once upon"
    for number, sets in enumerate(turns):
        ours, theirs = (ask(engine, Prompt(text=text), sets, engine is chat) for engine in (chat, anew))
        assert_same(ours, theirs)
        said = "".join(event.text for event in ours if isinstance(event, TokenEvent) and not event.special)
        text += said + f" and {number}"


@pytest.mark.parametrize(
    "hooks",
    [
        ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_resid_post", "blocks.1.hook_resid_mid"),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"),
        ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"),
    ],
)
@settings(max_examples=15, deadline=None)
@given(turns=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=2, max_size=4))
def test_so_does_one_with_several_saes_and_vectors_below_them(
    fresh: Engine, tmp_path_factory: pytest.TempPathFactory, hooks: tuple[str, str], turns: list[list[int]]
) -> None:
    saes = [tiny_sae(hook=hook) for hook in hooks]
    file = tmp_path_factory.getbasetemp() / "direction.npy"
    np.save(file, np.linspace(-1, 1, fresh.model.config.d_model, dtype=np.float32))
    sets = [
        steering(),
        steering("3 6", f"9 -4 at {hooks[0]}"),
        steering(f"clamp 5 4 at {hooks[1]}"),
        steering(f"vector {file} 3 at blocks.0.hook_resid_post"),
        steering(f"vector {file} -2 at blocks.0.hook_resid_pre on generated", "3 6"),
        steering(f"7 5 when 5 > 0.2 at {hooks[0]}"),
        steering(f"vector {file} 4 at blocks.1.hook_resid_pre on 2..5"),
    ]
    chat, anew = (Engine(fresh.model, fresh.tokenizer, saes) for _ in range(2))
    text = "Once upon"
    for number, chosen in enumerate(turns):
        used = [sets[one] for one in chosen]
        ours, theirs = (ask(engine, Prompt(text=text), used, engine is chat) for engine in (chat, anew))
        assert_same(ours, theirs)
        said = "".join(event.text for event in ours if isinstance(event, TokenEvent) and not event.special)
        text += said + f" and {number}"


@pytest.mark.parametrize("hook", ["blocks.1.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid"])
def test_hits_follow_an_edit_that_comes_and_goes_below_the_sae_in_its_own_block(
    fresh: Engine, tmp_path: Path, hook: str
) -> None:
    np.save(file := tmp_path / "direction.npy", np.linspace(-1, 1, fresh.model.config.d_model, dtype=np.float32))
    chat, anew = engine_like(fresh, hook), engine_like(fresh, hook)
    for one in (steering(), steering(f"vector {file} 3 at blocks.1.hook_resid_pre"), steering("3 6"), steering()):
        assert_same(*(ask(engine, Prompt(text="Once upon"), [one], engine is chat) for engine in (chat, anew)))


def test_only_what_is_new_is_read_and_a_changed_set_runs_nothing_below_its_hook() -> None:
    engine = Engine(tiny_model(), byte_tokenizer(), tiny_sae())
    below, above = reads(engine, 0), reads(engine, 1)
    reply = ask(engine, Prompt(text="abc"), [SETS[0]], True)
    assert below == above == [4] + [1] * 9
    said = "".join(event.text for event in reply if isinstance(event, TokenEvent))
    assert len(said) == 9
    for sets, text, ours, theirs in (
        (SETS[0], "abc" + said + "xyz", [3], [3]),  # the reply was read as it was written
        (SETS[1], "abc" + said + "xyz", [1], [15, 1]),  # another set: block 0 reads the last token, block 1 all
        (SETS[1], "abc" + said + "xyz", [1], [1]),
        (SETS[1], "abd", [1], [1]),
    ):
        below.clear()
        above.clear()
        ask(engine, Prompt(text=text), [sets], True)
        assert below == ours + [1] * 9 and above == theirs + [1] * 9


def test_another_chat_and_other_calls_between_do_no_harm(fresh: Engine) -> None:
    chat, anew = engine_like(fresh), engine_like(fresh)
    for text, reuse in (("one two", True), ("something else", True), ("batch", False), ("one two three", True)):
        ours, theirs = ask(chat, Prompt(text=text), [SETS[1]], reuse), ask(anew, Prompt(text=text), [SETS[1]], False)
        assert_same(ours, theirs)


def test_a_reply_that_was_stopped_or_abandoned_leaves_a_good_cache(fresh: Engine) -> None:
    chat, anew = engine_like(fresh), engine_like(fresh)
    stop = threading.Event()
    stream = chat.stream([Prompt(text="abcdef")], lambda: SETS[1], seeds=[1], max_tokens=30, stop=stop, reuse=True)
    for _ in range(4):
        next(stream)
    stop.set()
    assert isinstance(list(stream)[-1], Finished)
    assert_same(
        ask(chat, Prompt(text="abcdefgh"), [SETS[2]], True), ask(anew, Prompt(text="abcdefgh"), [SETS[2]], False)
    )
    stream = chat.stream([Prompt(text="abcdefghij")], lambda: SETS[4], seeds=[1], max_tokens=30, reuse=True)
    next(stream)
    del stream  # walks away in the middle
    assert_same(ask(chat, Prompt(text="abcdefg"), [SETS[1]], True), ask(anew, Prompt(text="abcdefg"), [SETS[1]], False))


def test_a_reply_without_hits_is_never_taken_for_one_with(fresh: Engine) -> None:
    chat, anew = engine_like(fresh), engine_like(fresh)
    list(chat.stream([Prompt(text="abcdef")], lambda: SETS[0], seeds=[7], max_tokens=5, hits=False, reuse=True))
    assert_same(ask(chat, Prompt(text="abcdef"), [SETS[0]], True), ask(anew, Prompt(text="abcdef"), [SETS[0]], False))


def test_a_model_without_an_sae_reuses_too(fresh: Engine) -> None:
    engine = Engine(tiny_model(), byte_tokenizer())
    counts = reads(engine)
    first = ask(engine, Prompt(text="abcdef"), [SETS[0]], True)
    counts.clear()
    assert tokens(ask(engine, Prompt(text="abcdef"), [SETS[0]], True)) == tokens(first)
    assert counts[0] == 1


def test_a_session_reuses_what_it_has_read(fresh: Engine) -> None:
    engine = Engine(tiny_model(), byte_tokenizer(), tiny_sae())
    counts = reads(engine)
    session = Session(engine, seed=3, max_tokens=6)
    for text in ("hello there", "and again"):
        session.say(text)
        counts.clear()
        list(session.reply(threading.Event()))
    read = session.turns[-1].reply
    assert read is not None and read.prompt is not None
    assert counts[0] < len(read.prompt.tokens) - 10


def test_stop_strings_end_a_reply_before_them(fresh: Engine) -> None:
    plain = ask(fresh, Prompt(text="Once upon"), [SETS[0]], False)
    events = [event for event in plain if isinstance(event, TokenEvent)]
    text = "".join(event.text for event in events) + end(plain).text
    cut = next(text[i : i + 2] for i in range(2, len(text) - 2) if text.index(text[i : i + 2]) == i)
    drawn = Sampling(0.8, logit_bias=LETTERS)
    stopped = list(
        fresh.stream([Prompt(text="Once upon")], [SETS[0]], sampling=drawn, seeds=[7], max_tokens=9, stop_strings=[cut])
    )
    shown = "".join(event.text for event in stopped if isinstance(event, TokenEvent)) + end(stopped).text
    assert end(stopped).finish == "stop"
    assert shown == text[: text.index(cut)]
    assert end(stopped).report.steps == next(
        n for n in range(1, 10) if cut in "".join(event.text for event in events[:n])
    )
