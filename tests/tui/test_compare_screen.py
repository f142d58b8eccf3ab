"""The Compare screen over a scripted engine: what it asks for, what it shows, its keys, and how it stops."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app import Registry, SteerApp
from steer.commands import BY_NAME
from steer.config import Settings
from steer.edits import Edit, SteeringSet
from steer.events import TokenEvent
from steer.session import Prompt, Session
from steer.tui.chat import ChatScreen
from steer.tui.compare import CompareScreen, end_of
from steer.tui.dialogs import Ask, Confirm, Help
from steer.tui.trial import Trial
from tests.tui.conftest import Driver, Running, session_of
from tests.tui.fake_engine import BOOM, HOLD, PLAIN, FakeEngine, words
from tests.tui.test_snapshots import SIZES
from tests.tui.test_talking import HOSTILE, check_harmless

STEERED = "I am the fog over the cold strait, a voice of iron and rain."
SET = SteeringSet().add(Edit.parse("0 +1x"))


def two(steered: str | list[str] = STEERED, baseline: str | list[str] = PLAIN) -> FakeEngine:
    """An engine that says something else under a set."""
    engine = FakeEngine(baseline)
    engine.steered_script = words(steered) if isinstance(steered, str) else steered
    return engine


def screen_of(driver: Driver) -> CompareScreen:
    assert isinstance(driver.app.screen, CompareScreen)
    return driver.app.screen


async def compared(driver: Driver) -> CompareScreen:
    """Says something, and compares."""
    await driver.send("Who are you?")
    await driver.press("escape", "d")
    return screen_of(driver)


async def held(driver: Driver, engine: FakeEngine) -> CompareScreen:
    """A comparison that stands at its `HOLD`; the chat's reply has been let through."""
    engine.go.set()
    await driver.send("Who are you?")
    await driver.press("escape")
    engine.go.clear()
    engine.held.clear()
    await driver.pilot.press("d")
    await asyncio.to_thread(engine.held.wait)
    screen_of(driver).drain()
    await driver.pilot.pause()
    return screen_of(driver)


async def test_one_prompt_is_answered_twice_with_one_seed(running: Running) -> None:
    engine = two()
    async with running(engine, steering=SET, system="be kind") as driver:
        screen = await compared(driver)
        assert engine.batches == [([SteeringSet(), SET], [7, 7], [1])]
        asked = Prompt(messages=(("system", "be kind"), ("user", "Who are you?")))
        assert engine.prompts[-2:] == [asked, asked]
        assert screen.trial is not None
        assert [reply.text for reply in screen.trial.replies] == [PLAIN, STEERED]
        assert not screen.timer._active.is_set()
        for said in (
            "Who are you?",
            "system message: be kind",
            "seed 7, T 0.7",
            "Baseline · 16 tok",
            "With the edits · steered, 1 edit · 14 tok",
            "Golden Gate Bridge, a",
            "fog over the cold strait",
            "first token that differs: 3",
            "KL 2.50 nats a token",
            "perplexity to the unsteered model 2.7, was 1.6",
            "repeats 0%, was 0%",
        ):
            assert said in driver.text, said
        first = screen.trial.compared().changed[0]
        assert f"{first.latent} " in driver.text and f"{first.difference:+.1f}" in driver.text


async def test_an_edit_that_changes_nothing_says_so(running: Running) -> None:
    async with running(FakeEngine("a b c"), steering=SET) as driver:
        await compared(driver)
        assert "the replies are the same" in driver.text


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ((), "no feature is steered"),
        (("/add 0 1x", "/mute 0"), "every edit is muted"),
        (("/add 0 1x", "/bypass"), "bypass is on"),
    ],
)
async def test_without_an_edit_it_says_how_to_steer(running: Running, prepare: tuple[str, ...], said: str) -> None:
    engine = FakeEngine("a b")
    async with running(engine, size=(80, 24)) as driver:
        await driver.send("hello")
        for line in prepare:
            await driver.send(line)
        await driver.press("escape", "d")
        assert "There is nothing to compare" in driver.text and said in driver.text
        await driver.press("r", "S", "n", "y", "x", "enter", "left_square_bracket")
        assert isinstance(driver.app.screen, CompareScreen) and not engine.batches
        await driver.press("escape")
        assert isinstance(driver.app.screen, ChatScreen)


async def test_edits_that_the_guard_would_weaken_are_told_apart(running: Running) -> None:
    async with running(two(), steering=SET) as driver:
        for mode, told in (("watch", False), ("back-off", True)):
            await driver.press("i")
            await driver.send(f"/guard {mode}")
            await compared(driver)
            assert ("With the edits, without the guard · steered, 1 edit" in driver.text) is told
            await driver.press("escape")


