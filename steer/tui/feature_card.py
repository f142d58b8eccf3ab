"""One feature as a page: label and author, its numbers, what it pushes, and the texts on which it was active."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from rich.cells import cell_len
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from steer.session import FeatureCard
from steer.tui import palette
from steer.tui.palette import BOLD, DIM, PLAIN, Part

ExampleKind = Literal["top", "middle", "random"]
KINDS: tuple[ExampleKind, ...] = ("top", "middle", "random")


class FeatureCardView(ScrollView, can_focus=True):
    """Scrolls with the arrow keys; the kind of examples that was asked for comes first, the others after it."""

    DEFAULT_CSS = """
    FeatureCardView { overflow-x: hidden; overflow-y: auto; scrollbar-size-vertical: 1; }
    """
    HELP = "What the feature was active on: the strongest examples, some from the middle, some at random."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll_up", "Up"),
        Binding("down,j", "scroll_down", "Down"),
        Binding("pageup", "page_up", "A page up"),
        Binding("pagedown", "page_down", "A page down"),
    ]

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.card: FeatureCard | None = None
        self.kind: ExampleKind = "top"
        self._rows: list[list[Part]] = []
        self.border_title = palette.title("Feature")

    def show(self, card: FeatureCard | None, kind: ExampleKind) -> None:
        """Draws a card, from its top if it is another one."""
        if card is None or self.card is None or card.latent != self.card.latent or kind != self.kind:
            self.scroll_home(animate=False, immediate=True)
        self.card, self.kind = card, kind
        self.border_title = palette.title(str(card.latent) if card is not None else "Feature")
        self.border_subtitle = palette.title(f"label by {card.author}" if card is not None and card.author else "")
        self._draw()

    def on_resize(self, event: Resize) -> None:
        self._draw()

    def _draw(self) -> None:
        width = self.scrollable_content_region.width
        if self.card is None:
            self._rows = [[(text, DIM)] for text in palette.wrapped("No feature is chosen.", width)]
        else:
            self._rows = self._page(self.card, width)
        self.virtual_size = Size(width, len(self._rows))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        place = y + self.scroll_offset.y
        parts = self._rows[place] if place < len(self._rows) else []
        return palette.strip(parts, self.scrollable_content_region.width, self.rich_style)

    def _page(self, card: FeatureCard, width: int) -> list[list[Part]]:
        rows: list[list[Part]] = [[(text, BOLD)] for text in palette.wrapped(card.label or "(no label)", width)]
        author = f"label by {card.author}, " if card.author else ""
        facts = (
            f"{author}max {palette.number(card.max_activation)}, density {palette.percent(card.density)}"
            f", mean when on {palette.number(card.mean_on)}"
        )
        rows += [[(text, DIM)] for text in palette.wrapped(facts, width)]
        for name, tokens in (("Pushes up    ", card.promotes), ("Pushes down  ", card.suppresses)):
            if tokens:
                row: list[Part] = [(name, DIM)]
                for text, weight in tokens:
                    row.append((palette.visible(palette.drawable(text)).strip(" ") or "·", PLAIN))
                    row.append((f" {palette.share(weight)}  ", DIM))
                rows.append(row)
        colourless = palette.is_colourless(self.app)
        for kind in sorted(KINDS, key=lambda kind: kind != self.kind):
            found = [example for example in card.examples if example[0] == kind]
            if found:
                rows += [[], [(f"{kind.capitalize()} examples", BOLD), (f"  {len(found)}", DIM)]]
                rows += [example_row(tokens, acts, card.max_activation, width, colourless) for _, tokens, acts in found]
        if not card.examples:
            rows += [[], [("no examples were recorded", DIM)]]
        return rows


def example_row(
    tokens: Sequence[str], activations: Sequence[float], maximum: float | None, width: int, colourless: bool
) -> list[Part]:
    """One line of an example: its largest activation, then as much text around that token as fits, painted by band."""
    texts = [
        palette.visible(palette.drawable(text)) if text.strip(" ") == "" and a > 0 else _flat(text)
        for text, a in zip(tokens, activations, strict=False)
    ]
    if not texts:
        return [("", PLAIN)]
    peak = max(range(len(texts)), key=lambda place: activations[place])
    space = max(width - 6, 1)
    first = last = peak
    used = cell_len(texts[peak])
    grown = True
    # Left and right take turns, so that the peak stays near the middle while there is text on both sides.
    while grown:
        grown = False
        if first > 0 and used + cell_len(texts[first - 1]) <= space - 2:
            first, grown = first - 1, True
            used += cell_len(texts[first])
        if last + 1 < len(texts) and used + cell_len(texts[last + 1]) <= space - 2:
            last, grown = last + 1, True
            used += cell_len(texts[last])
    row: list[Part] = [(f"{palette.number(activations[peak]):>5} ", DIM), (".." if first > 0 else "", DIM)]
    shown = range(first, last + 1)
    bands = (palette.band(activations[place], maximum) for place in shown)
    row += [(texts[place], palette.band_style(band, colourless)) for place, band in zip(shown, bands, strict=True)]
    return row


def _flat(text: str) -> str:
    return palette.drawable(text).replace("\n", "↵").replace("\t", "→")
