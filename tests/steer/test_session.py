"""A session: turns, replies, the timeline, and staying usable when things break."""

import math
import threading
import time

import pytest

from steer.edits import Edit, SteeringSet
from steer.errors import SteerError
from steer.events import Event, Failed, Finished, TokenEvent
from steer.session import MAX_SEED, Sampling, Session
from tests.steer.fake import FakeEngine


def play(session: Session, stop: threading.Event | None = None) -> list[Event]:
    return list(session.reply(stop or threading.Event()))


class Shelf:
    """A store that counts."""

    def __init__(self, error: OSError | None = None) -> None:
        self.saves: list[list[str]] = []
        self.error = error

    def save(self, session: Session, name: str | None = None) -> None:
        self.saves.append([turn.content for turn in session.turns])
        if self.error:
            raise self.error


def test_a_reply_is_kept_with_its_events_and_saved() -> None:
    engine, shelf = FakeEngine(), Shelf()
    session = Session(engine, store=shelf, system="be brief", seed=7)
    session.say("hi")
    events = play(session)
    reply = session.turns[-1].reply
    assert reply is not None and reply.events == [event for event in events if isinstance(event, TokenEvent)]
    assert session.turns[-1].content == reply.text == " one two three four five"
    assert (reply.seed, reply.finished) == (7, events[-1])
    assert engine.prompts[0].messages == (("system", "be brief"), ("user", "hi"))
    assert engine.asked["sampling"] == engine.defaults
    assert shelf.saves == [["hi", " one two three four five"]]


def test_without_a_seed_each_reply_draws_its_own() -> None:
    session = Session(FakeEngine())
    seeds = set()
    for _ in range(3):
        session.say("hi")
        play(session)
        assert session.turns[-1].reply
        seeds.add(session.turns[-1].reply.seed)
    assert len(seeds) == 3 and all(0 <= seed <= MAX_SEED for seed in seeds)


def test_a_change_takes_effect_where_the_timeline_says() -> None:
    engine = FakeEngine()
    session = Session(engine)
    session.say("hi")
    for event in session.reply(threading.Event()):
        if isinstance(event, TokenEvent) and event.text == " two":
            session.steer("3 +1")
    reply = session.turns[-1].reply
    assert reply is not None
    steered = SteeringSet((Edit.parse("3 +1"),))
    assert reply.steering == SteeringSet()
    assert reply.timeline == [(0, SteeringSet()), (3, steered)]
    for count, picked_under in reply.timeline:
        assert engine.used[count] == picked_under
    assert engine.used[2] == SteeringSet()


def test_a_change_after_the_last_token_is_not_in_the_timeline() -> None:
    session = Session(FakeEngine("one"))
    session.say("hi")
    for event in session.reply(threading.Event()):
        if isinstance(event, Finished):
            session.steer("3 +1")
    assert session.turns[-1].reply and len(session.turns[-1].reply.timeline) == 1


def test_an_edit_that_cannot_run_leaves_the_set_as_it_was() -> None:
    session = Session(FakeEngine())
    session.steer("3 +1")
    with pytest.raises(SteerError, match="no latent 99"):
        session.steer("99 +1")
    assert session.steering.edits == (Edit.parse("3 +1"),)


def test_stopping_ends_the_reply_and_saves_it() -> None:
    shelf, stop = Shelf(), threading.Event()
    session = Session(FakeEngine(), store=shelf)
    session.say("hi")
    for event in session.reply(stop):
        if isinstance(event, TokenEvent):
            stop.set()
    assert session.turns[-1].reply and session.turns[-1].reply.finished
    assert session.turns[-1].reply.finished.finish == "cancelled"
    assert shelf.saves == [["hi", " one"]]


def test_walking_away_frees_the_session_and_saves_what_came() -> None:
    shelf = Shelf()
    session = Session(FakeEngine(), store=shelf)
    session.say("hi")
    events = session.reply(threading.Event())
    next(events), next(events)
    assert session.busy
    for verb in (session.regenerate, session.clear, session.undo_last, lambda: session.say("x"), lambda: play(session)):
        with pytest.raises(SteerError, match="still being written"):
            verb()
    events.close()  # type: ignore[attr-defined]
    assert not session.busy
    assert shelf.saves == [["hi", " one"]]


def test_a_message_that_is_refused_is_taken_back() -> None:
    session = Session(FakeEngine())
    session.say("hi")
    play(session)
    session.say("TOO LONG")
    assert play(session) == [Failed("the message is too long", "shorten it")]
    assert [turn.content for turn in session.turns] == ["hi", " one two three four five"]
    session.say("again")
    assert isinstance(play(session)[-1], Finished)


