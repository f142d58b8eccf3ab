"""The figures of a training report, drawn by matplotlib's objects alone: no pyplot, no window, no global state.

Each function takes plain numbers and gives a figure, or None where there is nothing to draw. The same numbers give the
same bytes. Entries are those of `metrics.jsonl`; a key that is missing or no number leaves its curve shorter.

Shapes: F latents.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.errors import TrainError
from train.floor import Array, Floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from train.activity import Change

Entry = dict[str, Any]
BLUE, ORANGE, GREEN, RED, GREY = "#2a6fbb", "#d9822b", "#3a8a4d", "#c0392b", "#8a8a8a"
COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)
PARTS = 8
"""The most loss parts that are drawn."""


def number(value: Any) -> float | None:
    """`value` if it is a finite number."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def series(entries: Sequence[Entry], *path: str) -> tuple[Array, Array]:
    """(training tokens, values) of the entries that have a number under `path`."""
    points: list[tuple[float, float]] = []
    for entry in entries:
        value: Any = entry
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        x, y = number(entry.get("tokens")), number(value)
        if x is not None and y is not None:
            points.append((x, y))
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def png(figure: Figure) -> bytes:
    """The picture's bytes, without a date or a version in them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def draw_loss(entries: Sequence[Entry], floor: Floor | None) -> Figure | None:
    """The total loss with the curve fitted to it, and FVU in training and held out."""
    loss, fvu, held_out = (series(entries, key) for key in ("loss", "fvu", "held_out_fvu"))
    figure, (left, right) = _figure(("total loss", "FVU"))
    drawn = [_line(left, loss, BLUE, "loss"), _line(right, fvu, BLUE, "training")]
    drawn.append(_line(right, held_out, ORANGE, "held out", marked=True))
    if floor and not floor.why:
        x = np.linspace(floor.first, loss[0].max(), 200)
        left.plot(x, floor.at(x), color=RED, linewidth=1.4, label="fit")
        left.axhspan(floor.low, floor.high, color=RED, alpha=0.12, linewidth=0)
        left.axhline(floor.loss, color=RED, linewidth=0.8, linestyle="--", label=f"floor {floor.loss:.4g}")
    return _done(figure, any(drawn), log=(left, right))


def draw_parts(entries: Sequence[Entry]) -> Figure | None:
    """The parts of the loss, and the norm of its gradient."""
    names = sorted(
        {str(name) for entry in entries if isinstance(entry.get("losses"), dict) for name in entry["losses"]}
    )
    figure, (left, right) = _figure(("loss parts", "norm of the gradient"))
    drawn = [
        _line(left, series(entries, "losses", name), COLOURS[i % len(COLOURS)], name)
        for i, name in enumerate(names[:PARTS])
    ]
    drawn.append(_line(right, series(entries, "grad_norm"), BLUE))
    return _done(figure, any(drawn), log=(left, right))


def draw_dead(entries: Sequence[Entry]) -> Figure | None:
    """The share of dead latents, and L0."""
    figure, (left, right) = _figure(("share of dead latents", "L0: latents active at a token"))
    drawn = [_line(left, series(entries, "dead"), RED), _line(right, series(entries, "l0"), BLUE)]
    return _done(figure, any(drawn), zero=(left, right))


def draw_activity(
    found: Sequence[Change], tokens: Sequence[int], shares: Sequence[Array], dead_after: int
) -> Figure | None:
    """Births and deaths at each snapshot, and how the latents' silence is spread, in octaves, snapshot by snapshot.

    `shares` holds a histogram of `train.activity.silence_histogram` for each of the snapshots at `tokens`.
    """
    if not shares:
        return None
    figure, (left, right) = _figure(("latents born and died since the snapshot before", "share of latents by silence"))
    x = np.array([change.tokens for change in found], dtype=float)
    width = 0.8 * float(np.diff(x, prepend=0.0).clip(min=1).min()) if len(x) else 1.0
    left.bar(x, [change.births for change in found], width, color=GREEN, label="births")
    left.bar(x, [-change.deaths for change in found], width, color=RED, label="deaths")
    left.axhline(0, color=GREY, linewidth=0.6)
    _draw_silence(figure, right, tokens, np.array(shares), dead_after)
    return _done(figure, True)


def _draw_silence(figure: Figure, axes: Axes, tokens: Sequence[int], shares_SO: Array, dead_after: int) -> None:
    from matplotlib.colors import PowerNorm

    first = int(shares_SO[:, 1:].any(0).argmax()) + 1  # silence is a multiple of the batch: nothing lies below it
    kept_SO = np.concatenate([shares_SO[:, :1], shares_SO[:, first:]], axis=1)
    last = shares_SO.shape[1] - 1
    y = 2.0 ** np.array([first - 2, *range(first - 1, last + 1)])
    x = np.concatenate([[0.0], np.asarray(tokens, dtype=float)])
    x = np.maximum.accumulate(x)
    mesh = axes.pcolormesh(x, y, kept_SO.T, cmap="Blues", norm=PowerNorm(0.4, vmin=0, vmax=1))
    axes.set_yscale("log", base=2)
    axes.set_ylabel("tokens since it last fired (lowest row: none)")
    axes.axhline(dead_after, color=RED, linewidth=1, linestyle="--", label=f"dead from {dead_after:,}")
    figure.colorbar(mesh, ax=axes)


def draw_density(edges: Sequence[float], counts: Sequence[float]) -> Figure | None:
    """How often latents are active; edges are shares of tokens, or their logarithms to base 10 if one is negative."""
    x, y = np.asarray(edges, dtype=float), np.asarray(counts, dtype=float)
    if y.ndim != 1 or x.shape != (len(y) + 1,) or not len(y) or not np.isfinite(x).all() or not np.isfinite(y).all():
        return None
    figure, (axes,) = _figure(("latents by density",))
    if x.min() < 0:
        x = 10**x
    elif x.min() == 0 and len(y) > 1 and x[2] > x[1] > 0:  # the first bin begins at never
        x = np.concatenate([[x[1] ** 2 / x[2]], x[1:]])
    axes.stairs(y, x, fill=True, color=BLUE)
    axes.set_xscale("log")
    axes.set_xlabel("share of tokens on which a latent is active")
    return _done(figure, True, tokens=False)


def draw_b_enc(b_enc_F: Array, where: str) -> Figure | None:
    """Histogram of the encoder's bias."""
    finite_F = b_enc_F[np.isfinite(b_enc_F)]
    if not len(finite_F):
        return None
    figure, (axes,) = _figure((f"b_enc, {where}: {negative_share(b_enc_F):.1%} negative",))
    counts, edges = np.histogram(finite_F, bins=80)
    axes.stairs(counts, edges, fill=True, color=BLUE)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("value")
    return _done(figure, True, tokens=False)


