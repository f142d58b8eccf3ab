"""The examples and statistics of every latent of an SAE, gathered in one pass over a text in memory that does not grow.

- **top**: the strongest activations, at most one a context.
- **random**: a uniform sample of the positions at which the latent was active.
- **middle**: of another such sample, four times as large as needed, the ones nearest to the latent's median activation
  (read off its histogram).

All three are the same thing, a pool: a fixed number of slots a latent, filled by the largest scores, with the smallest
score kept as the latent's threshold. The score is the activation for `top`; for the two samples it is one uniform draw
u and 1 - u. A batch is first cut down to what beats its thresholds; only that is sorted, and only what enters a slot
gets its window of tokens copied. No step loops over activations in Python.

The histogram has equal bins from 0 to a power of two; when a latent exceeds it, neighbours are merged until it fits.

Shapes: B rows (contexts), T tokens, K kept latents, F latents, S slots, W window, N candidates.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from labels.packing import Kind, RawExample

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

BINS: Final = 32
_CHUNK: Final = 4096
"""Candidates whose windows are copied at once: bounds the (N, W, K) comparison in memory."""


class Batch:
    """One batch and its active entries, flat: latent, row, place in the row and activation of each."""

    def __init__(self, tokens_BT: Ints, lengths_B: Ints, indices_BTK: Ints, values_BTK: Floats, keep_BT: Bools) -> None:
        B, T, K = indices_BTK.shape
        assert tokens_BT.shape == keep_BT.shape == (B, T) and values_BTK.shape == (B, T, K) and lengths_B.shape == (B,)
        inside_BT = np.arange(T) < lengths_B[:, None]
        self.keep_BT = keep_BT & inside_BT
        self.tokens_BT, self.lengths_B, self.indices_BTK = tokens_BT, lengths_B, indices_BTK
        self.values_BTK = np.where(self.keep_BT[:, :, None], values_BTK, 0).astype(np.float32)
        flat = np.flatnonzero(self.values_BTK > 0)
        self.latents = indices_BTK.reshape(-1)[flat].astype(np.int64)
        self.values = self.values_BTK.reshape(-1)[flat]
        self.rows, self.places = np.divmod(flat // K, T)
        self.first_B = self.keep_BT.argmax(axis=1)

    def windows(self, entries: Ints, width: int) -> tuple[Ints, Floats, Ints, Ints]:
        """Tokens (N, W), activations (N, W), lengths (N,) and peaks (N,) around `entries`, two thirds of it before."""
        rows, places, latents = self.rows[entries], self.places[entries], self.latents[entries]
        ends, firsts = self.lengths_B[rows], self.first_B[rows]
        starts = np.clip(places - 2 * width // 3, firsts, np.maximum(ends - width, firsts))
        at_NW = starts[:, None] + np.arange(width)
        inside_NW = at_NW < ends[:, None]
        at_NW = np.where(inside_NW, at_NW, 0)
        tokens_NW = np.where(inside_NW, self.tokens_BT[rows[:, None], at_NW], 0)
        hits_NWK = self.indices_BTK[rows[:, None], at_NW] == latents[:, None, None]
        values_NW = np.where(hits_NWK, self.values_BTK[rows[:, None], at_NW], 0).sum(axis=2, dtype=np.float32)
        return tokens_NW, np.where(inside_NW, values_NW, 0), np.minimum(ends - starts, width), places - starts


class Pool:
    """The best `slots` windows of each latent by score."""

    def __init__(self, d_sae: int, slots: int, width: int) -> None:
        self.slots, self.width = slots, width
        self.score_FS = np.full((d_sae, slots), -np.inf)
        self.place_FS = np.full((d_sae, slots), -1, dtype=np.int64)
        self.value_FS = np.zeros((d_sae, slots), dtype=np.float32)
        self.length_FS = np.zeros((d_sae, slots), dtype=np.int32)
        self.peak_FS = np.zeros((d_sae, slots), dtype=np.int32)
        self.tokens_FSW = np.zeros((d_sae, slots, width), dtype=np.int32)
        self.values_FSW = np.zeros((d_sae, slots, width), dtype=np.float32)

    def offer(self, batch: Batch, scores: NDArray[np.float64], first_context: int, one_a_row: bool) -> None:
        """Takes in those entries of the batch that beat what is held. Among equal scores the earlier one stays."""
        if not self.slots:
            return
        found = np.flatnonzero(scores > self.score_FS.min(axis=1)[batch.latents])
        if one_a_row:
            # Best first within each (latent, row), then the first of each.
            order = np.lexsort((-scores[found], batch.rows[found], batch.latents[found]))
            found = found[order]
            new = np.ones(len(found), dtype=bool)
            same = (np.diff(batch.latents[found]) == 0) & (np.diff(batch.rows[found]) == 0)
            new[1:] = ~same
            found = found[new]
        found = found[np.lexsort((found, -scores[found], batch.latents[found]))]
        latents, starts = np.unique(batch.latents[found], return_index=True)
        which = np.repeat(np.arange(len(latents)), np.diff(np.append(starts, len(found))))
        rank = np.arange(len(found)) - starts[which]
        found, which, rank = (each[rank < self.slots] for each in (found, which, rank))
        new_US = np.full((len(latents), self.slots), -np.inf)
        new_US[which, rank] = scores[found]
        entry_US = np.zeros((len(latents), self.slots), dtype=np.int64)
        entry_US[which, rank] = found
        both = np.concatenate([self.score_FS[latents], new_US], axis=1)
        chosen = np.zeros(both.shape, dtype=bool)
        best = np.argsort(-both, axis=1, kind="stable")[:, : self.slots]
        np.put_along_axis(chosen, best, True, axis=1)
        # As many old slots become free as new entries come in, latent by latent, so that the two lists pair up.
        which, slots = np.nonzero(~chosen[:, : self.slots])
        entries = entry_US[chosen[:, self.slots :]]
        latents = latents[which]
        self.score_FS[latents, slots] = scores[entries]
        self.value_FS[latents, slots] = batch.values[entries]
        self.place_FS[latents, slots] = ((first_context + batch.rows[entries]) << 32) + batch.places[entries]
        for start in range(0, len(entries), _CHUNK):
            part = slice(start, start + _CHUNK)
            tokens_NW, values_NW, lengths, peaks = batch.windows(entries[part], self.width)
            self.tokens_FSW[latents[part], slots[part]] = tokens_NW
            self.values_FSW[latents[part], slots[part]] = values_NW
            self.length_FS[latents[part], slots[part]] = lengths
            self.peak_FS[latents[part], slots[part]] = peaks

    def filled(self, latent: int) -> list[int]:
        """The latent's filled slots, highest score first."""
        order = np.argsort(-self.score_FS[latent], kind="stable")
        return [int(slot) for slot in order if self.place_FS[latent, slot] >= 0]

    def example(self, latent: int, slot: int, kind: Kind) -> RawExample:
        """What a filled slot holds."""
        length = self.length_FS[latent, slot]
        tokens, values = (each[latent, slot, :length].tolist() for each in (self.tokens_FSW, self.values_FSW))
        return RawExample(tokens, values, kind, int(self.peak_FS[latent, slot]))