@pytest.mark.parametrize(("script", "why"), [("one FAIL", "out of memory"), ("one BOOM", "the reply broke: a bug")])
def test_a_reply_that_breaks_keeps_its_beginning(script: str, why: str) -> None:
    engine = FakeEngine(script)
    session = Session(engine)
    session.say("hi")
    last = play(session)[-1]
    assert isinstance(last, Failed) and why in last.message
    assert session.turns[-1].content == " one"
    assert session.turns[-1].reply and session.turns[-1].reply.failed == last
    engine.script = ["fine"]
    session.regenerate()
    play(session)
    assert [turn.content for turn in session.turns] == ["hi", " fine"]


def test_a_save_that_fails_is_told_and_the_reply_stands() -> None:
    session = Session(FakeEngine(), store=Shelf(OSError(28, "No space left on device")))
    session.say("hi")
    assert isinstance(play(session)[-1], Finished)
    assert session.unsaved == "No space left on device"


def test_completion_goes_on_from_the_document() -> None:
    engine = FakeEngine("there was")
    session = Session(engine, mode="completion")
    session.complete("Once")
    play(session)
    play(session)
    assert session.document == "Once there was there was"
    assert [prompt.text for prompt in engine.prompts] == ["Once there was"]
    session.complete("Once there was a cat")
    assert [(turn.role, turn.content) for turn in session.turns] == [
        ("user", "Once"),
        ("assistant", " there was"),
        ("user", " a cat"),
    ]
    play(session)
    assert [turn.content for turn in session.undo_last()] == [" there was"]
    assert session.document == "Once there was a cat"


def test_undo_takes_back_a_message_with_its_reply() -> None:
    session = Session(FakeEngine("ok"))
    session.say("a")
    play(session)
    session.say("b")
    play(session)
    assert [turn.content for turn in session.undo_last()] == ["b", " ok"]
    session.clear()
    assert session.turns == [] and session.undo_last() == []
    with pytest.raises(SteerError, match="no reply to write again"):
        session.regenerate()
    with pytest.raises(SteerError, match="no message to answer"):
        play(session)
    with pytest.raises(SteerError, match="the message is empty"):
        session.say(" \n")


def test_pace_spreads_tokens_out_and_stop_cuts_the_wait() -> None:
    session = Session(FakeEngine(), pace=50)
    session.say("hi")
    started = time.monotonic()
    play(session)
    assert time.monotonic() - started > 0.07
    session.pace, stop = 0.01, threading.Event()
    session.say("hi")
    timer = threading.Timer(0.05, stop.set)
    timer.start()
    started = time.monotonic()
    play(session, stop)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.nan},
        {"temperature": -1},
        {"temperature": math.inf},
        {"top_p": 0},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
    ],
)
def test_sampling_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SteerError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_settings_that_cannot_be_are_refused() -> None:
    for options in ({"seed": -1}, {"seed": MAX_SEED + 1}, {"max_tokens": 0}):
        with pytest.raises(SteerError):
            Session(FakeEngine(), **options)  # type: ignore[arg-type]
    made = Session(FakeEngine(), sampling=lambda defaults: Sampling(0.1, defaults.top_p))
    assert made.sampling == Sampling(0.1, 0.9)


def test_a_refused_message_is_gone_before_anyone_hears_of_the_refusal() -> None:
    session = Session(FakeEngine())
    session.say("TOO LONG")
    for event in session.reply(threading.Event()):
        assert isinstance(event, Failed) and session.turns == []


def test_a_guard_measures_and_weakens_only_when_told_to() -> None:
    words = " ".join(["word"] * 20)
    for mode, factors in (("off", {1.0}), ("watch", {1.0}), ("back-off", {1.0, 0.75, 0.75**2})):
        engine = FakeEngine(words)
        session = Session(engine, seed=1)
        session.guard = mode
        session.steer("3 +1x")
        session.say("hi")
        play(session)
        reply = session.turns[-1].reply
        assert reply is not None
        assert {used.factor for used in engine.used} == factors
        assert {used.factor for _, used in reply.timeline} == factors
        said = "" if reply.guard is None else reply.guard.summary
        assert (
            said
            == {"off": "", "watch": "KL 2.5, over the line", "back-off": "KL 2.5, over the line, edits x 0.56"}[mode]
        )
    assert session.steering.factor == 1.0  # the next reply starts at full strength
