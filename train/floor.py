"""Where a loss is heading: L(t) = L_inf + a t^-b fitted to the second half of a run by least squares.

For a given b the best L_inf and a are a line through the points (t^-b, L), so only b is searched, on a grid that is
refined three times. The uncertainty comes from a bootstrap: the points are cut into blocks of neighbours, blocks are
drawn with replacement and the curve is fitted again. Sums of a block for each b of the grid are made once, so that a
redraw costs one small product. The fit says in words when it should not be believed. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LOWEST, HIGHEST = 0.02, 8.0
"""Exponents between which b is searched."""
GRID = 256
BLOCKS = 20
REDRAWS = 400


@dataclass(frozen=True)
class Floor:
    """The fitted curve, with t in training tokens; `why` is empty where the fit can be believed."""

    loss: float
    """L_inf"""
    low: float
    high: float
    """the middle 95% of L_inf over the redraws"""
    a: float
    b: float
    first: float
    """tokens of the first point that was used"""
    points: int
    why: str = ""

    def at(self, tokens: Array) -> Array:
        """The curve at these numbers of tokens."""
        with np.errstate(over="ignore"):
            return np.asarray(self.loss + self.a * np.asarray(tokens, dtype=float) ** -self.b)


def fit_floor(tokens: Sequence[float] | Array, losses: Sequence[float] | Array, seed: int = 0) -> Floor:
    """Fits the points whose tokens lie in the second half of the run; `seed` is that of the redraws."""
    t_N, y_N = np.asarray(tokens, dtype=float), np.asarray(losses, dtype=float)
    used_N = (t_N >= t_N.max(initial=0.0) / 2) & (t_N > 0) & np.isfinite(y_N)
    t_N, y_N = t_N[used_N], y_N[used_N]
    nothing = float("nan")
    if len(t_N) < 2 * BLOCKS:
        why = f"the second half of the run holds {len(t_N)} losses, too few: {2 * BLOCKS} are needed"
        return Floor(nothing, nothing, nothing, nothing, nothing, nothing, len(t_N), why)
    order_N = np.argsort(t_N, kind="stable")
    t_N, y_N = t_N[order_N], y_N[order_N]
    end, middle = t_N[-1], float(y_N.mean())
    u_N, z_N = t_N / end, y_N - middle  # near 1 and near 0: nothing overflows, little cancels
    bs_G = np.geomspace(LOWEST, HIGHEST, GRID)
    sums_KG6 = _block_sums(u_N, z_N, bs_G)
    weights_RK = np.random.default_rng(seed).multinomial(BLOCKS, [1 / BLOCKS] * BLOCKS, REDRAWS)
    floors_RG, _, rests_RG = _lines(np.einsum("rk,kgs->rgs", weights_RK, sums_KG6))
    drawn_R = np.take_along_axis(floors_RG, rests_RG.argmin(1)[:, None], 1)[:, 0] + middle
    low, high = np.quantile(drawn_R, (0.025, 0.975)).tolist()
    for _ in range(4):
        floors_G, slopes_G, rests_G = _lines(_block_sums(u_N, z_N, bs_G).sum(0))
        best = int(rests_G.argmin())
        loss, slope, b = floors_G[best] + middle, slopes_G[best], bs_G[best]
        bs_G = np.linspace(bs_G[max(best - 1, 0)], bs_G[min(best + 1, GRID - 1)], GRID)
    why = _doubt(y_N, loss + slope * u_N**-b, loss, slope, b, low, high)
    low, high = min(low, float(loss)), max(high, float(loss))
    return Floor(float(loss), low, high, float(slope * end**b), float(b), float(t_N[0]), len(t_N), why)


def _block_sums(u_N: Array, z_N: Array, bs_G: Array) -> Array:
    """Sums of 1, g, g^2, z, gz and z^2 with g = u^-b - 1, for each block of neighbours and each b: (K, G, 6)."""
    sums_KG6 = np.empty((BLOCKS, len(bs_G), 6))
    for sums_G6, u_M, z_M in zip(sums_KG6, np.array_split(u_N, BLOCKS), np.array_split(z_N, BLOCKS), strict=True):
        g_MG = np.expm1(
            -np.log(u_M)[:, None] * bs_G
        )  # the 1 goes into the floor; else g hardly varies where b is small
        sums_G6[:, 0], sums_G6[:, 3], sums_G6[:, 5] = len(u_M), z_M.sum(), z_M @ z_M
        sums_G6[:, 1], sums_G6[:, 4], sums_G6[:, 2] = g_MG.sum(0), z_M @ g_MG, np.square(g_MG, out=g_MG).sum(0)
    return sums_KG6


def _lines(sums: Array) -> tuple[Array, Array, Array]:
    """Least squares of z = (floor + slope) + slope g from the sums (..., 6): floor, slope and what is left over."""
    n, g, gg, z, gz, zz = np.moveaxis(sums, -1, 0)
    spread = gg - g * g / n
    slope = np.divide(gz - g * z / n, spread, out=np.zeros_like(spread), where=spread > 0)
    return z / n - slope * (g / n + 1), slope, zz - z * z / n - slope * slope * spread


def _doubt(y_N: Array, fitted_N: Array, loss: float, slope: float, b: float, low: float, high: float) -> str:
    """Why the fit should not be believed; empty if nothing speaks against it."""
    rests_N, last = y_N - fitted_N, float(fitted_N[-1])
    if slope <= 0:
        return "the loss does not fall in the second half of the run"
    if b > 0.99 * HIGHEST:
        return (
            "the loss falls faster at the end than any power of the tokens, as it does while the rate is brought down"
        )
    if b < 1.01 * LOWEST:
        return "the loss does not level off: the run is too short to show a floor, or its rate was being brought down"
    if loss < -1e-3 * abs(last):
        return f"the floor would lie at {loss:.4g}, below 0"
    if high - low > 0.5 * last:
        return f"the points do not settle it: the floor lies anywhere between {low:.4g} and {high:.4g}"
    blocks = np.array_split(rests_N, BLOCKS)
    between = float(np.sqrt(np.mean([block.mean() ** 2 for block in blocks])))
    within = float(np.sqrt(np.mean([block.var() / len(block) for block in blocks])))
    if between > 3 * within and between > 0.05 * (fitted_N[0] - last):
        return "the losses leave the curve by more than their noise: they do not follow a power law here"
    return ""