class ExampleStore:
    """What each of `d_sae` latents fires on. The same calls with the same seed give the same examples."""

    def __init__(
        self, d_sae: int, *, top: int = 8, middle: int = 2, random: int = 2, width: int = 24, seed: int = 0
    ) -> None:
        self.d_sae, self.middle = d_sae, middle
        self._top, self._random = Pool(d_sae, top, width), Pool(d_sae, random, width)
        self._middle = Pool(d_sae, 4 * middle, width)
        self._draws = np.random.default_rng(seed)
        self.tokens = 0
        """positions read: those with `keep`"""
        self.contexts = 0
        self.max_F = np.zeros(d_sae, dtype=np.float32)
        self.count_F = np.zeros(d_sae, dtype=np.int64)
        """positions at which the latent was active"""
        self._sum_F = np.zeros(d_sae)
        self._bins_FH = np.zeros((d_sae, BINS), dtype=np.int64)
        self._end_F = np.zeros(d_sae)
        """where the last bin ends: 0 or a power of two above the max"""

    def update(self, tokens_BT: Any, lengths_B: Any, indices_BTK: Any, values_BTK: Any, keep_BT: Any) -> None:
        """Reads a batch of contexts: right-padded token ids, lengths, active latents and values, positions to count."""
        tokens, lengths, keep = np.asarray(tokens_BT), np.asarray(lengths_B), np.asarray(keep_BT, dtype=bool)
        batch = Batch(tokens, lengths, np.asarray(indices_BTK), np.asarray(values_BTK), keep)
        self._count(batch)
        draws = self._draws.random(len(batch.values))
        self._top.offer(batch, batch.values.astype(np.float64), self.contexts, one_a_row=True)
        self._random.offer(batch, draws, self.contexts, one_a_row=False)
        self._middle.offer(batch, 1 - draws, self.contexts, one_a_row=False)
        self.contexts += len(tokens)

    @property
    def mean_on_F(self) -> Floats:
        """Mean activation over the positions at which the latent was active; 0 if there were none."""
        return np.asarray(self._sum_F / np.maximum(self.count_F, 1), dtype=np.float32)

    @property
    def density_F(self) -> Floats:
        """Share of positions at which the latent was active."""
        return np.asarray(self.count_F / max(self.tokens, 1), dtype=np.float32)

    def median(self, latent: int) -> float:
        """The latent's median activation, to within a bin of its histogram."""
        below = np.concatenate([[0], self._bins_FH[latent].cumsum()])
        return float(np.interp(below[-1] / 2, below, np.linspace(0, self._end_F[latent], BINS + 1)))

    def histogram(self, latent: int, bins: int = 15) -> list[int]:
        """How often the latent had which activation, in equal bins from 0 to its max; [] for a dead one."""
        if not self.count_F[latent]:
            return []
        below = np.concatenate([[0], self._bins_FH[latent].cumsum()])
        edges = np.linspace(0, self._end_F[latent], BINS + 1)
        wanted = np.interp(np.linspace(0, self.max_F[latent], bins + 1), edges, below)
        wanted[-1] = below[-1]
        return [int(count) for count in np.diff(np.rint(wanted))]

    def examples(self, latent: int) -> list[RawExample]:
        """Top examples, strongest first, then middle and random ones that are not among those before them."""
        median = self.median(latent)
        middle = sorted(self._middle.filled(latent), key=lambda slot: abs(self._middle.value_FS[latent, slot] - median))
        kinds: list[tuple[Kind, Pool, list[int], int]] = [
            ("top", self._top, self._top.filled(latent), self._top.slots),
            ("middle", self._middle, middle, self.middle),
            ("random", self._random, self._random.filled(latent), self._random.slots),
        ]
        seen: set[int] = set()
        found: list[RawExample] = []
        for kind, pool, slots, most in kinds:
            fresh = [slot for slot in slots if int(pool.place_FS[latent, slot]) not in seen][:most]
            seen.update(int(pool.place_FS[latent, slot]) for slot in fresh)
            found += (pool.example(latent, slot, kind) for slot in fresh)
        return found

    def _count(self, batch: Batch) -> None:
        self.tokens += int(batch.keep_BT.sum())
        self.count_F += np.bincount(batch.latents, minlength=self.d_sae)
        self._sum_F += np.bincount(batch.latents, weights=batch.values, minlength=self.d_sae)
        np.maximum.at(self.max_F, batch.latents, batch.values)
        outgrown = np.flatnonzero(self.max_F >= np.where(self.max_F > 0, self._end_F, np.inf))
        if len(outgrown):
            _, exponents = np.frexp(self.max_F[outgrown].astype(np.float64))
            ends = np.ldexp(1.0, exponents)  # frexp's mantissa is below 1, so the end lies above the max
            factor = np.where(self._end_F[outgrown] > 0, ends / np.maximum(self._end_F[outgrown], 1e-300), 1)
            target = (np.arange(BINS) / factor[:, None]).astype(np.int64)
            merged = np.zeros((len(outgrown), BINS), dtype=np.int64)
            np.add.at(merged, (np.arange(len(outgrown))[:, None], target), self._bins_FH[outgrown])
            self._bins_FH[outgrown], self._end_F[outgrown] = merged, ends
        bins = (batch.values / self._end_F[batch.latents] * BINS).astype(np.int64)
        np.add.at(self._bins_FH.reshape(-1), batch.latents * BINS + bins, 1)
