"""The picture of `steer patch`: hook points by positions, coloured by how much of the answer came back.

An `.html` file is one self-contained page that needs nothing; `.png`, `.svg` and `.pdf` are drawn by matplotlib's
objects alone. Every text is escaped or drawn as plain text.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from steer.errors import SteerError
from steer.events import clean
from steer.files import replacing

if TYPE_CHECKING:
    from steer.analysis.patching import Cell, Patching

DRAWN = (".png", ".svg", ".pdf")

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Activation patching</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 8px; text-align: right; white-space: pre; font-weight: normal; }
th { font-family: ui-monospace, monospace; }
</style></head><body>
"""


def check_picture(file: Path) -> None:
    """`SteerError` for a file that cannot be drawn here: asked before a model is loaded."""
    suffix = file.suffix.lower()
    if suffix not in (".html", *DRAWN):
        raise SteerError(f"`{file}` is no picture that can be drawn", f"end its name in .html, {', '.join(DRAWN)}")
    if not file.parent.is_dir():
        raise SteerError(f"there is no folder `{file.parent}` to write `{file.name}` to", "make it first")
    if suffix == ".html":
        return
    try:
        import matplotlib.figure  # noqa: F401 (whether it is there)
    except ImportError as error:
        raise SteerError(
            "a picture of this kind needs matplotlib, which is not installed",
            "name an .html file, or `pip install 'steer[train]'`",
        ) from error


def write_picture(file: Path, found: Patching) -> None:
    """Draws the table into the file."""
    with replacing(file) as partial:
        if file.suffix.lower() == ".html":
            partial.write_text(_page(found), encoding="utf-8")
        else:
            _draw(partial, found)


def _rows(found: Patching) -> dict[str, list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for cell in found.cells:
        rows.setdefault(cell.hook, []).append(cell)
    return rows


def _title(found: Patching) -> str:
    answer, wrong = clean(repr(found.answer.text)), clean(repr(found.wrong.text))
    return f"logit of {answer} less that of {wrong}: clean {found.clean:+.2f}, corrupt {found.corrupt:+.2f}"


def _name(pair: tuple[str, str]) -> str:
    ours, theirs = (clean(repr(text)[1:-1]).strip() for text in pair)
    return ours if ours == theirs else f"{ours} / {theirs}"


def _page(found: Patching) -> str:
    rows = _rows(found)
    columns = [cell.index for cell in next(iter(rows.values()))]
    heads = "".join(f"<th>{place}<br>{escape(_name(found.tokens[place]))}</th>" for place in columns)
    body = "\n".join(
        f"<tr><th>{escape(hook)}</th>{''.join(_cell(cell) for cell in cells)}</tr>" for hook, cells in rows.items()
    )
    legend = "Blue: towards the clean answer; red: away from it. Full colour is the whole way."
    return (
        f"{_HEAD}<p>{escape(_title(found))}</p>\n<table><thead><tr><th></th>{heads}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table>\n<p>{legend}</p></body></html>\n"
    )


def _cell(cell: Cell) -> str:
    share = max(-1.0, min(1.0, cell.recovered or 0.0))
    colour = "42 111 187" if share >= 0 else "192 57 43"
    told = "" if cell.recovered is None else f' title="recovered {cell.recovered:.1%}"'
    return f'<td{told} style="background: rgb({colour} / {abs(share):.2f})">{cell.difference:+.2f}</td>'


def _draw(file: Path, found: Patching) -> None:
    from matplotlib.figure import Figure

    rows = _rows(found)
    columns = [cell.index for cell in next(iter(rows.values()))]
    shares = [[cell.recovered or 0.0 for cell in cells] for cells in rows.values()]
    size = max(6.4, 3.4 + 0.55 * len(columns)), max(3.2, 2.0 + 0.3 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    names = [f"{place} {_name(found.tokens[place])}" for place in columns]
    axes.set_xticks(range(len(columns)), names, rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(len(rows)), list(rows), parse_math=False)
    axes.set_title(_title(found), fontsize=9, parse_math=False)
    figure.colorbar(image, ax=axes, label="recovered")
    figure.savefig(file, dpi=120)