async def test_without_an_sae_no_feature_is_promised(running: Running) -> None:
    engine = FakeEngine("a b")
    engine.info = replace(engine.info, hook=None, latents=0)
    async with running(engine) as driver:
        await compared(driver)
        assert "this model runs without an SAE" in driver.text and "finds a feature" not in driver.text


async def test_the_error_dropped_can_be_compared(running: Running) -> None:
    async with running(FakeEngine("a b"), steering=SteeringSet(error="drop")) as driver:
        screen = await compared(driver)
        assert screen.trial is not None and "the replies are the same" in driver.text
        await driver.press("right_square_bracket")
        assert "there is no edit to change" in driver.text


async def test_what_cannot_be_compared_is_one_sentence_in_the_chat(running: Running) -> None:
    engine = FakeEngine(["one", HOLD])
    async with running(engine, steering=SET) as driver:
        await driver.press("escape", "d")
        assert "there is no message to answer" in driver.says()
        await driver.press("i")
        await driver.send("/complete")
        await driver.send("/compare")
        assert "there is no text to go on from" in driver.says()
        await driver.send("/chat")
        await driver.send("go", wait=False)
        await asyncio.to_thread(engine.held.wait)
        await driver.send("/compare", wait=False)
        assert "a reply is still being written (Esc stops it" in driver.says()
        assert isinstance(driver.app.screen, ChatScreen)
        engine.go.set()
        await driver.settle()


async def test_a_text_is_compared_from_where_the_model_went_on(running: Running) -> None:
    engine = two()
    async with running(engine, steering=SET, mode="completion") as driver:
        await driver.send("Once upon a time")
        await driver.press("escape", "d")
        assert engine.prompts[-1] == Prompt(text="Once upon a time")
        assert "a text to go on from" in driver.text


async def test_the_seed_is_that_of_the_reply_until_a_new_one_is_drawn(running: Running) -> None:
    engine = two()
    async with running(engine, steering=SET, seed=None) as driver:
        screen = await compared(driver)
        reply = session_of(driver).turns[1].reply
        assert reply is not None and engine.batches[0][1] == [reply.seed] * 2
        await driver.press("r")
        assert engine.batches[1] == engine.batches[0]
        await driver.press("S")
        assert engine.batches[2][1] == [screen.seed] * 2 != engine.batches[0][1]
        assert session_of(driver).seed is None


async def test_brackets_change_the_chosen_edit_and_run_again(running: Running) -> None:
    engine = two()
    async with running(engine, steering=SET.add(Edit.parse("ablate 3")).add(Edit.parse("1 +2x"))) as driver:
        await compared(driver)
        assert "a of 3: 0 +1x" in driver.text
        await driver.press("right_square_bracket")
        assert [str(edit) for edit in engine.batches[-1][0][1].edits] == ["0 +1.05x", "ablate 3", "1 +2x"]
        await driver.press("left_square_bracket")
        assert engine.batches[-1] == engine.batches[0] and len(engine.batches) == 3
        await driver.press("e", "right_square_bracket")
        assert "b of 3: ablate 3" in driver.text and "`ablate 3` has no strength" in driver.text
        await driver.press("e", "left_square_bracket")
        assert "c of 3: 1 +1.95x" in driver.text and len(engine.batches) == 4
        assert session_of(driver).steering == engine.batches[-1][0][1]


async def test_steps_in_quick_succession_all_count(running: Running) -> None:
    engine = two()
    async with running(engine, steering=SET) as driver:
        screen = await compared(driver)
        for pause in (0, 0.002, 0.005, 0.01, 0.015, 0):
            screen.action_strength(1)
            await asyncio.sleep(pause)
        await driver.settle()
        while screen.writing:
            await driver.settle()
        assert str(session_of(driver).steering.edits[0]) == "0 +1.3x" == str(driver.app.chat.panel.edit)
        assert screen.trial is not None and screen.trial.steering == session_of(driver).steering
        assert "0 +1.3x" in driver.text


async def test_so_they_do_in_the_chats_pane(running: Running) -> None:
    async with running(two(), steering=SET) as driver:
        for _ in range(6):
            driver.app.chat.panel.action_step(1)
            await asyncio.sleep(0)
        await driver.settle()
        assert str(session_of(driver).steering.edits[0]) == "0 +1.3x" == str(driver.app.chat.panel.edit)


async def test_another_run_waits_for_the_first_to_stop(running: Running) -> None:
    engine = two(["one", HOLD, " two"], ["one", " two"])
    async with running(engine, steering=SET) as driver:
        screen = await held(driver, engine)
        assert "writing... · 1 tok" in driver.text and "Esc stop" in driver.text
        first = screen.trial
        engine.steered_script = ["three"]
        await driver.press("right_square_bracket", "right_square_bracket")
        assert screen.trial is not first and first is not None and first.stop.is_set()
        assert str(engine.batches[-1][0][1].edits[0]) == "0 +1.1x"
        assert screen.trial is not None and screen.trial.replies[1].text == "three" and not screen.writing


