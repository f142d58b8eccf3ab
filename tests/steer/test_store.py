"""Sessions on disk: they come back as they were, or say in one sentence why not."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer import store as store_module
from steer.edits import Edit, SteeringSet
from steer.errors import SteerError
from steer.events import Alternative, LatentHit, TokenEvent
from steer.session import Sampling, Session
from steer.store import Store, clean_name, snapshot
from tests.steer.fake import FakeEngine

SAMPLING = Sampling(0.3, 0.8, 5, 0.1, 1.2, 0.5, ((7, -2.5), (9, 1.0)))


def a_session(store: Store | None = None) -> Session:
    session = Session(FakeEngine(), store=store, system="be brief", sampling=SAMPLING, seed=5, max_tokens=4)
    session.change(SteeringSet((Edit.parse("clamp 3 1.5x if on"), replace(Edit.parse("ablate 2"), muted=True)), "drop"))
    for text in ("hi", "more"):
        session.say(text)
        for event in session.reply(threading.Event()):
            if isinstance(event, TokenEvent) and event.text == " one":
                session.steer("1 +2")
    return session


def near(event: TokenEvent) -> tuple[object, ...]:
    hits = tuple((hit.latent, f"{hit.activation:.5g}") for hit in event.hits)
    others = tuple((other.text, f"{other.probability:.5g}") for other in event.alternatives)
    numbers = tuple(None if number is None else f"{number:.5g}" for number in (event.logprob, event.entropy))
    return event.index, event.token, event.text, event.special, numbers, hits, others


def test_a_session_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    session = a_session(store)
    fresh = Session(FakeEngine())
    assert store.restore("last", fresh) is None
    for name in ("mode", "system", "seed", "max_tokens", "sampling", "steering", "name"):
        assert getattr(fresh, name) == getattr(session, name), name
    assert [(turn.role, turn.content) for turn in fresh.turns] == [(turn.role, turn.content) for turn in session.turns]
    for old, new in zip(session.turns, fresh.turns, strict=True):
        if old.reply is None:
            assert new.reply is None
            continue
        assert new.reply is not None and old.reply.prompt is not None and new.reply.prompt is not None
        assert new.reply.timeline == old.reply.timeline and new.reply.finished == old.reply.finished
        assert list(map(near, new.reply.events)) == list(map(near, old.reply.events))
        assert list(map(near, new.reply.prompt.tokens)) == list(map(near, old.reply.prompt.tokens))
    assert snapshot(fresh)["turns"] == snapshot(session)["turns"]


def test_a_prompt_does_not_repeat_what_the_reply_before_it_read(tmp_path: Path) -> None:
    tokens = snapshot(a_session())["turns"][3]["reply"]["prompt"]["tokens"]
    assert tokens[0] == tokens[2] == 0 and tokens[1] != 0


def test_the_last_saved_is_last_and_names_list_it_first(tmp_path: Path) -> None:
    import os

    store, session = Store(tmp_path), Session(FakeEngine())
    for age, name in ((30, "old"), (20, "b/../new"), (10, "third")):
        path = store.save(session, name)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert store.names() == ["third", "b-..-new", "old"]
    assert store.open("last") == store.open("third")
    assert not list(tmp_path.glob(".*"))


@given(st.text(max_size=100))
def test_no_name_leads_out_of_the_folder(text: str) -> None:
    try:
        name = clean_name(text)
    except SteerError:
        return
    assert Path(name).name == name and name[0] != "." and len(f"{name}.json".encode()) < 255
    assert clean_name(name) == name


@pytest.mark.parametrize("name", ["", "/", "..", "last", "\x1b"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="no name"):
        Store(tmp_path).save(Session(FakeEngine()), name or " ")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(SteerError, match="no session has been saved"):
        store.open("last")
    store.save(Session(FakeEngine()), "mine")
    with pytest.raises(SteerError, match="no session `other`") as caught:
        store.open("other")
    assert caught.value.hint == "there are `mine`"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[]", "no session of steer"),
        (b'{"format": "steer-session", "version": "1"}', "no session of steer"),
        (b'{"format": "steer-session", "version": 99}', "has version 99, this steer reads up to 1"),
        (b'{"format": "steer-session", "version": 0}', "version 0, which never was"),
        (b'{"format": "steer-session", "version": 1}', "is damaged: 'mode' is missing"),
    ],
)
def test_a_damaged_file_is_one_sentence(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    session = Session(FakeEngine())
    with pytest.raises(SteerError, match=why):
        Store(tmp_path).restore("x", session)
    assert session.name is None


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, entry in inner for found in places(entry, (*path, key)))]


WHOLE = json.dumps(snapshot(a_session()))
PLACES = [path for path in places(json.loads(WHOLE)) if path]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PLACES), st.sampled_from([None, -1, 1e400, "x", [], {}, [[]], "ablate 99", {"edit": 3}]))
def test_any_one_wrong_value_opens_or_is_one_sentence(path: tuple[Any, ...], wrong: Any) -> None:
    import tempfile

    data = json.loads(WHOLE)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = wrong
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.json").write_text(json.dumps(data))
        session = Session(FakeEngine())
        try:
            Store(Path(folder)).restore("x", session)
        except SteerError as error:
            assert "\n" not in str(error)
            assert session.turns == []


def test_edits_that_cannot_run_here_are_left_out_and_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    a_session(store)
    bare = Session(FakeEngine(hook=None))
    notice = store.restore("last", bare)
    assert notice is not None and "4 of 4 edits cannot run here" in notice
    assert bare.steering.edits == () and len(bare.turns) == 4


def test_an_older_file_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = json.loads(WHOLE) | {"version": 0}
    old["prompted"] = old.pop("system")
    (tmp_path / "x.json").write_text(json.dumps(old))
    monkeypatch.setitem(store_module.MIGRATIONS, 0, lambda data: data | {"system": data["prompted"], "version": 1})
    session = Session(FakeEngine())
    Store(tmp_path).restore("x", session)
    assert session.system == "be brief"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, session = Store(tmp_path), Session(FakeEngine())
    path = store.save(session, "mine")
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    session.system = "changed"
    with pytest.raises(SteerError, match="No space"):
        store.save(session)
    assert path.read_bytes() == before and store.names() == ["mine"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reply_with_numbers_that_json_lacks_opens_again(tmp_path: Path) -> None:
    session, store = a_session(), Store(tmp_path)
    reply = session.turns[-1].reply
    assert reply is not None
    hits = (LatentHit(1, float("inf")),)
    reply.events[0] = replace(reply.events[0], hits=hits, alternatives=(Alternative(" x", float("nan")),))
    store.save(session, "odd")
    assert store.restore("odd", Session(FakeEngine())) is None


def test_a_token_that_is_forbidden_stays_so(tmp_path: Path) -> None:
    store, sampling = Store(tmp_path), Sampling(logit_bias=((7, float("-inf")), (9, 1.5)))
    store.save(Session(FakeEngine(), sampling=sampling), "mine")
    fresh = Session(FakeEngine())
    assert store.restore("mine", fresh) is None and fresh.sampling == sampling


def test_a_session_does_not_take_the_name_of_another(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.save(a_session(), "mine")
    before = path.read_bytes()
    with pytest.raises(SteerError, match="there is a session `mine` already"):
        store.save(a_session(), "mine")
    assert path.read_bytes() == before
