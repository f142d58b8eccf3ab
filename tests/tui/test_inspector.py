"""The Token pane at several sizes."""

from __future__ import annotations

import math

import pytest
from rich.cells import cell_len
from textual import on
from textual.app import App, ComposeResult

from steer.events import CONTROL, Alternative, LatentHit, TokenEvent
from steer.tui.inspector import Inspector

LABELS = {
    21863: "Golden Gate, bridges",
    10233: "[@click=app.quit]x[/]",
    902: "\x1b]0;x\x07 中文 👩‍👩‍👧\nsecond",
    40031: "",
}
HITS = tuple(LatentHit(latent, 12.4 - place) for place, latent in enumerate([21863, 10233, 902, 40031, *range(20)]))


def token(index: int, text: str = " towers", hits: tuple[LatentHit, ...] = HITS, special: bool = False) -> TokenEvent:
    others = (Alternative(" spans", 0.11), Alternative("[/]\x1b", 0.08), Alternative("\n", 0.04))
    return TokenEvent(0, index, 22626, text, special, math.log(0.62), 1.9 * math.log(2), others, hits)


HISTORY = [token(10, "a", ()), token(11), token(12, "[/]", HITS[2:])]


class Host(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[str, int]] = []

    def compose(self) -> ComposeResult:
        yield Inspector()

    def on_mount(self) -> None:
        self.pane.focus()

    @property
    def pane(self) -> Inspector:
        return self.query_one(Inspector)

    @on(Inspector.Steer)
    @on(Inspector.Paint)
    @on(Inspector.Open)
    def keep(self, message: Inspector.Steer | Inspector.Paint | Inspector.Open) -> None:
        self.got.append((type(message).__name__, message.latent))

    def show(self, event: TokenEvent | None, painted: int | None = 21863) -> None:
        maxima = {21863: 24.8}.get
        self.pane.show(event, 3, labels=LABELS, maxima=maxima, painted=painted, history=HISTORY)

    def rows(self) -> list[str]:
        return [self.pane.render_line(y).text.rstrip() for y in range(self.pane.size.height)]


async def test_a_token_shows_its_numbers_alternatives_and_features() -> None:
    app = Host()
    async with app.run_test(size=(39, 20)) as pilot:
        app.show(HISTORY[1])
        await pilot.pause()
        rows = app.rows()
        assert rows[0] == "id 22626   p .62   entropy 1.9 bits"
        assert rows[1].startswith("instead: spans .11  [/]\ufffd .08  ↵ .04")
        assert rows[2].startswith("features on here")
        assert rows[3] == ">a 21863 Golden Gate, br.. ▇▇▇     12.4", "a bar of half the recorded max"
        assert "[@click=app.qui.." in rows[4]
        assert "(no label)" in rows[6]
        assert rows[-2:] == ["over this reply  a", "▁▇▁"]
        assert app.pane._border_title is not None and app.pane._border_title.plain == "Token 2 of 3"
        assert app.pane._border_subtitle is not None and app.pane._border_subtitle.plain == "' towers'"


async def test_keys_choose_a_feature_and_post_what_to_do_with_it() -> None:
    app = Host()
    async with app.run_test(size=(39, 12)) as pilot:
        app.show(HISTORY[1])
        await pilot.press("enter", "down", "p", "j", "right", "o", "up", "enter")
        assert app.got == [("Steer", 21863), ("Paint", 10233), ("Open", 902), ("Open", 902), ("Steer", 10233)]
        await pilot.press("end")
        assert app.pane.selected == HITS[-1].latent
        assert any(row.startswith(">") and f" {HITS[-1].latent} " in row for row in app.rows())
        await pilot.press("down", "home")
        assert app.pane.selected == 21863


async def test_the_chosen_feature_stays_chosen_while_it_is_active() -> None:
    app = Host()
    async with app.run_test(size=(39, 20)) as pilot:
        app.show(HISTORY[1])
        await pilot.press("down", "down")
        app.show(HISTORY[2])
        assert app.pane.selected == 902
        app.show(HISTORY[0])
        assert app.pane.selected is None
        await pilot.press("enter", "p", "right", "up")
        assert app.got == []


async def test_a_token_without_features_says_why() -> None:
    app = Host()
    async with app.run_test(size=(60, 20)) as pilot:
        await pilot.pause()
        app.show(None)
        assert app.rows()[0] == "Move to a token in the transcript to see its features."
        app.show(token(10, "a", ()))
        assert app.rows()[2] == "no feature is active"
        app.show(token(0, "<s>", (), special=True))
        assert app.rows()[2] == "no features are read on this token"
        app.show(TokenEvent(0, 3, 5, "x"))
        assert app.rows()[0] == "id 5"


@pytest.mark.parametrize("size", [(120, 36), (43, 12), (20, 5), (2, 1)])
async def test_every_size_draws_lines_of_the_pane_s_width_without_control_characters(size: tuple[int, int]) -> None:
    app = Host()
    async with app.run_test(size=size) as pilot:
        for event in (*HISTORY, None, token(11, "\x1b]0;x\x07")):
            app.show(event, painted=None)
            await pilot.press("down")
            for y in range(size[1]):
                strip = app.pane.render_line(y)
                assert strip.cell_length == cell_len(strip.text) == app.pane.size.width
                assert not CONTROL.search(strip.text)
        assert app.is_running