async def test_escape_stops_first_and_goes_back_then(running: Running) -> None:
    engine = two(["one", HOLD, " two"], ["one", " two"])
    async with running(engine, steering=SET) as driver:
        screen = await held(driver, engine)
        await driver.press("escape")
        assert isinstance(driver.app.screen, CompareScreen) and not screen.writing
        assert "stopped" in driver.text and "the replies are the same" not in driver.text
        await driver.press("escape")
        assert isinstance(driver.app.screen, ChatScreen)
        engine.held.clear()
        await driver.pilot.press("d")
        await asyncio.to_thread(engine.held.wait)
        await driver.press("ctrl+c")
        assert not screen_of(driver).writing
        engine.held.clear()
        await driver.pilot.press("r")
        await asyncio.to_thread(engine.held.wait)
        Registry(driver.app.screen)._run(BY_NAME["mode"])  # as the palette does: it leaves the screen
        await driver.settle()
        assert isinstance(driver.app.screen, ChatScreen) and session_of(driver).mode == "completion"


async def test_leaving_the_app_stops_it(running: Running) -> None:
    engine = two(["one", HOLD, " two"], ["one", " two"])
    async with running(engine, steering=SET) as driver:
        screen = await held(driver, engine)
        await driver.pilot.press("q")
    assert screen.trial is not None and screen.trial.stop.is_set()
    assert driver.app.return_code == 0


async def test_a_trial_that_breaks_says_so(running: Running) -> None:
    engine = two(["one", BOOM])
    async with running(engine, steering=SET) as driver:
        await compared(driver)
        assert "the device is out of memory (shorten the chat)" in driver.text
        assert "With the edits · failed · 1 tok" in driver.text
        engine.steered_script = words(STEERED)
        await driver.press("r")
        assert "out of memory" not in driver.text and "fog over the cold strait" in driver.text

    class Broken(FakeEngine):
        def stream(self, prompts: Any, steering: Any, **options: Any) -> Any:
            if not callable(steering):
                raise RuntimeError("a bug")
            yield from super().stream(prompts, steering, **options)

    async with running(Broken(), steering=SET) as driver:
        await compared(driver)
        assert "the comparison broke: a bug" in driver.text


async def test_the_cursor_goes_from_difference_to_difference_and_across(running: Running) -> None:
    async with running(two("a b X d e Y Z", "a b c d e f"), steering=SET) as driver:
        screen = await compared(driver)
        baseline, steered = screen.sides
        assert screen.trial is not None and screen.trial.differences() == [2, 5]
        assert steered.has_focus and steered.cursor == ("reply", 6)
        await driver.press("n")
        assert baseline.cursor == steered.cursor == ("reply", 2)
        assert " X" in driver.text and "KL 2.5" in driver.text
        await driver.press("n", "enter")
        assert baseline.has_focus and baseline.cursor == ("reply", 5)
        await driver.press("N", "left", "tab")
        assert steered.has_focus and (baseline.cursor, steered.cursor) == (("reply", 1), ("reply", 2))
    async with running(FakeEngine("a b"), steering=SET) as driver:
        await compared(driver)
        await driver.press("n")
        assert "the replies do not differ" in driver.text


async def test_paint_goes_round_the_steered_features(running: Running) -> None:
    async with running(two(), steering=SET.add(Edit.parse("3 +1x"))) as driver:
        screen = await compared(driver)
        seen = []
        for _ in range(4):
            seen.append(screen.painting)
            assert screen.sides[0]._latent == (screen.painting if isinstance(screen.painting, int) else None)
            await driver.press("w")
        assert seen == [0, 3, "strongest", None] and screen.painting == 0
        assert driver.app.chat.painting == "strongest"


async def test_both_replies_are_copied_and_written_as_json(running: Running, tmp_path: Path) -> None:
    async with running(two(), steering=SET) as driver:
        screen = await compared(driver)
        await driver.press("y")
        assert driver.app.clipboard == f"baseline:\n{PLAIN}\n\nwith the edits:\n{STEERED}\n"
        await driver.press("x")
        assert isinstance(driver.app.screen, Ask)
        await driver.press("escape")
        screen._export(str(tmp_path / "no" / "where.json"))
        await driver.pilot.pause()
        assert "cannot be written" in driver.text
        screen._export(str(tmp_path / "out.json"))
        entry = json.loads((tmp_path / "out.json").read_text())
        assert entry["prompt"] == [["user", "Who are you?"]] and entry["seed"] == 7 and entry["edits"] == ["0 +1x"]
        assert [row["text"] for row in entry["rows"]] == [PLAIN, STEERED]
        assert entry["rows"][1]["report"]["steered"] and not entry["rows"][0]["report"]["steered"]
        assert [row["tokens"][0].get("kl") for row in entry["rows"]] == [None, 2.5]
        assert entry["comparison"]["first_difference"] == 3 and entry["comparison"]["changed"][0]["label"]


