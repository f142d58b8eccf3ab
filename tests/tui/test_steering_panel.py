"""The Steering pane: every key makes a new set, strengths keep their meaning, rows say what the engine reported."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from textual import on
from textual.app import App, ComposeResult

from steer.edits import Edit, Kind, SteeringSet, Strength
from steer.errors import SteerError
from steer.events import CONTROL, EditReport, Report
from steer.session import Readout
from steer.tui.steering_panel import EMPTY, SteeringPanel

LABELS = {1: "Golden Gate, bridges", 2: "[@click=app.quit]x[/]", 3: "\x1b]0;x\x07 中文 👩‍👩‍👧"}
MAX = {1: 12.0, 2: 10.0, 3: 8.0}
NORM = 40.0


def readout(edit: Edit) -> Readout | None:
    """As the engine does: latent 9 has no recorded max, 99 does not exist."""
    if edit.latent == 99:
        raise SteerError("no latent 99")
    if edit.strength is None or edit.kind == "scale":
        return None
    maximum = MAX.get(edit.latent)
    if edit.strength.unit == "max" and maximum is None:
        raise SteerError("no recorded max")
    raw = edit.strength.number * {"raw": 1.0, "max": maximum or 0.0, "norm": NORM / 100}[edit.strength.unit]
    return Readout(raw, raw / maximum if maximum else None, 100 * raw / NORM)


def steering(*edits: str) -> SteeringSet:
    return SteeringSet(tuple(map(Edit.parse, edits)))


class Host(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.sets: list[SteeringSet] = []
        self.got: list[tuple[str, int | None]] = []

    def compose(self) -> ComposeResult:
        yield SteeringPanel()

    def on_mount(self) -> None:
        self.panel.focus()

    @property
    def panel(self) -> SteeringPanel:
        return self.query_one(SteeringPanel)

    @on(SteeringPanel.Changed)
    def changed(self, message: SteeringPanel.Changed) -> None:
        self.sets.append(message.steering)

    @on(SteeringPanel.Exact)
    def exact(self, message: SteeringPanel.Exact) -> None:
        self.got.append(("exact", message.place))

    @on(SteeringPanel.Open)
    def open(self, message: SteeringPanel.Open) -> None:
        self.got.append(("open", message.latent))

    @on(SteeringPanel.Missed)
    def missed(self) -> None:
        self.got.append(("missed", None))

    @on(SteeringPanel.Resend)
    def resend(self) -> None:
        self.got.append(("resend", None))

    def show(self, value: SteeringSet, report: Report | None = None) -> None:
        self.panel.show(value, labels=LABELS, readouts=readout, report=report)

    def rows(self) -> list[str]:
        return [self.panel.render_line(y).text.rstrip() for y in range(self.panel.size.height)]


KEYS = [
    ("1 +1x", "right", "1 +1.05x"),
    ("1 +1x", "left", "1 +0.95x"),
    ("1 +1x", "shift+right", "1 +1.25x"),
    ("1 +1x", "shift+left", "1 +0.75x"),
    ("1 13.6", "right", "1 +1.18x"),
    ("1 30%", "right", "1 +1.05x"),
    ("9 20%", "right", "9 +21%"),
    ("9 20%", "shift+left", "9 +15%"),
    ("9 8", "right", "9 +21%"),
    ("99 8", "right", "99 +8.5"),
    ("scale 1 2", "right", "scale 1 2.05"),
    ("1 +1x", "minus", "1 -1x"),
    ("clamp 1 13.6", "minus", "clamp 1 -13.6"),
    ("1 -1x", "0", "1 +0x"),
    ("1 +0x", "minus", "1 +0x"),
    ("1 13.6", "c", "clamp 1 13.6"),
    ("clamp 1 2x", "c", "clamp 1 2x if on"),
    ("clamp 1 2x if on", "c", "clamp 1 2x"),
    ("clamp 1 2x if on on prompt", "a", "1 +2x on prompt"),
    ("1 13.6", "p", "bias 1 13.6"),
    ("1 13.6", "x", "ablate 1"),
    ("1 13.6", "percent_sign", "scale 1 2"),
    ("ablate 1", "a", "1 +1x"),
    ("ablate 9", "a", "9 +20%"),
    ("ablate 99", "p", "bias 99 5"),
    ("scale 1 0.5", "c", "clamp 1 1x"),
    ("1 +1x", "w", "1 +1x on generated"),
    ("1 +1x on generated", "w", "1 +1x on prompt"),
    ("1 +1x on prompt", "w", "1 +1x on assistant"),
    ("1 +1x on assistant", "w", "1 +1x on last"),
    ("1 +1x on last", "w", "1 +1x"),
    ("1 +1x on 3..5", "w", "1 +1x"),
]
"""An edit, a key, and the edit it makes."""


async def test_a_key_makes_a_new_edit() -> None:
    app = Host()
    async with app.run_test(size=(43, 20)) as pilot:
        for before, key, after in KEYS:
            app.show(steering(before))
            app.sets.clear()
            await pilot.press(key)
            assert app.sets == [steering(after)], (before, key)


@pytest.mark.parametrize(
    ("edit", "key"), [("ablate 1", "right"), ("ablate 1", "minus"), ("ablate 1", "0"), ("1 2", "a")]
)
async def test_a_key_that_means_nothing_here_changes_nothing(edit: str, key: str) -> None:
    app = Host()
    async with app.run_test(size=(43, 20)) as pilot:
        app.show(steering(edit))
        await pilot.press(key)
        assert app.sets == []


async def test_muting_removing_and_moving_keep_the_cursor_sensible() -> None:
    app = Host()
    async with app.run_test(size=(43, 30)) as pilot:
        app.show(steering("1 +1x", "2 +1x", "ablate 3"))
        await pilot.press("down", "space")
        assert [edit.muted for edit in app.sets[-1].edits] == [False, True, False]
        await pilot.press("space", "shift+down")
        assert [edit.latent for edit in app.sets[-1].edits] == [1, 3, 2]
        assert app.panel.edit is not None and app.panel.edit.latent == 2
        await pilot.press("shift+down")
        assert len(app.sets) == 3, "the last edit cannot move further down"
        await pilot.press("delete")
        assert [edit.latent for edit in app.sets[-1].edits] == [1, 3]
        assert app.panel.edit.latent == 3
        await pilot.press("W")
        assert app.sets[-1].special_tokens
        await pilot.press("delete", "delete")
        assert app.sets[-1].edits == () and app.got == []
        told = len(app.sets)
        keys = ["right", "a", "minus", "0", "w", "space", "enter", "equals_sign", "shift+up", "down", "delete"]
        for key in keys:
            await pilot.press(key)
        assert app.got == [("missed", None)] * len(keys) and len(app.sets) == told


async def test_keys_pressed_before_the_set_comes_back_add_up() -> None:
    app = Host()
    async with app.run_test(size=(43, 20)) as pilot:
        app.show(steering("1 +1x"))
        for _ in range(4):
            app.panel.action_step(1)
        await pilot.pause()
        assert [edit.strength for value in app.sets for edit in value.edits] == [
            Strength(number, "max") for number in (1.05, 1.1, 1.15, 1.2)
        ]


async def test_enter_equals_and_r_ask_the_app() -> None:
    app = Host()
    async with app.run_test(size=(43, 20)) as pilot:
        app.show(steering("1 +1x", "2 +1x", "ablate 3"))
        await pilot.press("down", "enter", "equals_sign", "R", "down", "equals_sign")
        assert app.got == [("open", 2), ("exact", 1), ("resend", None), ("exact", 2)]


async def test_a_newly_added_edit_is_chosen() -> None:
    app = Host()
    async with app.run_test(size=(43, 20)):
        app.show(steering("1 +1x", "2 +1x"))
        assert app.panel.selected == 0
        app.show(steering("1 +1x", "2 +1x", "ablate 3"))
        assert app.panel.selected == 2


def rows_of(app: Host, value: SteeringSet, report: Report | None = None) -> list[str]:
    app.show(value, report)
    return app.rows()


async def test_rows_draw_each_kind_its_own_way() -> None:
    app = Host()
    async with app.run_test(size=(39, 30)) as pilot:
        await pilot.pause()
        add = rows_of(app, steering("1 +1x"))
        assert add[0] == "> a     1 Golden Gate, bridges" + " " * 6 + "add"
        assert "======O" in add[1] and add[1].startswith("  -2 ") and add[1].endswith(" +2")
        assert add[1].count("┊") == 2, "half the residual norm, on both sides"
        assert add[2] == "     +1.00 x max   a 12.0   30% of |x|"
        clamp = rows_of(app, steering("clamp 1 -1x if on on generated"))
        assert "O" in clamp[1] and "=" not in clamp[1]
        assert clamp[0].endswith("clamp if on gen")
        bias = rows_of(app, steering("bias 1 1x"))
        assert "~~~O" in bias[1] and bias[2].startswith(" pre +1.00 x max")
        ablate = rows_of(app, steering("ablate 1"))
        assert ablate[1] == "     contributes nothing"
        scale = rows_of(app, steering("scale 1 0.5"))
        assert scale[1] == "     x 0.5 its own activation"
        outside = rows_of(app, steering("1 3x"))
        assert outside[1].endswith("=O\u2192+2") and rows_of(app, steering("1 -3x"))[1].startswith("  -2\u2190O=")
        unknown = rows_of(app, steering("9 20%"))
        assert "-100% " in unknown[1] and unknown[2] == "     +20% of |x|   a 8.0"
        absent = rows_of(app, steering("99 8"))
        assert absent[2] == "     +8.00 raw"
        zero = rows_of(app, steering("1 0"))
        assert zero[2] == "     0"


@pytest.mark.parametrize("width", [39, 78])
async def test_no_line_is_cut_at_the_widths_of_the_side_pane_and_the_sheet(width: int) -> None:
    edits = ("1 -1.15x", "bias 1 -250%", "clamp 3 -1.15x if on on prompt", "scale 2 2", "ablate 2")
    report = Report(41, 41, tuple(EditReport(edit, 128, 10.0, 10.0, lost=100) for edit in edits))
    app = Host()
    async with app.run_test(size=(width, 60)) as pilot:
        app.show(steering(*edits), report)
        await pilot.pause()
        rows = app.rows()
        assert any(row.startswith("total  ") and row.endswith("fall apart") for row in rows)
        assert sum(row.endswith("off 100 of 128") for row in rows) == 4
        assert any("where  " in row for row in rows)
        assert rows[-1] == "" or "R send again" in "".join(rows)


async def test_rows_say_what_the_last_reply_reported() -> None:
    report = Report(
        41,
        41,
        (
            EditReport("1 +1x", 40, 2.0, 9.8),
            EditReport("ablate 2", 40, 2.3, 0.0),
            EditReport("bias 3 5", 40, 0.5, 1.5, lost=7),
            EditReport("clamp 9 1", 0, None, None),
        ),
    )
    app = Host()
    async with app.run_test(size=(39, 40)) as pilot:
        app.show(steering("1 +1.5x", "ablate 2", "bias 3 5", "clamp 9 1"), report)
        await pilot.pause()
        told = [row.strip() for row in app.rows()]
        assert "fired 9.8 mean last reply" in told, "also once the strength has changed"
        assert "was 2.3 mean last reply" in told
        assert "fired 1.5 mean, off 7 of 40" in told
        assert "acted nowhere in the last reply" in told
        app.show(steering("1 +1x"), None)
        assert not any("reply" in row for row in app.rows())


async def test_the_total_counts_live_edits_and_warns_in_words() -> None:
    app = Host()
    async with app.run_test(size=(78, 24)) as pilot:
        await pilot.pause()
        rows = rows_of(app, steering("1 30%", "2 -40%"))
        assert "total  70% of |x|   over 60% text tends to fall apart" in rows
        await pilot.press("space")
        assert "total  40% of |x|" in app.rows()


async def test_what_the_guard_weakens_is_shown_as_it_acts() -> None:
    app = Host()
    async with app.run_test(size=(39, 24)) as pilot:
        await pilot.pause()

        def rows(factor: float, writing: bool) -> list[str]:
            edits = steering("1 +1x", "clamp 2 1x")
            app.panel.show(edits, labels=LABELS, readouts=readout, report=None, factor=factor, writing=writing)
            return app.rows()

        full, weak, after = rows(1.0, True), rows(0.25, True), rows(0.25, False)
        assert weak[0].endswith("add x 0.25") and weak[2] == "     +0.25 x max   a 3.0   8% of |x|"
        assert (full[1].count("="), weak[1].count("=")) == (6, 2) and weak[1].index("O") == full[1].index("O")
        assert weak[3].endswith("clamp x 0.25") and weak[5] == full[5], "a clamp still goes to its value"
        assert "total  55% of |x|" in full and "total  14% of |x|" in weak
        assert after[:6] == full[:6] and "guard  x 0.25 when the last reply ended" in after


@pytest.mark.parametrize(("height", "spaced"), [(14, False), (18, True)])
async def test_hints_stay_where_rows_between_edits_would_push_them_out(height: int, spaced: bool) -> None:
    app = Host()
    async with app.run_test(size=(78, height)) as pilot:
        await pilot.pause()
        rows = rows_of(app, steering("1 +1x", "2 -1x"))
        assert any(row.endswith("R send again") for row in rows) and (rows[3] == "") == spaced


async def test_an_empty_set_says_how_to_add_a_feature() -> None:
    app = Host()
    async with app.run_test(size=(43, 20)) as pilot:
        await pilot.pause()
        assert " ".join(" ".join(app.rows()).split()) == EMPTY


async def test_the_border_counts_what_is_on() -> None:
    app = Host()
    async with app.run_test(size=(43, 20)) as pilot:
        app.show(steering("1 +1x", "2 +1x"))
        await pilot.press("space")
        assert app.panel._border_subtitle is not None and app.panel._border_subtitle.plain == "1 on, 1 muted"
        assert app.rows()[0].endswith("add MUTE")


@pytest.mark.parametrize("size", [(120, 36), (78, 20), (43, 7), (43, 3), (20, 5), (2, 1)])
async def test_every_size_shows_the_chosen_edit(size: tuple[int, int]) -> None:
    kinds: list[Kind] = ["add", "clamp", "bias"]
    edits = tuple(Edit(latent, kind, Strength(1.0)) for latent in (1, 2, 3, 9, 99) for kind in kinds)
    app = Host()
    async with app.run_test(size=size) as pilot:
        app.show(SteeringSet(edits))
        for _ in edits:
            assert sum(row.startswith(">") for row in app.rows()) == 1
            for y in range(size[1]):
                strip = app.panel.render_line(y)
                assert strip.cell_length == cell_len(strip.text) == app.panel.size.width
                assert not CONTROL.search(strip.text)
            await pilot.press("down")


def test_the_help_tells_add_from_bias() -> None:
    assert "after the features are read" in SteeringPanel.HELP
    assert "before the activation" in SteeringPanel.HELP
    assert all(binding.description for binding in SteeringPanel.BINDINGS if not isinstance(binding, tuple))
