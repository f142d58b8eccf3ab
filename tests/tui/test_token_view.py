"""The transcript: every cell knows its token, following the bottom, moving by token, line, message and firing."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from textual import on
from textual.app import App, ComposeResult
from textual.geometry import Offset
from textual.message import Message

from steer.events import CONTROL, LatentHit, TokenEvent
from steer.tui import palette
from steer.tui.token_view import TokenView
from steer.tui.wrap import Wrapped

HOSTILE = [
    "\x1b]0;x\x07",
    " [/]",
    " [@click=app.quit]x[/]",
    " 中文字符",
    " 👩‍👩‍👧",
    "e\u0301",
    "\n\n",
    "\tx",
    "\u202eabc",
]
SIZES = [(120, 36), (80, 24), (20, 5), (3, 2)]
TEXT = st.text(
    st.sampled_from("ab \n\t中é\u0301👩\u200d\x1b[]") | st.characters(exclude_categories=["Cs"]), max_size=12
)


@pytest.fixture(autouse=True)
def colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)


def event(index: int, text: str, special: bool = False, **hits: float) -> TokenEvent:
    found = tuple(LatentHit(int(name[1:]), value) for name, value in hits.items())
    return TokenEvent(0, index, index, text, special=special, hits=found)


def events(texts: Iterable[str]) -> list[TokenEvent]:
    return [event(index, text) for index, text in enumerate(texts)]


def ten(latent: int) -> float | None:
    return 10.0


class Host(App[None]):
    CSS = "TokenView { height: 1fr; }"

    def __init__(self) -> None:
        super().__init__()
        self.got: list[Message] = []

    def compose(self) -> ComposeResult:
        yield TokenView()

    def on_mount(self) -> None:
        self.view.focus()

    @property
    def view(self) -> TokenView:
        return self.query_one(TokenView)

    @on(TokenView.Moved)
    @on(TokenView.Pinned)
    def keep(self, message: Message) -> None:
        self.got.append(message)

    def rows(self) -> list[str]:
        return [self.view.render_line(y).text.rstrip() for y in range(self.view.size.height)]


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, max_size=25), st.integers(1, 30))
def test_joined_lines_give_back_the_text_and_each_cell_its_token(texts: list[str], width: int) -> None:
    wrapped = Wrapped(width)
    for token, text in enumerate(texts):
        wrapped.append(token, text)
    assert "".join(line.text for line in wrapped.lines) == "".join(texts)
    for line in wrapped.lines:
        assert line.width == sum(piece.width for piece in line.pieces)
        shown = [piece for piece in line.pieces if piece.width]
        assert line.width <= width + 1 or len(shown) == 1
        for piece in line.pieces:
            for x in range(piece.x, piece.x + piece.width):
                assert line.token_at(x) == piece.token
    for token in range(len(texts)):
        own = [(number, p.text) for number, line in enumerate(wrapped.lines) for p in line.pieces if p.token == token]
        solid = [number for number, part in own if not part.isspace()]
        assert wrapped.first.get(token) == next(iter([*solid, *(number for number, _ in own)]), None)
    back = ["".join(p.text for line in wrapped.lines for p in line.pieces if p.token == t) for t in range(len(texts))]
    assert back == texts


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, max_size=20), st.integers(1, 24))
def test_appending_never_changes_a_line_before_the_last(texts: list[str], width: int) -> None:
    wrapped = Wrapped(width)
    for token, text in enumerate(texts):
        before = [(line.text, line.version) for line in wrapped.lines]
        first = wrapped.append(token, text)
        assert first == len(before) - 1
        assert [(line.text, line.version) for line in wrapped.lines[:first]] == before[:first]


def test_lines_break_at_spaces_between_tokens_and_long_words_are_cut() -> None:
    wrapped = Wrapped(10)
    for token, text in enumerate(["Gol", "den", " Gate", "way", " ", "abcdefghijklm"]):
        wrapped.append(token, text)
    assert [line.text for line in wrapped.lines] == ["Golden ", "Gateway ", "abcdefghij", "klm"]
    wide = Wrapped(6)
    wide.append(0, "ab中文字符")
    assert [line.text for line in wide.lines] == ["ab中文", "字符"]


async def test_a_click_on_a_cell_finds_its_token() -> None:
    app = Host()
    async with app.run_test(size=(24, 20)) as pilot:
        app.view.start("a", "Llama", role="assistant")
        tokens = events(["Ab", " cde", " fgh", " Ij", "klm", " Nopq", " 中文", " rs", "\n", "tuvw", " 👩‍👩", " xyz"])
        app.view.extend("a", tokens)
        await pilot.pause()
        found: set[str] = set()
        for y in range(1, 5):
            cells = [char for char in app.view.render_line(y).text for _ in range(cell_len(char))]
            for x in range(0, 22, 4):
                app.view.cursor = None
                await pilot.click(TokenView, offset=Offset(x, y))
                if app.view.cursor is not None:
                    token = tokens[app.view.cursor[1]]
                    assert cells[x] in palette.visible(token.text) or token.text == "\n"
                    found.add(token.index)
                else:
                    assert cells[x] == " "
        assert len(found) >= 7


@pytest.mark.parametrize("size", SIZES)
async def test_hostile_text_is_drawn_and_obeyed_nowhere(size: tuple[int, int]) -> None:
    app = Host()
    async with app.run_test(size=size) as pilot:
        view = app.view
        view.start("u", "[/] \x1b]0;t\x07", role="user")
        view.text("u", "".join(HOSTILE))
        view.start("a", "Llama  [@click=app.quit]x[/]", role="assistant")
        view.extend("a", events(HOSTILE * 5))
        view.paint(None, ten, strongest=True)
        for key in ["up", "down", "left", "right", "n", "g", "G", "{", "}", "_", "z", "enter", "pageup"]:
            await pilot.press(key)
            for y in range(view.size.height):
                strip = view.render_line(y)
                assert strip.cell_length == cell_len(strip.text) == view.scrollable_content_region.width
                assert not CONTROL.search(strip.text)
                assert "@click" not in str([segment.style and segment.style.meta for segment in strip])
        if size[0] == 120:
            await pilot.press("g")
            assert any("[@click=app.quit]x[/]" in row for row in app.rows())
        assert app.is_running


async def test_sections_draw_header_body_tokens_and_tail() -> None:
    app = Host()
    async with app.run_test(size=(40, 20)) as pilot:
        view = app.view
        view.start("u", "You", role="user")
        view.text("u", "Tell me.")
        view.start("a", "Llama", role="assistant")
        view.extend("a", [event(0, "<|start|>", special=True), event(1, "I"), event(2, ""), event(3, " am")])
        view.text("a", " ...")
        view.title("a", "Llama  steered")
        await pilot.pause()
        assert app.rows()[:6] == ["You", "  Tell me.", "", "Llama  steered", "  I am ...", ""]
        view.extend("a", [event(4, " late")])
        assert app.rows()[4] == "  I am late ..."
        view.remove("u")
        assert app.rows()[:2] == ["Llama  steered", "  I am late ..."]
        view.clear()
        assert app.rows() == [""] * 20


async def test_a_section_without_title_has_no_header_and_model_text_a_rule() -> None:
    app = Host()
    async with app.run_test(size=(40, 20)) as pilot:
        app.view.start("p", "", role="prompt")
        app.view.text("p", "Once upon")
        app.view.start("a", "", role="assistant")
        app.view.extend("a", events([" a", " time"]))
        await pilot.pause()
        assert app.rows()[:2] == ["  Once upon", "▎  a time"]


async def test_paint_changes_styles_and_wraps_nothing_again() -> None:
    app = Host()
    async with app.run_test(size=(40, 20)) as pilot:
        view = app.view
        view.start("a", "Llama", role="assistant")
        view.extend("a", [event(0, "x", n1=9.0), event(1, " y", n1=1.0, n2=0.5), event(2, " z", n2=5.0)])
        view.follow, view.cursor = False, None
        await pilot.pause()

        def backgrounds() -> list[object]:
            return [s.style and s.style.bgcolor for s in view.render_line(1) if s.text.strip() in ("x", "y", "z")]

        wrapped, plain = view.sections[0].wrapped, backgrounds()
        assert len(set(plain)) == 1
        colours = [palette.band_style(band).bgcolor for band in range(8)]
        view.paint(1, ten)
        assert backgrounds() == [colours[7], colours[2], plain[0]]
        view.paint(2, ten)
        assert backgrounds() == [plain[0], colours[1], colours[4]]
        view.action_rescale()
        assert backgrounds() == [plain[0], colours[2], colours[7]]
        assert app.rows()[0] == "Llama  scaled to own max 5.0"
        view.action_rescale()
        view.paint(None, ten, strongest=True)
        assert backgrounds() == [colours[7], colours[2], colours[4]]
        view.paint(2, lambda _: None)
        assert backgrounds() == [plain[0], colours[2], colours[7]], "an unknown maximum is the reply's own"
        view.paint(None, ten)
        assert backgrounds() == plain
        assert view.sections[0].wrapped is wrapped


async def test_the_ruler_says_the_bands_without_colour() -> None:
    app = Host()
    async with app.run_test(size=(40, 20)) as pilot:
        view = app.view
        view.start("a", "Llama", role="assistant")
        view.extend("a", [event(0, "xx", n1=9.0), event(1, " y"), event(2, " z\n", n1=3.0)])
        view.paint(1, ten)
        await pilot.press("_")
        assert app.rows()[1:3] == ["  xx y z↵", "  ▇▇  ▃▃"]
        await pilot.press("_")
        assert app.rows()[2] == ""


async def test_white_space_is_marked_when_it_fires() -> None:
    app = Host()
    async with app.run_test(size=(40, 20)) as pilot:
        view = app.view
        view.start("a", "Llama", role="assistant")
        view.extend(
            "a", [event(0, "a"), event(1, "  ", n1=5.0), event(2, "\t", n1=5.0), event(3, "b\n", n1=5.0), event(4, "c")]
        )
        await pilot.pause()
        assert app.rows()[1:3] == ["  a      b", "  c"]
        view.paint(1, ten)
        assert app.rows()[1:3] == ["  a··→   b↵", "  c"]


async def test_the_cursor_follows_a_growing_reply_and_posts_where_it_is() -> None:
    app = Host()
    async with app.run_test(size=(40, 10)) as pilot:
        view = app.view
        view.start("a", "Llama", role="assistant")
        for start in range(0, 200, 20):
            view.extend("a", [event(start + i, f" word{start + i}") for i in range(20)])
        await pilot.pause()
        assert view.cursor == ("a", 199)
        assert not view.more_below
        assert isinstance(app.got[-1], TokenView.Moved)
        assert (app.got[-1].index, app.got[-1].total, app.got[-1].event.text) == (199, 200, " word199")
        await pilot.press("g")
        assert view.cursor == ("a", 0)
        assert view.more_below
        view.extend("a", [event(200, " tail")])
        await pilot.pause()
        assert view.cursor == ("a", 0)
        assert view.scroll_offset.y == 0
        assert view.more_below
        await pilot.press("G")
        assert view.cursor == ("a", 200)
        view.extend("a", [event(201, " more")])
        await pilot.pause()
        assert view.cursor == ("a", 201)
        assert not view.more_below


async def test_keys_move_by_token_line_message_and_firing() -> None:
    app = Host()
    async with app.run_test(size=(30, 20)) as pilot:
        view = app.view
        for key in ("a", "b"):
            view.start(f"u{key}", "You", role="user")
            view.text(f"u{key}", "hello there")
            view.start(key, "Llama", role="assistant")
            view.extend(
                key,
                [
                    event(0, "<s>", special=True),
                    *(event(i, f" word{i}", n7=2.0) if i in (2, 9) else event(i, f" word{i}") for i in range(1, 12)),
                ],
            )
        view.paint(7, ten)

        async def after(*keys: str) -> tuple[str, int] | None:
            await pilot.press(*keys)
            return view.cursor

        assert await after("g") == ("a", 1)
        assert await after("right", "l") == ("a", 3)
        assert await after("left", "h", "h") == ("a", 1)
        assert await after("n") == ("a", 2)
        assert await after("n", "n") == ("b", 2)
        assert await after("N") == ("a", 9)
        assert await after("right_curly_bracket") == ("b", 1)
        assert await after("right_curly_bracket") == ("b", 1)
        assert await after("right", "left_curly_bracket") == ("b", 1)
        assert await after("left_curly_bracket") == ("a", 1)
        first = await after("g", "right", "right")
        below = await after("down")
        assert below is not None and below != first
        assert view.sections[1].wrapped.first[below[1]] == 1
        assert await after("up") == first
        assert await after("G", "up", "k", "k", "k", "k", "j") is not None
        await pilot.press("enter")
        pinned = app.got[-1]
        assert isinstance(pinned, TokenView.Pinned)
        assert view.cursor == (pinned.key, pinned.index)


@pytest.mark.parametrize("resized", [(20, 5), (200, 60)])
async def test_resizing_wraps_again_and_keeps_the_cursor_in_sight(resized: tuple[int, int]) -> None:
    app = Host()
    async with app.run_test(size=(60, 15)) as pilot:
        view = app.view
        view.start("a", "Llama", role="assistant")
        view.extend("a", [event(i, f" word{i}") for i in range(300)])
        view.move_to("a", 150)
        await pilot.resize_terminal(*resized)
        await pilot.pause()
        assert view.cursor == ("a", 150)
        assert any("word150" in row for row in app.rows())
        assert max(map(cell_len, app.rows())) <= resized[0]


async def test_tokens_fed_before_the_first_layout_are_wrapped_to_the_screen() -> None:
    class Early(Host):
        def on_mount(self) -> None:
            self.view.start("a", "Llama", role="assistant")
            self.view.extend("a", [event(i, f" word{i}") for i in range(40)])

    app = Early()
    async with app.run_test(size=(30, 20)) as pilot:
        await pilot.pause()
        assert {section.width for section in app.view.sections} == {app.view.scrollable_content_region.width - 4}
        assert app.rows()[0] == "Llama"