async def test_a_file_is_written_over_only_when_told_so(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "comparison.json", tmp_path / "comparison-2.json"
    async with running(two(), steering=SET) as driver:
        await compared(driver)
        await driver.press("x", "enter")
        written = first.read_text()
        first.write_text("mine")
        await driver.press("x", "enter")
        assert (first.read_text(), second.read_text()) == ("mine", written)
        for answer, holds in (("n", "mine"), ("escape", "mine"), ("y", written)):
            await driver.press("x", "ctrl+u", *"comparison", "full_stop", *"json", "enter")
            assert isinstance(driver.app.screen, Confirm) and "comparison.json exists" in driver.text
            await driver.press(answer)
            assert isinstance(driver.app.screen, CompareScreen) and first.read_text() == holds
        assert "wrote comparison.json" in driver.text
        screen_of(driver)._export("~nobody-of-that-name/out.json")
        await driver.pilot.pause()
        assert "cannot be written" in driver.text


async def test_text_that_would_be_obeyed_is_drawn(running: Running) -> None:
    engine = two([HOSTILE, " 越 ", HOSTILE], [HOSTILE])
    engine.names = {latent: HOSTILE for latent in range(20)}
    async with running(engine, steering=SET, system=HOSTILE, size=(80, 24)) as driver:
        await driver.send(HOSTILE)
        await driver.press("escape", "d")
        await check_harmless(driver)
        await driver.press("w", "n", "y")
        await check_harmless(driver)
        assert "\x1b" not in driver.app.clipboard
        await driver.press("question_mark")
        assert isinstance(driver.app.screen, Help)
        assert "Next place from which the replies differ" in driver.text


async def test_a_narrow_terminal_has_one_side_above_the_other(running: Running) -> None:
    async with running(two(), steering=SET, size=(80, 24)) as driver:
        screen = await compared(driver)
        baseline, steered = (side.region for side in screen.sides)
        assert baseline.width == steered.width == 80 and baseline.bottom == steered.y
        assert "first token that differs: 3" in driver.text and "fog over the cold strait" in driver.text
        await driver.pilot.resize_terminal(120, 36)
        await driver.settle()
        baseline, steered = (side.region for side in screen.sides)
        assert baseline.y == steered.y and baseline.right == steered.x
        assert driver.text.count(" | ") == 5, "as many changes as there is room for"


def test_while_both_are_written_only_what_both_have_is_compared() -> None:
    trial = Trial(Session(FakeEngine()), Prompt(text="x"), 0)
    ours, theirs = (reply.events for reply in trial.replies)
    ours += [TokenEvent(0, place, token, "") for place, token in enumerate((1, 2, 3))]
    theirs += [TokenEvent(1, place, token, "") for place, token in enumerate((1, 2))]
    assert trial.compared().first_difference is None
    assert trial.differences() == [2]


def test_numbers_that_are_none_are_null_in_the_file() -> None:
    trial = Trial(Session(FakeEngine()), Prompt(text="x"), 0)
    trial.replies[1].events.append(TokenEvent(1, 0, 5, "a", logprob=float("nan"), kl=float("inf"), surprisal=1.0))
    entry = trial.entry({})
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    told = entry["rows"][1]["tokens"][0]
    assert (told["logprob"], told["kl"], told["surprisal"]) == (None, None, 1.0)
    assert entry["comparison"]["baseline_perplexity"] is None


def test_a_trial_keeps_the_pace_of_the_session_row_beside_row() -> None:
    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    waits: list[float] = []
    trial = Trial(Session(FakeEngine("a b c"), pace=0.5), Prompt(text="x"), 0)
    trial.stop = Clock()
    trial.write()
    assert len(waits) == 3 and all(1 < seconds <= 6 for seconds in waits)


def test_the_end_of_a_text_is_what_fits() -> None:
    assert end_of("once upon a time", 8) == "..a time"
    assert end_of("越越越越", 6) == "..越越" and end_of("short", 8) == "short"


@pytest.mark.parametrize("size", SIZES, ids=["120x36", "80x24"])
def test_how_it_looks(snap_compare: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTUAL_ANIMATIONS", "none")
    engine = two(f"{STEERED} I am the bridge of the Golden Gate.")
    app = SteerApp(lambda: engine, Settings(pace=0), {"seed": 7, "steering": SET})

    async def run(pilot: Any) -> None:
        driver = Driver(app, pilot)
        await driver.settle()
        await compared(driver)
        await driver.press("n")

    assert snap_compare(app, terminal_size=size, run_before=run)
