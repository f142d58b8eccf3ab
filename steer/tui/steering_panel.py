"""The Steering pane: each edit with its slider, its strength in every unit, and what it did in the last reply.

Every key makes a whole new `SteeringSet`, shows it at once and posts it; the panel never changes one in place.
Strengths step in the unit that is shown (`steer/tui/slider.py`). While the guard weakens a reply the rows show what
acts now: the factor beside the kind, the bar and the figures of what is added as they are by now. `O` stays where the
strength is set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.events import Blur, Focus, Resize
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from steer.edits import FORMULAS, LOUD, Edit, Kind, SteeringSet
from steer.errors import SteerError
from steer.events import EditReport, Report
from steer.session import Readout
from steer.tui import palette
from steer.tui.palette import BOLD, DIM, PLAIN, Part
from steer.tui.slider import FILLS, SCALES, Strengths, slider

EMPTY = "No feature is steered: press f to find one, Enter on a feature in Token, or type /steer LATENT +0.5x."
ROUND = ("all", "generated", "prompt", "assistant", "last")
"""The places that the key goes round; the others are typed."""
ADDED: tuple[Kind, ...] = ("add", "bias", "vector")
"""The kinds whose strength is what they add, so that a weakened one is a smaller strength."""
HINTS = (
    *("left/right step", "Shift bigger", "= exact, or the whole edit", "- flip", "0 zero", "a add", "c clamp"),
    *("x ablate", "% scale", "> floor", "< cap", "p bias", "X project", "w where", "Space mute", "Del remove"),
    *("Enter card", "R send again"),
)


class SteeringPanel(Widget, can_focus=True):
    """Up and down choose an edit, left and right change it."""

    DEFAULT_CSS = """
    SteeringPanel { height: 1fr; }
    SteeringPanel .steering-panel--chosen { text-style: bold; color: $text-accent; }
    SteeringPanel .steering-panel--warning { color: $text-warning; }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {"steering-panel--chosen", "steering-panel--warning"}
    HELP = (
        "add puts v times the feature's direction into the residual stream after the features are read, whatever the "
        "feature does itself: it always acts. bias adds v to the feature before the activation, where a feature must "
        "pass a threshold or win one of k places: a small one may change nothing, a large one may push another out; "
        "the report says at how many tokens the feature stayed off. clamp sets the feature to v (c again: only where "
        "it is on), floor and cap bound it, scale multiplies it, ablate takes it out, project takes out whatever lies "
        "along its direction. = takes a strength or a whole edit, as `clamp 828 0 when 902 > 2 on generated ramp 10`. "
        "On a slider O is the strength and \u250a half the residual norm; an arrow at its end says that the strength "
        "is off the scale. `add x 0.56` says that the guard has weakened the edit to 0.56 of itself."
    )
    KEYS: ClassVar[tuple[tuple[str, str], ...]] = (
        ("\u2190\u2192", "step"),
        ("=", "exact"),
        ("a c x p", "kind"),
        ("Space", "mute"),
        ("Del", "remove"),
        ("R", "again"),
    )
    """What the footer shows while the pane has the focus."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "choose(-1)", "Previous edit"),
        Binding("down,j", "choose(1)", "Next edit"),
        Binding("shift+up,K", "move(-1)", "Move the edit up"),
        Binding("shift+down,J", "move(1)", "Move the edit down"),
        Binding("left,h", "step(-1)", "Weaker, one step (0.05 x max)"),
        Binding("right,l", "step(1)", "Stronger, one step (0.05 x max)"),
        Binding("shift+left,H", "step(-5)", "Weaker, five steps"),
        Binding("shift+right,L", "step(5)", "Stronger, five steps"),
        Binding("equals_sign", "exact", "Type an exact strength, or the whole edit"),
        Binding("minus", "flip", "Flip the sign"),
        Binding("0", "zero", "Zero"),
        Binding("a", "kind('add')", "Add"),
        Binding("c", "kind('clamp')", "Clamp; again: only where it is on"),
        Binding("x", "kind('ablate')", "Ablate"),
        Binding("percent_sign", "kind('scale')", "Scale"),
        Binding("greater_than_sign", "kind('floor')", "Floor: at least"),
        Binding("less_than_sign", "kind('cap')", "Cap: at most"),
        Binding("p", "kind('bias')", "Bias, before the activation"),
        Binding("X", "kind('project')", "Project out"),
        Binding("space", "mute", "Mute"),
        Binding("delete,backspace", "remove", "Remove"),
        Binding("w", "place", "Which tokens: all, generated, prompt, assistant, last"),
        Binding("W", "special_tokens", "First and special tokens too"),
        Binding("enter", "open", "Open the feature's card"),
        Binding("R", "resend", "Send the last message again"),
    ]

    @dataclass
    class Changed(Message):
        """A key made this set."""

        steering: SteeringSet

    @dataclass
    class Exact(Message):
        """A strength, or the whole edit, is to be typed for the edit at this place."""

        place: int

    @dataclass
    class Open(Message):
        latent: int

    class Resend(Message):
        """The last message is to be sent again."""

    class Missed(Message):
        """A key that changes an edit was pressed, and there is none."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.steering = SteeringSet()
        self.selected = 0
        """Place of the chosen edit."""
        self._labels: Mapping[int, str] = {}
        self.strengths = Strengths(lambda _: None)
        self._factor, self._writing = 1.0, False
        self._report: Report | None = None
        self._strips: list[Strip] = []
        self.border_title = palette.title("Steering")

    def show(
        self,
        steering: SteeringSet,
        *,
        labels: Mapping[int, str],
        readouts: Callable[[Edit], Readout | None],
        report: Report | None,
        factor: float = 1.0,
        writing: bool = False,
    ) -> None:
        """Draws a set with the last reply's report. `factor` is what the guard multiplies that reply's edits by: now,
        where it is being written, else at its end."""
        grown = len(steering.edits) == len(self.steering.edits) + 1
        self.steering, self._labels, self.strengths, self._report = steering, labels, Strengths(readouts), report
        self._factor, self._writing = factor, writing
        last = len(steering.edits) - 1
        self.selected = last if grown else max(0, min(self.selected, last))
        self._draw()

    def select(self, place: int) -> None:
        """Chooses the edit at `place`."""
        self.selected = max(0, min(place, len(self.steering.edits) - 1))
        self._draw()

    @property
    def edit(self) -> Edit | None:
        """The chosen edit."""
        return self.steering.edits[self.selected] if self.selected < len(self.steering.edits) else None

    @property
    def _acting(self) -> float:
        """What edits are multiplied by now."""
        return self._factor if self._writing else 1.0

    def stepped(self, steering: SteeringSet, steps: int) -> SteeringSet | None:
        """`steering` with the edit at the chosen place that many steps stronger; None where that has no strength."""
        edit, strengths = steering.edits[self.selected], self.strengths
        if (value := strengths.value(edit)) is None:
            return None
        step = 0.05 if edit.kind == "scale" else SCALES[strengths.unit(edit)].step
        return steering.put(self.selected, strengths.typed(edit, value + steps * step))

    # Keys

    def _asked(self) -> Edit | None:
        """The edit that a key is to change; that there is none is told."""
        if self.edit is None:
            self.post_message(self.Missed())
        return self.edit

    def _change(self, steering: SteeringSet) -> None:
        self.steering = steering
        self.selected = max(0, min(self.selected, len(steering.edits) - 1))
        self._draw()
        self.post_message(self.Changed(steering))

    def _put(self, edit: Edit) -> None:
        self._change(self.steering.put(self.selected, edit))

    def action_choose(self, step: int) -> None:
        if self._asked() is not None:
            self.select(self.selected + step)

    def action_move(self, step: int) -> None:
        to = self.selected + step
        if self._asked() is not None and 0 <= to < len(self.steering.edits):
            steering = self.steering.move(self.selected, to)
            self.selected = to
            self._change(steering)

    def action_step(self, steps: int) -> None:
        if self._asked() is not None and (steering := self.stepped(self.steering, steps)) is not None:
            self._change(steering)

    def action_flip(self) -> None:
        edit = self._asked()
        if edit is not None and edit.strength is not None:
            self._put(replace(edit, strength=replace(edit.strength, number=0.0 - edit.strength.number)))

    def action_zero(self) -> None:
        edit = self._asked()
        if edit is not None and edit.strength is not None:
            self._put(self.strengths.typed(edit, 0.0))

    def action_kind(self, kind: Kind) -> None:
        edit = self._asked()
        if edit is None or edit.kind == "vector":
            return
        if kind == edit.kind == "clamp":
            self._put(replace(edit, if_on=not edit.if_on))
        elif kind != edit.kind:
            self._put(self.strengths.become(edit, kind))

    def action_mute(self) -> None:
        if (edit := self._asked()) is not None:
            self._put(replace(edit, muted=not edit.muted))

    def action_remove(self) -> None:
        if self._asked() is not None:
            self._change(self.steering.remove(self.selected))

    def action_place(self) -> None:
        if (edit := self._asked()) is not None:
            at = ROUND.index(edit.place) if edit.place in ROUND else -1
            self._put(replace(edit, place=ROUND[(at + 1) % len(ROUND)]))

    def action_special_tokens(self) -> None:
        self._change(replace(self.steering, special_tokens=not self.steering.special_tokens))

    def action_exact(self) -> None:
        if self._asked() is not None:
            self.post_message(self.Exact(self.selected))

    def action_open(self) -> None:
        if (edit := self._asked()) is not None and edit.latent is not None:
            self.post_message(self.Open(edit.latent))

    def action_resend(self) -> None:
        self.post_message(self.Resend())

    # Drawing

    def notify_style_update(self) -> None:
        super().notify_style_update()
        if self.is_mounted:
            self._draw()

    def render_line(self, y: int) -> Strip:
        if y < len(self._strips):
            return self._strips[y]
        return palette.strip((), self.size.width, self.rich_style)

    @on(Resize)
    @on(Focus)
    @on(Blur)
    def _draw(self) -> None:
        live, edits = len([e for e in self.steering.edits if not e.muted]), len(self.steering.edits)
        state = (
            "bypassed" if self.steering.bypass else f"{live} on" + (f", {edits - live} muted" if edits > live else "")
        )
        self.border_subtitle = palette.title(state if edits else "")
        width, height = self.size.width, self.size.height
        self._strips = [palette.strip(row, width, self.rich_style) for row in self._rows(width, height)[:height]]
        self.refresh()

    def _rows(self, width: int, height: int) -> list[list[Part]]:
        if not self.steering.edits:
            return [[(text, DIM)] for text in palette.wrapped(EMPTY, width)]
        wide = width >= 60
        blocks = [self._block(place, edit, width, wide) for place, edit in enumerate(self.steering.edits)]
        foot = self._foot(width) if height >= 6 else []
        hints = palette.packed(HINTS, width)
        used = sum(map(len, blocks)) + len(foot) + 1
        if wide and used + len(blocks) + len(hints) + 1 <= height:
            blocks = [[*block, []] for block in blocks]
        space = max(height - len(foot), 1)
        # The chosen edit is always seen from its first row, with as much around it as there is room for.
        start = sum(map(len, blocks[: self.selected]))
        end = start + len(blocks[self.selected])
        rows = [row for block in blocks for row in block]
        top = min(start, max(0, end - space), max(0, len(rows) - 1))
        rows = rows[top : top + space]
        rows += [[] for _ in range(min(space - len(rows), 1))]
        rows += foot
        if len(rows) + 1 + len(hints) <= height:
            rows += [[], *([(hint, DIM)] for hint in hints)]
        return rows

    def _block(self, place: int, edit: Edit, width: int, wide: bool) -> list[list[Part]]:
        chosen = place == self.selected
        style = self.get_component_rich_style("steering-panel--chosen", partial=True) if chosen else PLAIN
        if chosen and self.has_focus:
            style += palette.REVERSE
        muted = DIM if edit.muted or self.steering.bypass else PLAIN
        tag = palette.TAGS[place] if place < len(palette.TAGS) else " "
        kind = edit.kind + (" if on" if edit.if_on else "")
        kind += {"all": "", "generated": " gen"}.get(edit.place, f" {edit.place}") + (" MUTE" if edit.muted else "")
        kind += f" x {self._acting:.2g}" if self._acting < 1 and edit in self.steering.live else ""
        if edit.latent is None:
            name, label = "file", edit.file.rpartition("/")[2]
        else:
            name, label = str(edit.latent), f"at {edit.hook}" if edit.hook else self._labels.get(edit.latent, "")
        label = palette.fit(label or "(no label)", max(width - 11 - len(kind), 0))
        head: list[Part] = [
            ("> " if chosen else "  ", style),
            (tag, palette.tag_style(tag, palette.is_colourless(self.app))),
            (f" {name:>5} {label} ", style + muted),
            (kind, BOLD + muted),
        ]
        rows = [head]
        value = self.strengths.value(edit)
        if value is not None and edit.kind != "scale":
            rows.append([(self._slider(edit, value, width), muted)])
        timing = "  ".join(each for each in edit.clauses if each.split()[0] in ("when", "for", "ramp", "decay"))
        rows += [[("     " + palette.fit(timing, width - 5), muted)]] if timing else []
        fired = self._fired(edit)
        facts = self._facts(edit, value)
        if fired and wide:
            facts, fired = f"{facts}    {fired}", ""
        rows.append([(facts, muted)])
        if fired:
            rows.append([(f"     {fired}", DIM)])
        return rows

    def _slider(self, edit: Edit, value: float, width: int) -> str:
        unit, rates = self.strengths.unit(edit), self.strengths.rates(edit)
        here = {"max": rates.of_max, "norm": rates.of_norm, "raw": 1.0}[unit]
        half = abs(50 / rates.of_norm * here) if rates.of_norm and here else None
        fill, acts = FILLS.get(edit.kind, ""), value * self._weakened(edit)
        return slider(value, SCALES[unit], width, fill=fill, half=half, acts=acts)

    def _weakened(self, edit: Edit) -> float:
        """What the strength itself of an edit is multiplied by now."""
        return self._acting if edit.kind in ADDED else 1.0

    def _facts(self, edit: Edit, value: float | None) -> str:
        if value is None:
            return "     contributes nothing" if edit.kind == "ablate" else "     nothing is left along it"
        if edit.kind == "scale":
            return f"     x {value:g} its own activation"
        unit, readout, weakened = self.strengths.unit(edit), self.strengths.readout(edit), self._weakened(edit)
        lead, value = " pre " if edit.kind == "bias" else "     ", value * weakened
        shown = {"max": f"{value:+.2f} x max", "norm": f"{value:+.0f}% of |x|", "raw": f"{value:+.2f} raw"}[unit]
        text = lead + (shown if value else "0")
        if readout is not None and value:
            text += f"   a {palette.number(readout.raw * weakened)}" if unit != "raw" else ""
            share = None if readout.of_norm is None or unit == "norm" else abs(readout.of_norm * weakened)
            text += "" if share is None else f"   {share:.0f}% of |x|"
        return text

    def _fired(self, edit: Edit) -> str:
        """What the edit did in the last reply, from the engine's report alone."""
        found = self._reported(edit)
        if found is None:
            return ""
        if not found.positions:
            return "acted nowhere in the last reply"
        if edit.kind == "ablate" and found.before is not None:
            return f"was {palette.number(found.before)} mean last reply"
        if found.lost:
            return f"fired {palette.number(found.after)} mean, off {found.lost} of {found.positions}"
        return f"fired {palette.number(found.after)} mean last reply"

    def _reported(self, edit: Edit) -> EditReport | None:
        reports = self._report.edits if self._report is not None else ()
        for report in reports:
            if report.text == str(edit):
                return report
        for report in reports:
            try:
                told = Edit.parse(report.text)
            except SteerError:
                continue
            if (told.latent, told.kind, told.file) == (edit.latent, edit.kind, edit.file):
                return report
        return None

    def total(self) -> float | None:
        """Percent of the residual norm of all live edits together, as if they pointed the same way; None if unknown."""
        readouts = map(self.strengths.readout, self.steering.live)
        sizes = [abs(readout.of_norm) for readout in readouts if readout is not None and readout.of_norm is not None]
        return sum(sizes) * self._acting if sizes else None

    def _foot(self, width: int) -> list[list[Part]]:
        edit = self.edit
        assert edit is not None
        wide = width >= 60
        skip = edit.place == "all+special" or self.steering.special_tokens
        tokens = (
            "prompt and generated" if edit.place.startswith("all") and wide else edit.place.removesuffix("+special")
        )
        if wide:
            words = "special ones too" if skip else "not the first, not special ones"
        else:
            words = "special too" if skip else "none special"
        rows: list[list[Part]] = [[("where  ", DIM), (f"{tokens} tokens, {words}", PLAIN)]]
        if wide:
            rows[0].append(("    (w, W)", DIM))
            rows.append([("adds   ", DIM), (FORMULAS[edit.kind], PLAIN)])
        total = self.total()
        if total is not None:
            row: list[Part] = [("total  ", DIM), (f"{total:.0f}% of |x|", PLAIN)]
            if total > LOUD:
                words = f"   over {LOUD}% text tends to fall apart" if wide else ", may fall apart"
                row.append((words, self.get_component_rich_style("steering-panel--warning", partial=True)))
            rows.append(row)
        if self._factor < 1 and not self._writing:
            rows.append([("guard  ", DIM), (f"x {self._factor:.2g} when the last reply ended", PLAIN)])
        return rows
