"""Bands, bars and the strips through which every stranger's text is drawn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.app import App
from textual.widget import Widget

from steer.events import CONTROL
from steer.tui import palette

HOSTILE = ["\x1b]0;x\x07", "[/]", "[@click=app.quit]x[/]", "中文字", "👩‍👩‍👧", "e\u0301", "a\nb\tc", "\u202eabc", "❤️"]


@pytest.mark.parametrize(
    ("activation", "band"),
    [
        (0, 0),
        (-1, 0),
        (float("nan"), 0),
        (0.1, 0),
        (0.2, 1),
        (1, 2),
        (2.5, 3),
        (4, 4),
        (5.5, 5),
        (7, 6),
        (8.5, 7),
        (90, 7),
    ],
)
def test_bands_begin_at_their_share_of_the_maximum(activation: float, band: int) -> None:
    assert palette.band(activation, 10) == band


@pytest.mark.parametrize("maximum", [None, 0.0, -1.0])
def test_without_a_maximum_an_active_latent_takes_the_middle_band(maximum: float | None) -> None:
    assert palette.band(3.0, maximum) == 4
    assert palette.band(0.0, maximum) == 0


def test_every_band_has_its_own_background_in_colour() -> None:
    backgrounds = [palette.band_style(band).bgcolor for band in range(8)]
    assert backgrounds[0] is None
    assert len(set(backgrounds)) == 8


def test_without_colour_bands_are_attributes_alone() -> None:
    styles = [palette.band_style(band, colourless=True) for band in range(8)]
    assert all(style.color is None and style.bgcolor is None for style in styles)
    assert [bool(s.underline) for s in styles] == [False, False, False, True, True, False, False, False]
    assert [bool(s.reverse) for s in styles] == [False, False, False, False, False, True, True, True]
    assert styles[7].bold
    assert [palette.ruler(band, colourless=True) for band in range(8)] == list("01234567")
    assert "".join(palette.ruler(band) for band in range(8)) == " ▁▂▃▄▅▆▇"


@pytest.mark.parametrize(
    ("term", "colorterm", "no_color", "expected"),
    [("linux", "", False, True), ("xterm-256color", "truecolor", False, False), ("xterm-256color", "", True, True)],
)
def test_colour_is_given_up_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, term: str, colorterm: str, no_color: bool, expected: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLORTERM", colorterm)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    assert palette.is_colourless(App()) is expected


@given(st.floats(allow_nan=True), st.none() | st.floats(allow_nan=True), st.integers(0, 40))
def test_a_bar_always_fills_its_width(value: float, maximum: float | None, width: int) -> None:
    assert len(palette.bar(value, maximum, width)) == width


def test_a_bar_grows_with_its_value() -> None:
    assert palette.bar(0, 10, 4) == "    "
    assert palette.bar(5, 10, 4) == "▇▇  "
    assert palette.bar(6, 10, 4) == "▇▇▃ "
    assert palette.bar(20, 10, 4) == "▇▇▇▇"


@given(st.lists(st.floats(0, 1e6), max_size=200), st.integers(0, 50))
def test_a_sparkline_fits_and_keeps_the_peak(values: list[float], width: int) -> None:
    line = palette.sparkline(values, width)
    assert len(line) == min(len(values), width)
    if line and max(values) > 0:
        assert "▇" in line


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strip_is_exactly_as_wide_as_asked_and_obeys_nothing(text: str) -> None:
    for width in (0, 1, 5, 20):
        strip = palette.strip([(text, palette.PLAIN), ("x", palette.BOLD)], width)
        assert strip.cell_length == cell_len(strip.text) == width
        assert not CONTROL.search(strip.text)
        assert "\n" not in strip.text
    assert "[/]" not in text or "[/]" in palette.strip([(text, palette.PLAIN)], 40).text


@given(st.text(max_size=30), st.integers(0, 20))
def test_fit_gives_exactly_its_width(text: str, width: int) -> None:
    assert cell_len(palette.fit(text, width)) == width


@given(st.text(max_size=60), st.integers(2, 20))
def test_wrapped_lines_fit_and_keep_every_word(text: str, width: int) -> None:
    lines = palette.wrapped(text, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(palette.drawable(text).split())


@pytest.mark.parametrize("text", ["", "[/]", "[@click=app.quit]x[/]", "a\nb", "\x1b[31m"])
def test_a_border_title_is_never_markup(text: str) -> None:
    widget = Widget()
    widget.border_title = palette.title(text)
    title = widget._border_title
    assert title is not None
    assert title.plain == palette.line(text)
    assert not title.spans


def test_numbers_read_like_the_drawings() -> None:
    assert [palette.percent(p) for p in (None, 0.0002, 0.0123, 0.2)] == ["-", ".02%", "1.2%", "20%"]
    assert [palette.share(p) for p in (0.62, -0.19, 1.0, None)] == [".62", "-.19", "1.00", "-"]
    assert [palette.number(v) for v in (12.43, 0.314, 0.0, 1200.4, None)] == ["12.4", "0.31", "0.0", "1200", "-"]


def test_groups_are_packed_by_their_cells() -> None:
    assert palette.packed(["one", "two", "three"], 9) == ["one   two", "three"]
    assert palette.packed(["越越", "two"], 9) == ["越越", "two"]
