"""Keys and values of tokens already read, allocated once and written in place.

Lengths are Python integers, so asking for them never waits for a device. Slots past a row's length hold stale but
finite numbers and are masked by attention. On request (`keep`) a cache also holds the residual stream of its tokens at
one hook point, from which the layers above can be run again.
Suffixes: B rows, H key-value heads, S slots, N head dim, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llama_3.config import ModelConfig
from llama_3.hooks import HookPoint

Slots = slice | tuple[Tensor, Tensor, Tensor]
"""The same slots for all rows, or (row, slot, token) indices of the real tokens of rows of different length."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values, views of the whole: all that a block sees of a cache."""

    keys: Tensor
    """(B, H, S, N), as `values`."""
    values: Tensor

    def write(self, k_BHTN: Tensor, v_BHTN: Tensor, where: Slots) -> None:
        """Store new keys and values. Lengths change only with `KVCache.advance`, after all layers have written."""
        if isinstance(where, slice):
            self.keys[:, :, where] = k_BHTN
            self.values[:, :, where] = v_BHTN
        else:
            row, slot, token = where
            self.keys[row, :, slot] = k_BHTN[row, :, token]
            self.values[row, :, slot] = v_BHTN[row, :, token]


class KVCache:
    """Room for `rows` sequences of up to `capacity` tokens, each at its own length."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert rows >= 1 and capacity >= 1
        self.config, self.capacity = config, capacity
        shape = (config.n_layers, rows, config.n_kv_heads, capacity, config.head_dim)
        # A normal tensor even when made in inference mode, so that it can be written outside of it later.
        with torch.inference_mode(False):
            self._keys = torch.zeros(shape, dtype=dtype, device=device)
            self._values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * rows
        self.kept_at: HookPoint | None = None
        """Where the residual is kept, as it was before any hook there."""
        self._resid_BSD: Tensor | None = None
        self._view()

    def keep(self, point: HookPoint) -> None:
        """Keep, from now on, the residual from which everything that `point` can change is run again: that at `point`
        itself between two blocks, else that at the start of its block."""
        assert not any(self.lengths), "what was read before would be missing"
        self.kept_at = point.entry
        with torch.inference_mode(False):
            self._resid_BSD = torch.zeros(
                self.rows, self.capacity, self.config.d_model, dtype=self.dtype, device=self.device
            )

    def _view(self) -> None:
        """Per-layer views of the rows in use: indexing the big tensor at every token would cost more."""
        with torch.inference_mode(False):
            pairs = zip(self._keys[:, : self.rows].unbind(0), self._values[:, : self.rows].unbind(0), strict=True)
            self.layers = [LayerCache(keys, values) for keys, values in pairs]

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.lengths)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self._keys.dtype

    @property
    def device(self) -> torch.device:
        """Where keys and values lie."""
        return self._keys.device

    def truncate(self, length: int, row: int | None = None) -> None:
        """Forget everything from position `length` on, in one row or in all."""
        assert length >= 0
        for r in range(self.rows) if row is None else (row,):
            self.lengths[r] = min(self.lengths[r], length)

    def fork(self, row: int, rows: int, capacity: int | None = None) -> "KVCache":
        """A new cache of `rows` copies of one row; `capacity` defaults to this cache's."""
        forked = KVCache(self.config, rows, capacity or self.capacity, self.dtype, self.device)
        length = self.lengths[row]
        assert length <= forked.capacity, f"{length} tokens do not fit a capacity of {forked.capacity}"
        forked._keys[:, :, :, :length] = self._keys[:, row : row + 1, :, :length]
        forked._values[:, :, :, :length] = self._values[:, row : row + 1, :, :length]
        if self.kept_at is not None and self._resid_BSD is not None:
            forked.keep(self.kept_at)
            assert forked._resid_BSD is not None
            forked._resid_BSD[:, :length] = self._resid_BSD[row : row + 1, :length]
        forked.lengths = [length] * rows
        return forked

    @classmethod
    def join(cls, caches: "Sequence[KVCache]") -> "KVCache":
        """One cache with the rows of several, which keep the residual at the same point or nowhere."""
        first = caches[0]
        assert len({cache.kept_at for cache in caches}) == 1
        rows, capacity = sum(cache.rows for cache in caches), max(cache.capacity for cache in caches)
        joined = cls(first.config, rows, capacity, first.dtype, first.device)
        if first.kept_at is not None:
            joined.keep(first.kept_at)
        begin = 0
        for cache in caches:
            here, used = slice(begin, begin + cache.rows), max(cache.lengths)
            joined._keys[:, here, :, :used] = cache._keys[:, : cache.rows, :, :used]
            joined._values[:, here, :, :used] = cache._values[:, : cache.rows, :, :used]
            if joined._resid_BSD is not None and cache._resid_BSD is not None:
                joined._resid_BSD[here, :used] = cache._resid_BSD[: cache.rows, :used]
            begin += cache.rows
        joined.lengths = [length for cache in caches for length in cache.lengths]
        return joined

    def append(self, other: "KVCache") -> None:
        """Add the rows of another cache, in the place of some that were dropped."""
        begin, end, used = self.rows, self.rows + other.rows, max(other.lengths, default=0)
        assert end <= self._keys.shape[1] and used <= self.capacity and self.kept_at == other.kept_at
        self._keys[:, begin:end, :, :used] = other._keys[:, : other.rows, :, :used]
        self._values[:, begin:end, :, :used] = other._values[:, : other.rows, :, :used]
        if self._resid_BSD is not None and other._resid_BSD is not None:
            self._resid_BSD[begin:end, :used] = other._resid_BSD[: other.rows, :used]
        self.lengths = [*self.lengths, *other.lengths]
        self._view()

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and drop the others. Rows in ascending order are moved without a copy."""
        rows = list(rows)
        if rows == list(range(self.rows)):
            return
        if all(a < b for a, b in pairwise(rows)):
            used = max((self.lengths[r] for r in rows), default=0)
            for new, old in enumerate(rows):
                if new != old:
                    self._keys[:, new, :, :used] = self._keys[:, old, :, :used]
                    self._values[:, new, :, :used] = self._values[:, old, :, :used]
                    if self._resid_BSD is not None:
                        self._resid_BSD[new, :used] = self._resid_BSD[old, :used]
        else:
            with torch.inference_mode(False):  # the copies are normal tensors too
                self._keys, self._values = self._keys[:, rows], self._values[:, rows]
                self._resid_BSD = None if self._resid_BSD is None else self._resid_BSD[rows]
        self.lengths = [self.lengths[r] for r in rows]
        self._view()

    def write_kept(self, resid_BTD: Tensor, where: Slots) -> None:
        """Store the residual at `kept_at`."""
        assert self._resid_BSD is not None
        if isinstance(where, slice):
            self._resid_BSD[: self.rows, where] = resid_BTD
        else:
            row, slot, token = where
            self._resid_BSD[row, slot] = resid_BTD[row, token]

    def read_kept(self, tokens: int) -> Tensor:
        """The kept residual (B, T, D) of the `tokens` slots from each row's length on, read before and then cut off."""
        assert self._resid_BSD is not None, "no residual is kept: call `keep` before the first token is read"
        if all(length == self.lengths[0] for length in self.lengths):
            return self._resid_BSD[: self.rows, self.lengths[0] : self.lengths[0] + tokens]
        slots_BT = torch.tensor(self.lengths)[:, None] + torch.arange(tokens)
        rows_B1 = torch.arange(self.rows)[:, None]
        slots_BT = slots_BT.clamp(max=self.capacity - 1)
        return self._resid_BSD[rows_B1.to(self.device), slots_BT.to(self.device)]

    def advance(self, counts: Sequence[int]) -> None:
        """Count the tokens just written to each row."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        assert max(self.lengths) <= self.capacity
