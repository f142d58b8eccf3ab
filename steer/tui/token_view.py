"""The transcript, token by token: a list of sections, each with a header line and a body of wrapped tokens.

The token is the unit of paint, cursor and inspection. Appending rewraps the last line only; painting another feature
changes a version number and rewraps nothing; each line keeps its strip until the line, the paint or the cursor on it
changes. Text goes through `palette.strip`, so nothing in it is obeyed or parsed.

A section without a title has no header line, and there an assistant's text carries a rule at its left: that is how
completion mode tells what a person wrote from what the model wrote.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.style import Style
from textual import on
from textual.binding import Binding, BindingType
from textual.events import Blur, Click, Focus, Resize
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from steer.events import TokenEvent
from steer.tui import palette
from steer.tui.palette import Part
from steer.tui.wrap import TAB, Line, Piece, Role, Section

INDENT = 2
SLACK = 2
"""Rows from the bottom within which a growing text is followed."""


class TokenView(ScrollView, can_focus=True):
    """See the module's docstring. `Moved` and `Pinned` carry the place of a token in its section's events."""

    DEFAULT_CSS = """
    TokenView { overflow-x: hidden; overflow-y: scroll; scrollbar-size-vertical: 1; }
    TokenView .token-view--name { text-style: bold; color: $text-primary; }
    TokenView .token-view--title { color: $text-muted; }
    TokenView .token-view--notice { color: $text-warning; text-style: italic; }
    TokenView .token-view--rule { color: $primary; }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {f"token-view--{part}" for part in ("name", "title", "notice", "rule")}
    HELP = "Each token is painted by the feature you chose; Enter pins a token, and its features appear under Token."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "line(-1)", "Previous line"),
        Binding("down,j", "line(1)", "Next line"),
        Binding("left,h", "token(-1)", "Previous token"),
        Binding("right,l", "token(1)", "Next token"),
        Binding("n", "firing(1)", "Next token where it fires"),
        Binding("N", "firing(-1)", "Previous token where it fires"),
        Binding("g,home", "edge(-1)", "First token"),
        Binding("G,end", "edge(1)", "Last token, and follow"),
        Binding("left_curly_bracket", "section(-1)", "Previous message"),
        Binding("right_curly_bracket", "section(1)", "Next message"),
        Binding("enter", "pin", "Pin in Token"),
        Binding("z", "rescale", "Scale to this reply"),
        Binding("underscore", "ruler", "Ruler of bands"),
    ]

    @dataclass
    class Moved(Message):
        """The cursor came to a token: place in the section's events, the event, how many there are."""

        key: str
        index: int
        event: TokenEvent
        total: int

    @dataclass
    class Pinned(Message):
        key: str
        index: int
        event: TokenEvent

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.sections: list[Section] = []
        self.cursor: tuple[str, int] | None = None
        """Section key and place in its events."""
        self.follow = True
        """Whether the cursor tracks the last token while a reply grows."""
        self.rescale = False
        """Whether the top band is this reply's largest activation rather than the recorded one."""
        self.ruler = False
        self._latent: int | None = None
        self._strongest = False
        self._maxima: Callable[[int], float | None] = lambda _: None
        self._version = 0
        self._starts: list[int] = [0]
        self._goal: int | None = None

    # The transcript

    def start(self, key: str, title: str, *, role: Role) -> None:
        """Opens a section at the end."""
        assert self._find(key) is None, f"section {key} is there already"
        near = self._is_near_end
        self.sections.append(Section(key, title, role, self._text_width))
        self._measure(near)

    def title(self, key: str, text: str) -> None:
        """Changes a section's header."""
        section, near = self._section(key), self._is_near_end
        had, section.title = bool(section.title), text
        if had != bool(text):
            self._measure(near)
        self.refresh_line(self._starts[self.sections.index(section)])

    def text(self, key: str, text: str) -> None:
        """Sets a section's plain text: its body, or what follows its tokens once it has some."""
        section, near = self._section(key), self._is_near_end
        if section.events:
            section.tail = text
        else:
            section.body = text
        section.wrap(self._text_width)
        self._measure(near)

    def extend(self, key: str, events: Sequence[TokenEvent]) -> None:
        """Appends tokens to a section; scrolls only if the bottom was in sight."""
        if not events:
            return
        section, near, first = self._section(key), self._is_near_end, 0
        for event in events:
            section.events.append(event)
            section.peak = max(section.peak, self._painted(event)[1])
        if section.tail:
            section.wrap(self._text_width)
        else:
            start = len(section.events) - len(events)
            first = min(section.add(place, event) for place, event in enumerate(events, start))
        self._measure(near, from_row=self._row(section, first))
        last = section.last
        if self.follow and near and section is self.sections[-1] and last is not None:
            self._set_cursor(section, last)

    def remove(self, key: str | None = None) -> Any:
        """Takes a section away; without a key, the widget itself, as every widget does."""
        if key is None:
            return super().remove()
        self.sections.remove(self._section(key))
        if self.cursor is not None and self.cursor[0] == key:
            self.cursor, self.follow = None, True
        self._measure(self._is_near_end)

    def clear(self) -> None:
        self.sections.clear()
        self.cursor, self.follow = None, True
        self._measure(True)

    def paint(self, latent: int | None, maxima: Callable[[int], float | None], strongest: bool = False) -> None:
        """Paints by one latent, by each token's strongest, or not at all; wraps nothing again."""
        self._latent, self._maxima, self._strongest = latent, maxima, strongest
        for section in self.sections:
            section.peak = max((self._painted(event)[1] for event in section.events), default=0.0)
        self._restyle()

    @property
    def more_below(self) -> bool:
        """Whether text lies further below than the view would follow."""
        return not self._is_near_end

    @property
    def current(self) -> tuple[str, int, TokenEvent, int] | None:
        """The cursor's section key, place, event, and how many events the section has."""
        if self.cursor is None or (section := self._find(self.cursor[0])) is None:
            return None
        return section.key, self.cursor[1], section.events[self.cursor[1]], len(section.events)

    def move_to(self, key: str, index: int) -> None:
        """Puts the cursor on a token and brings it into view."""
        section = self._section(key)
        if section.shows(index):
            self._move(section, index)

    # Rows

    @property
    def _text_width(self) -> int:
        width = self.scrollable_content_region.width or 80
        return max(width - INDENT - 2, 1)

    @property
    def _is_near_end(self) -> bool:
        return self.max_scroll_y - self.scroll_offset.y <= SLACK

    def _line_height(self, section: Section) -> int:
        return 2 if self.ruler and section.events else 1

    def _find(self, key: str) -> Section | None:
        return next((section for section in self.sections if section.key == key), None)

    def _section(self, key: str) -> Section:
        section = self._find(key)
        assert section is not None, f"no section {key}"
        return section

    def _measure(self, near: bool, from_row: int = 0) -> None:
        """Counts the rows again, tells the scroll bars, and stays at the bottom if it was `near`."""
        gap = 1 if self.size.height >= 18 else 0
        self._starts = [0]
        for section in self.sections:
            height = bool(section.title) + section.height * self._line_height(section) + (gap if section.title else 0)
            self._starts.append(self._starts[-1] + height)
        self.virtual_size = Size(self.scrollable_content_region.width, self._starts[-1])
        if near:
            self.scroll_end(animate=False, immediate=True)
        self.refresh_lines(from_row, max(self._starts[-1], self.scroll_offset.y + self.size.height) - from_row)

    def _row(self, section: Section, line: int) -> int:
        return self._starts[self.sections.index(section)] + bool(section.title) + line * self._line_height(section)

    def _locate(self, row: int) -> tuple[Section | None, int, int]:
        """The section of a row, the line in its body (-1 is the header) and the row within that line."""
        place = bisect_right(self._starts, row) - 1
        if not 0 <= place < len(self.sections):
            return None, 0, 0
        section = self.sections[place]
        within = row - self._starts[place] - bool(section.title)
        line, part = divmod(within, self._line_height(section))
        return section, -1 if within < 0 else line, part

    def on_resize(self, event: Resize) -> None:
        near, width = self.follow or self._is_near_end, self._text_width
        for section in self.sections:
            if section.width != width:
                section.wrap(width)
        self._measure(near)
        if not near and self.cursor is not None:
            self._reveal(self._section(self.cursor[0]), self.cursor[1])

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._version += 1

    @on(Focus)
    @on(Blur)
    def _restyle(self) -> None:
        self._version += 1
        self.refresh()

    # Drawing

    def _painted(self, event: TokenEvent) -> tuple[int | None, float]:
        """The latent a token is painted by, and its activation."""
        if self._strongest:
            return (event.hits[0].latent, event.hits[0].activation) if event.hits else (None, 0.0)
        if self._latent is None:
            return None, 0.0
        return self._latent, palette.activation_of(event.hits, self._latent)

    def _band(self, section: Section, place: int) -> int:
        latent, activation = self._painted(section.events[place]) if place >= 0 else (None, 0.0)
        if latent is None or not activation > 0:
            return 0
        return palette.band(activation, section.peak if self.rescale else self._maxima(latent) or section.peak)

    def render_line(self, y: int) -> Strip:
        width, base = self.scrollable_content_region.width, self.rich_style
        section, number, part = self._locate(y + self.scroll_offset.y)
        if section is None or number >= section.height:
            return palette.strip((), width, base)
        if number < 0:
            return palette.strip(self._header(section), width, base)
        line = section.wrapped.lines[number]
        at = self.cursor[1] if self.cursor is not None and self.cursor[0] == section.key else None
        if at is not None and not any(piece.token == at for piece in line.pieces):
            at = None
        stamp = (line.version, self._version, at, width, section.peak)
        cached = section.strips.get(number)
        if cached is None or cached[0] != stamp:
            cached = (stamp, self._draw(section, line, at, width, base))
            section.strips[number] = cached
        return cached[1][part]

    def _header(self, section: Section) -> list[Part]:
        name, gap, rest = palette.drawable(section.title).partition("  ")
        if self.rescale and section.peak > 0:
            rest += f"  scaled to own max {palette.number(section.peak)}"
        return [(name, self._component("name")), (gap + rest, self._component("title"))]

    def _draw(self, section: Section, line: Line, at: int | None, width: int, base: Style) -> tuple[Strip, ...]:
        """The strip of a line and, with the ruler on, the one below it."""
        colourless = palette.is_colourless(self.app)
        ruled = section.role == "assistant" and not section.title
        rule: Part = ("\u258e " if ruled else " " * INDENT, self._component("rule") if ruled else palette.PLAIN)
        plain = self._component("notice") if section.role == "notice" else palette.PLAIN
        parts, below = [rule], [rule]
        for piece in line.pieces:
            band = self._band(section, piece.token)
            style = plain + palette.band_style(band, colourless)
            active = piece.token >= 0 and (band > 0 or piece.token == at)
            if piece.token == at:
                reverse = not style.reverse if self.has_focus else style.reverse
                style += Style(reverse=reverse, underline=True, bold=True)
            whole = section.events[piece.token].text if active else ""
            parts.append((_shown(piece, marked=active, whole=whole), style))
            below.append((palette.ruler(band, colourless) * piece.width if band else " " * piece.width, palette.DIM))
        strips = [palette.strip(parts, width, base)]
        if self._line_height(section) > 1:
            strips.append(palette.strip(below, width, base))
        return tuple(strips)

    def _component(self, name: str) -> Style:
        return self.get_component_rich_style(f"token-view--{name}", partial=True)

    # The cursor

    def _set_cursor(self, section: Section, place: int) -> None:
        self._touch()
        self.cursor = section.key, place
        self._touch()
        self.post_message(self.Moved(section.key, place, section.events[place], len(section.events)))

    def _touch(self) -> None:
        """Has the lines under the cursor drawn again."""
        if self.cursor is None:
            return
        section, place = self._section(self.cursor[0]), self.cursor[1]
        lines, first = section.wrapped.lines, section.wrapped.first[place]
        last = first
        while last + 1 < len(lines) and lines[last + 1].pieces and lines[last + 1].pieces[0].token == place:
            last += 1
        first = max(first - 1, 0)  # where its leading space may hang
        self.refresh_lines(self._row(section, first), (last - first + 1) * self._line_height(section))

    def _move(self, section: Section, place: int, *, keep_goal: bool = False) -> None:
        """Moves on a person's behalf: the view comes along, and following goes on only from the very last token."""
        if not keep_goal:
            self._goal = None
        self.follow = section is self.sections[-1] and place == section.last
        self._reveal(section, place)
        self._set_cursor(section, place)

    def _reveal(self, section: Section, place: int) -> None:
        """Scrolls a token into view, with its section's header when it stands on the first line."""
        line = section.wrapped.first[place]
        row = self._row(section, line)
        top = row - bool(section.title) if line == 0 else row
        end = row + self._line_height(section)
        if top < self.scroll_offset.y:
            self.scroll_to(y=top, animate=False)
        elif end > self.scroll_offset.y + self.size.height:
            self.scroll_to(y=end - self.size.height, animate=False)

    def _tokens(self) -> list[tuple[Section, int]]:
        return [(section, place) for section in self.sections for place in section.places]

    def _walk(self, step: int) -> list[tuple[Section, int]]:
        """Every token that shows, from the cursor on in one direction, the cursor's own left out."""
        tokens = self._tokens()
        here = len(tokens)
        if self.cursor is not None:
            here = next(i for i, (section, place) in enumerate(tokens) if (section.key, place) == self.cursor)
        return tokens[here + 1 :] if step > 0 else tokens[:here][::-1]

    def action_token(self, step: int) -> None:
        for section, place in self._walk(step)[:1]:
            self._move(section, place)

    def action_firing(self, step: int) -> None:
        for section, place in self._walk(step):
            if self._painted(section.events[place])[1] > 0:
                self._move(section, place)
                return

    def action_line(self, step: int) -> None:
        """To the token above or below; where there are no tokens, scrolls."""
        if (here := self.current) is None:
            if self._walk(-1):
                self.action_token(-1)
            else:
                self.scroll_relative(y=step, animate=False)
            return
        section, place = self._section(here[0]), here[1]
        row = self._row(section, section.wrapped.first[place])
        if self._goal is None:
            line = section.wrapped.lines[section.wrapped.first[place]]
            self._goal = next(piece.x for piece in line.pieces if piece.token == place)
        row += self._line_height(section) if step > 0 else -1
        while 0 <= row < self._starts[-1]:
            found, number, _ = self._locate(row)
            if found is not None and 0 <= number < found.height:
                home, pieces = found.wrapped.first, found.wrapped.lines[number].pieces
                near = [piece for piece in pieces if piece.token >= 0 and home[piece.token] == number]
                if near:
                    goal = self._goal
                    best = min(near, key=lambda piece: max(piece.x - goal, goal - piece.x - piece.width + 1, 0))
                    self._move(found, best.token, keep_goal=True)
                    return
            row += step
        self.scroll_relative(y=step, animate=False)

    def action_edge(self, step: int) -> None:
        if tokens := self._tokens():
            self._move(*tokens[0 if step < 0 else -1])
        if step < 0:
            self.scroll_home(animate=False)
        else:
            self.follow = True
            self.scroll_end(animate=False)

    def action_section(self, step: int) -> None:
        """To the first token of the next section that has any; going back, first to that of this one."""
        heads = {section.places[0] for section in self.sections if section.places[:1]}
        walk = [
            (section, place) for section, place in self._walk(step) if place in heads and place == section.places[0]
        ]
        if walk:
            self._move(*walk[0])
        else:
            self.scroll_relative(y=step * self.size.height, animate=False)

    def on_click(self, event: Click) -> None:
        content = event.get_content_offset(self)
        if content is None:
            return
        section, number, _ = self._locate(content.y + self.scroll_offset.y)
        if section is not None and 0 <= number < section.height:
            token = section.wrapped.lines[number].token_at(content.x - INDENT)
            if token is not None and token >= 0:
                self._move(section, token)

    def action_pin(self) -> None:
        if (here := self.current) is not None:
            self.post_message(self.Pinned(*here[:3]))

    def action_rescale(self) -> None:
        self.rescale = not self.rescale
        self._restyle()

    def action_ruler(self) -> None:
        self.ruler = not self.ruler
        self._restyle()
        self._measure(self._is_near_end)


def _shown(piece: Piece, *, marked: bool, whole: str) -> str:
    """What a piece draws, in exactly its cells, but a marked newline, which takes the cell after the line."""
    text = piece.text
    if text == "\n":
        return "↵" if marked else ""
    if text == "\t":
        return ("→" if marked else " ").ljust(TAB)
    return palette.visible(text) if marked and whole.isspace() else text
