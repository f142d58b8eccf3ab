"""Looking at tokens and features, steering them, dialogs and sizes, driven by keys over a scripted engine."""

from __future__ import annotations

import pytest
from textual.app import App, ComposeResult
from textual.events import Key
from textual.widgets import Static

from app import SteerApp
from steer.config import Settings
from steer.session import EngineInfo
from steer.tui.dialogs import Ask, Help, Line
from steer.tui.features import FeaturesScreen
from steer.tui.status import tail
from tests.tui.conftest import Driver, Running, session_of
from tests.tui.fake_engine import FakeEngine


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
        assert [str(edit) for edit in session_of(driver).steering.edits] == [f"{event.hits[0].latent} +0.5x"]
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
        assert [str(edit) for edit in session_of(driver).steering.edits] == ["9 +0.5x", "clamp 9 0.5x", "ablate 9"]
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
    engine.names[0] = "a label that is far too long for the line below the text, and so is cut where it says so"
    async with running(engine) as driver:
        await driver.press("escape", "m", "i")
        await driver.send("Once upon a time")
        await driver.send("")
        await driver.send(" a bridge")
        assert [prompt.text for prompt in engine.prompts] == [
            "Once upon a time",
            "Once upon a time there was",
            "Once upon a time there was there was a bridge",
        ]
        assert "You" not in driver.text
        await driver.send("/paint 0")
        assert "tok/s · painting 0 a label" in driver.text and ".. ─╯" in driver.text
        await driver.press("escape", "e")
        assert session_of(driver).document == "Once upon a time there was there was a bridge"


async def test_the_key_that_changes_the_mode_changes_it_back(running: Running) -> None:
    async with running() as driver:
        await driver.press("escape", "m", "m")
        assert session_of(driver).mode == "chat" and not driver.app.chat.prompt.text
        await driver.press("m")
        assert session_of(driver).mode == "completion" and driver.app.chat.transcript.has_focus


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
        await driver.press("escape", "question_mark")
        assert (
            isinstance(driver.app.screen, Help)
            and "pageup                 Scroll a screenful" in driver.app.screen._text
        )


async def test_an_edit_at_the_hook_point_of_the_sae_is_one_of_its_features(running: Running) -> None:
    async with running(FakeEngine("a")) as driver:
        await driver.send("/steer 3 +1x at blocks.1.hook_resid_post")
        await driver.send("/steer 5 +1x at blocks.4.hook_resid_post")
        assert driver.app.chat.tags == {5: "b"}
        await driver.press("escape", "right_square_bracket")
        assert driver.app.chat.painting == 5


async def test_a_model_without_an_sae_talks_and_says_what_is_missing(running: Running) -> None:
    engine = FakeEngine("a")
    engine.info = EngineInfo("plain", "float32", "cpu", 64, notice="this model runs without features")
    async with running(engine) as driver:
        assert "this model runs without features" in driver.text
        await driver.send("hello")
        assert not driver.app.chat.query_one("#side").display
        await driver.send("/error drop")
        assert "no SAE whose error could be dropped" in driver.says()
        assert session_of(driver).steering.error == "keep"
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
        assert "' orange.' p .62" in driver.text, "the strip shows the last token"
        await driver.press("escape", "t")
        assert "entropy" in driver.text and "You" not in driver.text
        await driver.pilot.resize_terminal(160, 40)
        await driver.settle()
        assert "entropy" in driver.text and "You" in driver.text and "No feature is chosen" in driver.text


async def test_keys_sent_in_one_burst_are_obeyed_in_their_order() -> None:
    class Box(App[None]):
        def compose(self) -> ComposeResult:
            yield Line("old")

    async with Box().run_test() as pilot:
        line = pilot.app.query_one(Line)
        line.focus()
        await pilot.pause()
        for key, character in (("ctrl+u", None), ("3", "3"), ("x", "x"), ("backspace", None), ("0", "0")):
            pilot.app.post_message(Key(key, character))
        await pilot.pause()
        assert line.value == "30"


async def test_the_steering_sheet_leaves_the_end_of_the_reply_in_sight(running: Running) -> None:
    async with running(FakeEngine(["one", " two", " three"]), size=(80, 24)) as driver:
        await driver.send("count")
        await driver.press("escape", "s")
        assert "one two three" in str(driver.app.chat.query_one("#strip", Static).render())


def test_the_end_of_a_reply_is_cut_to_its_rows() -> None:
    shown = tail("word " * 200 + "end\x1b[2J", 40).plain.splitlines()
    assert len(shown) == 4 and shown[-1].endswith("[2J") and "\x1b" not in "".join(shown)
    assert all(len(line) <= 39 for line in shown) and not tail("", 40)
