"""The app from start to leaving, and the chat screen, driven by keys over a scripted engine."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.events import Paste

from app import SteerApp
from steer.config import Settings
from steer.edits import Edit, SteeringSet
from steer.errors import SteerError
from steer.events import CONTROL, EditReport, Finished, Report
from steer.session import EngineInfo, Session
from steer.store import Store
from steer.tui.dialogs import Ask, Confirm, Help
from steer.tui.features import FeaturesScreen
from tests.tui.conftest import Driver, Running
from tests.tui.fake_engine import BOOM, CONTEXT, HOLD, SPLIT, FakeEngine

HOSTILE = "\x1b]0;x\x07 [/] [@click=app.quit]x[/] \x1b[2J"


def session_of(driver: Driver) -> Session:
    assert driver.app.session is not None
    return driver.app.session


async def until_held(driver: Driver, engine: FakeEngine) -> None:
    """Waits until the script stands at its `HOLD`, and what came before it is drawn."""
    await asyncio.to_thread(engine.held.wait)
    driver.app.chat.drain()
    await driver.pilot.pause()


# Starting


async def test_a_message_typed_while_the_engine_loads_is_sent_when_it_is_there() -> None:
    go, engine = threading.Event(), FakeEngine("Hello you")

    def make() -> FakeEngine:
        go.wait()
        return engine

    app = SteerApp(make, Settings(pace=0), {"seed": 7})
    async with app.run_test(size=(120, 36)) as pilot:
        driver = Driver(app, pilot)
        assert app.chat.prompt.has_focus
        assert "loading the model" in driver.text
        await pilot.press(*"hi", "enter")
        assert "will be sent when the model is loaded" in driver.text
        await pilot.press("escape", "b")
        assert "the model is still loading" in driver.text
        go.set()
        await driver.settle()
        await driver.settle()
        assert [turn.content for turn in session_of(driver).turns] == ["hi", "Hello you"]


async def test_an_engine_that_cannot_be_loaded_ends_the_app_with_one() -> None:
    def make() -> FakeEngine:
        raise SteerError("there is no model in `nowhere`", "pass `--model DIR`")

    app = SteerApp(make, Settings(), {})
    async with app.run_test() as pilot:
        await Driver(app, pilot).settle()
    assert app.return_code == 1
    assert str(app.error) == "there is no model in `nowhere`"


async def test_ctrl_c_while_loading_ends_with_130() -> None:
    go, engine = threading.Event(), FakeEngine()

    def make() -> FakeEngine:
        go.wait()
        return engine

    app = SteerApp(make, Settings(), {})
    async with app.run_test() as pilot:
        await pilot.press("ctrl+c")
        await pilot.pause()
    go.set()
    assert app.return_code == 130


SCRIPT = """
import sys, time, os
import app
from pathlib import Path
from steer.config import Settings
from steer.errors import SteerError
def fail():
    os.write(2, b"NOISE FROM C")
    raise SteerError("there is no model in `nowhere`", "pass `--model DIR`")
def hang():
    time.sleep(60)
