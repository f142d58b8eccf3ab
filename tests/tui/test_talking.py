"""Writing and stopping replies on the chat screen, driven by keys over a scripted engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from textual.events import Paste

from steer.edits import Edit, SteeringSet
from steer.events import CONTROL, Carried, EditReport, Finished, Report
from steer.store import Store
from steer.tui.dialogs import Confirm
from steer.tui.status import edits_acted
from tests.tui.conftest import Driver, Running, session_of, until_held
from tests.tui.fake_engine import BOOM, CONTEXT, HOLD, SPLIT, FakeEngine

HOSTILE = "\x1b]0;x\x07 [/] [@click=app.quit]x[/] \x1b[2J"


async def test_a_reply_streams_into_the_transcript_and_is_saved(running: Running, tmp_path: Path) -> None:
    async with running() as driver:
        await driver.send("Who are you?")
        assert [turn.role for turn in session_of(driver).turns] == ["user", "assistant"]
        assert "I am the Golden Gate Bridge, a suspension" in driver.text
        assert "16 tok" in driver.text
        assert Store(tmp_path / "sessions").names() == [session_of(driver).name]
        assert not driver.app.chat.timer._active.is_set()


async def test_the_header_says_steered_from_the_report_alone(running: Running) -> None:
    class Liar(FakeEngine):
        def stream(self, *args: Any, **options: Any) -> Any:
            for event in super().stream(*args, **options):
                if isinstance(event, Finished):
                    nowhere = (EditReport("0 +1x", 0, None, None),)
                    event = replace(event, report=Report(3, 0, nowhere))
                yield event

    steering = SteeringSet().add(Edit.parse("0 +1x"))
    async with running(FakeEngine("a b"), steering=steering) as driver:
        await driver.send("hello")
        assert "steered, 1 edit  2 tok" in driver.text
    async with running(Liar("a b"), steering=steering) as driver:
        await driver.send("hello")
        assert "not steered" in driver.text
    async with running(FakeEngine("a b")) as driver:
        await driver.send("hello")
        assert "steered" not in driver.app.chat.transcript.sections[1].title


def test_edits_of_one_latent_are_counted_each_and_one_that_was_moved_once() -> None:
    def acted(*sets: str, nowhere: str = "") -> int:
        texts = {text for one in sets for text in one.split(", ")}
        edits = tuple(EditReport(text, 0 if text == nowhere else 9, 0.0, 1.0) for text in texts)
        return edits_acted(
            Report(3, 3, edits, carried=tuple(Carried(n, tuple(s.split(", "))) for n, s in enumerate(sets)))
        )

    assert acted("7 +1x, 7 +3x") == 2
    assert acted("7 +1x", "7 +2x", "7 +3x") == 1
    assert acted("7 +1x, 7 +3x", "7 +1.1x, 7 +3x", "7 +3x") == 2
    assert acted("7 +1x", "8 +1x") == 2
    assert acted("7 +1x, 7 +3x", nowhere="7 +3x") == 1
    assert edits_acted(Report(3, 3, (EditReport("7 +1x", 9, 0.0, 1.0),))) == 1


async def test_keys_change_the_strength_while_the_reply_streams(running: Running) -> None:
    engine = FakeEngine(["one", HOLD, " two"])
    async with running(engine) as driver:
        await driver.send("/steer 0 +1x")
        await driver.send("go", wait=False)
        await until_held(driver, engine)
        assert "writing..." in driver.text
        assert "Esc stop  Tab steer this reply" in driver.text
        await driver.pilot.press("tab")
        assert driver.app.chat.panel.has_focus
        await driver.pilot.press("right", "right")
        engine.go.set()
        await driver.settle()
        assert "steered, 1 edit " in driver.text
        assert [str(steering.edits[0]) for steering in engine.sets] == ["0 +1x", "0 +1.1x"]
        reply = session_of(driver).turns[1].reply
        assert reply is not None and [place for place, _ in reply.timeline] == [0, 2]


async def test_the_pane_shows_what_the_guard_leaves_of_an_edit_while_it_acts(running: Running) -> None:
    engine = FakeEngine([f" w{n}" for n in range(12)] + [HOLD, " end"])
    async with running(engine, steering=SteeringSet().add(Edit.parse("0 +1x"))) as driver:
        await driver.send("/guard back-off")
        await driver.send("go", wait=False)
        await until_held(driver, engine)
        assert "add x 0.75" in driver.text and "+0.75 x max" in driver.text
        assert "KL 2.5, over the line, edits x 0.75" in driver.text
        engine.go.set()
        await driver.settle()
        assert "+1.00 x max" in driver.text and "x 0.75 when the last reply ended" in driver.text
        await driver.send("/guard off")
        engine.script = ["fine"]
        await driver.send("go on")
        assert "when the last reply ended" not in driver.text


async def test_keys_on_an_empty_steering_pane_say_that_there_is_nothing_to_change(running: Running) -> None:
    async with running(size=(80, 24)) as driver:
        await driver.send("hello")
        await driver.press("escape", "r", "s", "right")
        assert "no feature is steered" in driver.says() and driver.says() in driver.text
        await driver.press("escape", "i")
        await driver.send("/steer 0 +1x")
        await driver.press("escape", "s", "right")
        assert "no feature" not in driver.says() and str(session_of(driver).steering.edits[0]) == "0 +1.05x"
        assert "step  = exact" in driver.text, "the footer has the keys of the pane"


async def test_escape_stops_then_leaves_the_box_then_closes_the_sheet(running: Running) -> None:
    engine = FakeEngine(["one", HOLD, " two"])
    async with running(engine, size=(80, 24)) as driver:
        await driver.send("go", wait=False)
        await until_held(driver, engine)
        await driver.press("escape")
        reply = session_of(driver).turns[1].reply
        assert reply is not None and reply.finished is not None and reply.finished.finish == "cancelled"
        assert "stopped" in driver.text
        assert driver.app.chat.prompt.has_focus
        await driver.press("escape")
        assert driver.app.chat.transcript.has_focus
        await driver.press("s")
        assert driver.app.chat.panel.has_focus and "No feature is steered" in driver.text
        await driver.press("escape")
        assert driver.app.chat.transcript.has_focus and "No feature is steered" not in driver.text


async def test_a_second_message_waits_its_turn_in_the_box(running: Running) -> None:
    engine = FakeEngine(["one", HOLD])
    async with running(engine) as driver:
        await driver.send("go", wait=False)
        await until_held(driver, engine)
        await driver.send("more", wait=False)
        assert driver.app.chat.prompt.text == "more"
        assert "still being written" in driver.says()
        engine.go.set()
        await driver.settle()


async def test_a_message_that_does_not_fit_comes_back_into_the_box(running: Running) -> None:
    async with running() as driver:
        await driver.send("x" * (CONTEXT + 1))
        assert f"this model holds {CONTEXT}" in driver.text
        assert driver.app.chat.prompt.text == "x" * (CONTEXT + 1)
        assert not session_of(driver).turns and not driver.app.chat.transcript.sections


async def test_a_reply_that_breaks_says_so_and_the_chat_goes_on(running: Running) -> None:
    engine = FakeEngine(["one", " two", BOOM])
    async with running(engine) as driver:
        await driver.send("go")
        assert "the device is out of memory (shorten the chat)" in driver.says()
        assert "failed  2 tok" in driver.text
        engine.script = ["fine"]
        await driver.send("again")
        assert session_of(driver).turns[-1].content == "fine"


async def test_left_out_messages_are_told(running: Running) -> None:
    async with running(FakeEngine("a", dropped=3)) as driver:
        await driver.send("go")
        assert "the 3 oldest messages no longer fit and were left out" in driver.text
        driver.app.chat.draw_turns()
        await driver.pilot.pause()
        assert "the 3 oldest messages no longer fit and were left out" in driver.text


async def test_a_flood_and_a_split_character_arrive_whole(running: Running) -> None:
    async with running(FakeEngine(["caf", SPLIT, *[f" w{n}" for n in range(5000)]]), max_tokens=6000) as driver:
        await driver.send("go")
        shown = driver.app.chat.transcript.events["1"]
        assert len(shown) == 5003
        assert "".join(event.text for event in shown) == session_of(driver).turns[1].content
        assert session_of(driver).turns[1].content.startswith("café w0 w1")
        assert "w4999" in driver.text


async def test_hostile_text_is_drawn_and_not_obeyed(running: Running) -> None:
    engine = FakeEngine([HOSTILE, " 越 ", HOSTILE])
    engine.names = {latent: HOSTILE for latent in range(20)}
    async with running(engine, system=HOSTILE) as driver:
        await driver.send(HOSTILE)
        await driver.send("/steer 0 +1x")
        await driver.send(f"/nonsense{HOSTILE}")
        await check_harmless(driver)
        driver.app.chat.prompt.post_message(Paste(HOSTILE))
        await check_harmless(driver)
        assert "[@click=app.quit]" in driver.app.chat.prompt.text
        await driver.send(f"/find {HOSTILE}")
        await check_harmless(driver)
        await driver.press("slash")
        driver.app.screen.query_one("#search").post_message(Paste(HOSTILE))
        await check_harmless(driver)
        await driver.press("enter", "question_mark")
        await check_harmless(driver)
    bad = replace(engine.info, model=HOSTILE, notice=HOSTILE)
    engine.info = bad
    async with running(engine, size=(80, 24)) as driver:
        await driver.send(HOSTILE)
        await check_harmless(driver)
        await driver.press("escape", "t")
        await check_harmless(driver)


async def check_harmless(driver: Driver) -> None:
    await driver.settle()
    assert driver.app.is_running
    strips = driver.app.screen._compositor.render_strips()
    assert not [text for strip in strips for text in [strip.text] if CONTROL.search(text)]
    links = [segment.style for strip in strips for segment in strip if segment.style and segment.style.meta]
    assert not [style for style in links if "@click" in style.meta or style.link]


async def test_leaving_while_a_reply_runs_asks(running: Running) -> None:
    engine = FakeEngine(["one", HOLD])
    async with running(engine) as driver:
        await driver.send("go", wait=False)
        await until_held(driver, engine)
        await driver.pilot.press("ctrl+q")
        assert isinstance(driver.app.screen, Confirm)
        await driver.pilot.press("n")
        assert len(driver.app.screen_stack) == 2 and driver.app.is_running
        await driver.pilot.press("ctrl+q", "y")
        await driver.pilot.pause()
    assert driver.app.return_code == 0