def negative_share(b_enc_F: Array) -> float:
    """Share of the biases below 0."""
    return float((b_enc_F < 0).mean()) if len(b_enc_F) else 0.0


def draw_speed(entries: Sequence[Entry]) -> Figure | None:
    """Learning rate, tokens a second, and the wait for data."""
    figure, (left, middle, right) = _figure(("learning rate", "tokens a second", "share of the time waiting for data"))
    drawn = [_line(left, series(entries, "lr"), BLUE), _line(middle, series(entries, "tokens_per_second"), GREEN)]
    drawn.append(_line(right, series(entries, "loader_wait"), ORANGE))
    return _done(figure, any(drawn), zero=(left, middle, right))


def _figure(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A row of axes. Raises `TrainError` where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainError("drawing needs matplotlib, which is not installed", "pip install 'steer[train]'") from error
    width = 6 if len(titles) == 1 else 11
    figure = Figure(figsize=(width, 3.6))
    figure.subplots_adjust(0.75 / width, 0.15, 1 - 0.2 / width, 0.91, 0.24)  # a layout engine takes as long as drawing
    row: list[Axes] = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for axes, title in zip(row, titles, strict=True):
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, row


def _line(axes: Axes, points: tuple[Array, Array], colour: str, label: str = "", *, marked: bool = False) -> bool:
    """Draws the points; whether there are any."""
    x, y = points
    if len(x):
        (line,) = axes.plot(x, y, color=colour, linewidth=1, marker="o" if marked or len(x) == 1 else "", markersize=3)
        line.set_label(label.replace("$", r"\$") or "_")
    return bool(len(x))


def _done(
    figure: Figure, drawn: bool, *, log: Sequence[Axes] = (), zero: Sequence[Axes] = (), tokens: bool = True
) -> Figure | None:
    """The figure with its scales, axis names and legends; None if nothing is in it. `zero` are axes that begin at 0."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if not drawn:
        return None
    for axes in figure.axes:
        heights = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] or [np.empty(0)])
        if axes in log and (heights > 0).any():
            axes.set_yscale("log")
        if axes in zero and (heights > 0).any():
            axes.set_ylim(0, 1.08 * float(heights.max()))
        if tokens and axes.get_title():
            axes.set_xlabel("training tokens")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
    return figure
