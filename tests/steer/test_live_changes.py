"""A reply is a function of the set in force at each token, whoever put it there: a user, a schedule, a batch."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.edits import Edit, SteeringSet
from steer.engine import Engine
from steer.events import Event, TokenEvent
from steer.session import Prompt, Sampling, Session
from tests.steer.test_engine import end, run, steering, tiny_sae, tokens
from tests.steer.test_reuse import LETTERS, SETS, assert_same
from tests.tiny import byte_tokenizer, tiny_model

torch.set_num_threads(1)

ASK = Prompt(text="Once upon a time")
WARM = Sampling(0.8, logit_bias=LETTERS)
TOKENS = 12


@pytest.fixture(scope="module")
def fresh() -> Engine:
    return Engine(tiny_model(), byte_tokenizer(), tiny_sae())


def reply(engine: Engine, sets: object, **options: object) -> list[Event]:
    return run(engine, [ASK], sets, **{"sampling": WARM, "seeds": [7], "max_tokens": TOKENS} | options)


def changed(engine: Engine, before: SteeringSet, after: SteeringSet, n: int, hits: bool = False) -> list[Event]:
    """A reply whose set is another one as soon as n tokens have come. Without hits a token comes before it is read, so
    that `before` is in force for n passes: that of the prompt and those of the first n - 1 tokens."""
    events: list[Event] = []
    ask = {"sampling": WARM, "seeds": [7], "max_tokens": TOKENS, "hits": hits}
    for event in engine.stream([ASK], lambda: before if len(tokens(events)) < n else after, **ask):  # type: ignore[arg-type]
        events.append(event)  # noqa: PERF402 (the set is asked for while they come)
    return events


def assert_same_tokens(ours: list[Event], theirs: list[Event], row: int = 0) -> None:
    mine = [event for event in ours if isinstance(event, TokenEvent) and event.row == row]
    others = [event for event in theirs if isinstance(event, TokenEvent) and event.row == 0]
    assert [event.token for event in mine] == [event.token for event in others]
    logprobs = [[event.logprob for event in events] for events in (mine, others)]
    assert logprobs[0] == pytest.approx(logprobs[1], rel=1e-5, abs=2e-6)


@settings(max_examples=25, deadline=None)
@given(first=st.sampled_from(SETS), others=st.lists(st.sampled_from(SETS), min_size=1, max_size=3))
def test_changing_the_set_and_changing_it_back_gives_the_original_reply(
    fresh: Engine, first: SteeringSet, others: list[SteeringSet]
) -> None:
    chat = Engine(fresh.model, fresh.tokenizer, fresh.sae)
    original = reply(chat, lambda: first, reuse=True)
    for other in others:
        reply(chat, lambda other=other: other, reuse=True)
    again = reply(chat, lambda: first, reuse=True)
    assert_same(again, original)
    assert_same(again, reply(fresh, lambda: first))


def test_so_it_does_in_a_session_when_the_reply_is_asked_for_again() -> None:
    session = Session(Engine(tiny_model(), byte_tokenizer(), tiny_sae()), seed=3, max_tokens=TOKENS)
    session.sampling = WARM
    session.say("hello there")
    edit = Edit.parse("5 +20")
    texts = []
    for steering_set in (SteeringSet(), SteeringSet((edit,)), SteeringSet()):
        session.steering = steering_set
        if texts:
            session.regenerate()
        list(session.reply(threading.Event()))
        said = session.turns[-1].reply
        assert said is not None
        texts.append([event.token for event in said.events])
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("n", range(1, TOKENS))
@pytest.mark.parametrize("edit", ["7 12", "clamp 5 9", "bias 4 6", "project 11"])
def test_an_edit_taken_out_after_n_tokens_equals_one_written_for_n_tokens(fresh: Engine, edit: str, n: int) -> None:
    scheduled = reply(fresh, [steering(f"{edit} on generated for {n} tokens")])
    live = changed(fresh, steering(f"{edit} on generated"), SteeringSet(), n)
    assert_same_tokens(live, scheduled)
    [acted], [meant] = end(live).report.edits, end(scheduled).report.edits
    assert acted.positions == meant.positions == n
    assert (acted.before, acted.after) == pytest.approx((meant.before, meant.after), rel=1e-4, abs=1e-5)


def test_the_edits_of_that_test_do_change_the_reply(fresh: Engine) -> None:
    plain = tokens(reply(fresh, [SteeringSet()]))
    for edit in ("7 12", "clamp 5 9", "bias 4 6"):
        assert tokens(reply(fresh, [steering(f"{edit} on generated for 6 tokens")])) != plain


@settings(max_examples=25, deadline=None)
@given(before=st.sampled_from(SETS), after=st.sampled_from(SETS), n=st.integers(1, TOKENS + 1))
def test_a_change_on_the_way_equals_the_schedule_that_the_report_gives_of_it(
    fresh: Engine, before: SteeringSet, after: SteeringSet, n: int
) -> None:
    events = changed(fresh, before, after, n, hits=True)
    carried = end(events).report.carried
    assert carried[0].first == 0 and carried[0].edits == tuple(map(str, before.live))
    passes = TOKENS
    assert (len(carried) == 2) == (before != after and n < TOKENS - 1), "with hits a token comes after it is read"
    if len(carried) == 2:
        assert carried[1].edits == tuple(map(str, after.live))
        first_token = next(event.index for event in events if isinstance(event, TokenEvent))
        passes = carried[1].first - first_token + 1
    again = changed(fresh, before, after, passes)
    assert_same_tokens(again, events)
    assert [(e.text, e.positions) for e in end(again).report.edits] == [
        (e.text, e.positions) for e in end(events).report.edits
    ]


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(SETS), st.sampled_from(["a", "Once upon a time", "The dog ran"]), st.integers(0, 9)),
        min_size=1,
        max_size=5,
    )
)
def test_streamed_equals_one_shot_equals_batched(fresh: Engine, rows: list[tuple[SteeringSet, str, int]]) -> None:
    prompts, sets, seeds = (
        [Prompt(text=text) for _, text, _ in rows],
        [one for one, _, _ in rows],
        [s for *_, s in rows],
    )
    options = {"sampling": WARM, "max_tokens": TOKENS}
    batched = run(fresh, prompts, list(sets), seeds=list(seeds), **options)
    for row, (one, text, seed) in enumerate(rows):
        streamed = run(fresh, [Prompt(text=text)], [one], seeds=[seed], **options)
        whole = fresh.complete(text, list(map(str, one.edits)), seed=seed, sampling=WARM, max_tokens=TOKENS)
        assert_same_tokens(list(whole.events), streamed)
        assert_same_tokens(batched, streamed, row)
