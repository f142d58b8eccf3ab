"""Hostile text, and what a report claims."""

import pytest

from steer.events import EditReport, Report, clean, clean_line


@pytest.mark.parametrize("code", [0, 7, 8, 0xB, 0xD, 0x1B, 0x7F, 0x80, 0x9B, 0x200E, 0x2028, 0x202E, 0x2066, 0xFEFF])
def test_what_a_terminal_obeys_is_replaced(code: int) -> None:
    assert clean(f"a{chr(code)}b") == "a\ufffdb"


def test_text_stays_as_it_is() -> None:
    text = "tab\tand\nnewline, [/] [@click=app.quit]x[/] \u00e9 \u4e2d \U0001f600"
    assert clean(text) == text


def test_a_reply_is_steered_when_an_edit_acted_somewhere() -> None:
    assert not Report(5, 5).steered
    assert not Report(5, 5, (EditReport("1 +1", 0, None, None),)).steered
    assert Report(5, 5, (EditReport("1 +1", 3, 0.0, 1.0),)).steered


def test_a_label_with_a_newline_stays_on_its_line() -> None:
    assert clean_line("a\n  7  max 9\x1b[2J\tb") == "a 7 max 9\ufffd[2J b"