code = app.run({make}, Settings(), {{}}, log=Path(sys.argv[1]))
assert "torch" not in sys.modules
sys.exit(code)
"""


def in_terminal(make: str, log: Path, typed: bytes = b"") -> tuple[int, str]:
    """Runs the app in a pseudo-terminal; its exit code and all it wrote."""
    pid, terminal = pty.fork()
    if pid == 0:
        root = Path(__file__).parents[2]
        os.chdir(root)
        os.execve(
            sys.executable,
            [sys.executable, "-c", SCRIPT.format(make=make), str(log)],
            os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(root)},
        )
    seen, due = b"", time.monotonic() + 30
    while time.monotonic() < due:
        ready, _, _ = select.select([terminal], [], [], 0.2)
        try:
            chunk = os.read(terminal, 65536) if ready else None
        except OSError:
            break
        if chunk == b"":
            break
        seen += chunk or b""
        if typed and b"loading the model" in seen:
            os.write(terminal, typed)
            typed = b""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), seen.decode(errors="replace")


def test_a_failed_start_prints_one_sentence_after_leaving_and_keeps_noise_off_the_screen(tmp_path: Path) -> None:
    code, seen = in_terminal("fail", tmp_path / "log")
    assert code == 1
    assert "error: there is no model in `nowhere`" in seen.rsplit("\x1b[?1049l", 1)[1]
    assert "hint: pass `--model DIR`" in seen
    assert "Traceback" not in seen
    assert "NOISE" not in seen
    assert "NOISE FROM C" in (tmp_path / "log").read_text()


def test_ctrl_c_in_a_terminal_leaves_at_once_without_a_traceback(tmp_path: Path) -> None:
    code, seen = in_terminal("hang", tmp_path / "log", b"\x03")
    assert code == 130
    assert "Traceback" not in seen


def test_importing_the_app_leaves_torch_out() -> None:
    code = "import sys, app, steer.commands; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# Talking


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


async def test_keys_change_the_strength_while_the_reply_streams(running: Running) -> None:
    engine = FakeEngine(["one", HOLD, " two"])
    async with running(engine) as driver:
        await driver.send("/steer 0 +1x")
        await driver.send("go", wait=False)
        await until_held(driver, engine)
        assert "writing..." in driver.text
        assert "Esc stop" in driver.text
        await driver.pilot.press("tab", "tab")
        assert driver.app.chat.panel.has_focus
        await driver.pilot.press("right", "right")
        engine.go.set()
        await driver.settle()
        assert [str(steering.edits[0]) for steering in engine.sets] == ["0 +1x", "0 +1.1x"]
        reply = session_of(driver).turns[1].reply
        assert reply is not None and [place for place, _ in reply.timeline] == [0, 2]


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


# Looking


async def test_the_cursor_shows_a_tokens_features_and_enter_steers_one(running: Running) -> None:
    async with running() as driver:
        await driver.send("Who are you?")
        await driver.press("escape", "g")
        first = driver.app.chat.inspector.event
        assert first is not None and first.text == "Who", "what a person said is read as tokens too"
        await driver.press("right_curly_bracket", "right", "right", "right")
        event = driver.app.chat.inspector.event
        assert event is not None and event.text == " Golden"
        await driver.press("enter")
        assert driver.app.chat.inspector.has_focus
        await driver.press("enter")
        assert [str(edit) for edit in session_of(driver).steering.edits] == [f"{event.hits[0].latent} +1x"]
        assert driver.app.chat.painting == event.hits[0].latent


async def test_brackets_walk_through_what_is_steered(running: Running) -> None:
    async with running() as driver:
        await driver.send("/steer 3 1x")
        await driver.send("/steer 5 1x")
        await driver.press("escape")
        seen = []
        for key in ("right_square_bracket",) * 3 + ("left_square_bracket", "0", "asterisk"):
            await driver.press(key)
            seen.append(driver.app.chat.painting)
        assert seen == [3, 5, None, 5, None, "strongest"]


async def test_features_are_searched_and_put_to_use(running: Running) -> None:
    async with running() as driver:
        await driver.press("escape", "f")
        screen = driver.app.screen
        assert isinstance(screen, FeaturesScreen) and len(screen.cards) == 10
        await driver.press(*"steel", "enter")
        assert [card.latent for card in screen.cards] == [9]
        assert screen.card.card is not None and screen.card.card.latent == 9
        await driver.press("enter", "c", "x", "p", "2")
        assert [str(edit) for edit in session_of(driver).steering.edits] == ["9 +1x", "clamp 9 1x", "ablate 9"]
        assert screen.kind == "middle" and driver.app.chat.painting == 9
        await driver.press("slash", "ctrl+u", *"max:a")
        assert "`max:a` is no filter" in driver.text
        await driver.press("escape", "escape")
        assert driver.app.screen is driver.app.chat


async def test_an_exact_strength_is_checked_before_it_is_taken(running: Running) -> None:
    async with running() as driver:
        await driver.send("/steer 3 1x")
        await driver.press("escape", "s", "equals_sign")
        assert isinstance(driver.app.screen, Ask)
        await driver.press("ctrl+u", *"much", "enter")
        assert "`much` is no strength" in driver.text
        await driver.press("ctrl+u", *"30%", "enter")
        assert str(session_of(driver).steering.edits[0]) == "3 +30%"


async def test_completion_goes_on_with_one_text(running: Running) -> None:
    engine = FakeEngine(" there was")
    async with running(engine) as driver:
        await driver.press("escape", "m")
        await driver.send("Once upon a time")
        await driver.send("")
        await driver.send(" a bridge")
        assert [prompt.text for prompt in engine.prompts] == [
            "Once upon a time",
            "Once upon a time there was",
            "Once upon a time there was there was a bridge",
        ]
        assert "You" not in driver.text
        await driver.press("escape", "e")
        assert session_of(driver).document == "Once upon a time there was there was a bridge"


async def test_history_and_new_lines_in_the_box(running: Running) -> None:
    async with running(FakeEngine("a")) as driver:
        await driver.send("first")
        await driver.send("second")
        box = driver.app.chat.prompt
        await driver.press(*"draft", "up")
        assert box.text == "second"
        await driver.press("up", "down", "down")
        assert box.text == "draft"
        await driver.press("ctrl+j", "x")
        assert box.text == "draft\nx"
        await driver.press("ctrl+u")
        box.fill("/bi")
        await driver.press("tab")
        assert box.text == "/bias "
        assert "/bias LATENT VALUE" in driver.text


async def test_help_tells_keys_commands_and_how_add_and_bias_differ(running: Running) -> None:
    async with running(size=(120, 60)) as driver:
        await driver.send("/steer 3 1x")
        await driver.press("escape", "s", "question_mark")
        assert isinstance(driver.app.screen, Help)
        text = driver.app.screen._text
        for part in ("Ablate", "/bias LATENT VALUE", "add and bias differ", "Type a message", "Ctrl+S", "(v - a) * d"):
            assert part in text
        await driver.press("escape")
        assert driver.app.chat.panel.has_focus


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


async def test_a_model_without_an_sae_talks_and_says_what_is_missing(running: Running) -> None:
    engine = FakeEngine("a")
    engine.info = EngineInfo("plain", "float32", "cpu", 64, notice="this model runs without features")
    async with running(engine) as driver:
        assert "this model runs without features" in driver.text
        await driver.send("hello")
        assert not driver.app.chat.query_one("#side").display
        await driver.press("escape", "f")
        assert "without an SAE" in driver.says()


async def test_ascii_draws_with_ascii_alone() -> None:
    app = SteerApp(lambda: FakeEngine("The bridge"), Settings(pace=0, ascii=True), {"seed": 7})
    async with app.run_test(size=(120, 36)) as pilot:
        driver = Driver(app, pilot)
        await driver.settle()
        await driver.send("hello")
        await driver.send("/steer 0 +1x")
        filters = app.get_line_filters()
        for strip in app.screen._compositor.render_strips():
            for line_filter in filters:
                strip = strip.apply_filter(line_filter, app.screen.styles.background)
            assert strip.text.isascii(), strip.text


async def test_a_theme_that_is_not_there_ends_the_start() -> None:
    app = SteerApp(FakeEngine, Settings(theme="puce"), {})
    async with app.run_test() as pilot:
        await Driver(app, pilot).settle()
    assert app.return_code == 1 and "there is no theme `puce`" in str(app.error)


# Sizes


@pytest.mark.parametrize("size", [(20, 5), (59, 30), (100, 15)])
async def test_a_small_terminal_asks_for_room_and_keeps_running(running: Running, size: tuple[int, int]) -> None:
    async with running(size=size) as driver:
        assert "more" in driver.text and "room" in driver.text
        await driver.send("hello")
        await driver.pilot.resize_terminal(120, 36)
        await driver.settle()
        assert "Golden Gate Bridge" in driver.text
        assert driver.app.chat.prompt.has_focus


async def test_panes_are_sheets_where_only_one_fits(running: Running) -> None:
    async with running(size=(80, 24)) as driver:
        await driver.send("hello")
        assert "' orange.' p.62" in driver.text, "the strip shows the last token"
        await driver.press("escape", "t")
        assert "entropy" in driver.text and "You" not in driver.text
        await driver.pilot.resize_terminal(160, 40)
        await driver.settle()
        assert "entropy" in driver.text and "You" in driver.text and "No feature is chosen" in driver.text
