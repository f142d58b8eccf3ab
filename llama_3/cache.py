"""Keys and values of tokens already read, allocated once and written in place.

Lengths are Python integers, so asking for them never waits for a device. Slots past a row's length hold stale but
finite numbers and are masked by attention. Suffixes: B rows, H key-value heads, S slots, N head dim.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from llama_3.config import ModelConfig


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
        self._view()

    def _view(self) -> None:
        """Per-layer (B, H, S, N) views of the rows in use: indexing the big tensor at every token would cost more."""
        with torch.inference_mode(False):
            self.keys = list(self._keys[:, : self.rows].unbind(0))
            self.values = list(self._values[:, : self.rows].unbind(0))

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

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._keys.nbytes + self._values.nbytes

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
        forked.lengths = [length] * rows
        return forked

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
        else:
            self._keys, self._values = self._keys[:, rows], self._values[:, rows]
        self.lengths = [self.lengths[r] for r in rows]
        self._view()

    def write(self, layer: int, k_BHTN: Tensor, v_BHTN: Tensor, where: slice | tuple[Tensor, Tensor, Tensor]) -> None:
        """Store new keys and values of one layer.

        `where` is a slice of slots, the same for all rows, or (row, slot, token) indices of the real tokens when rows
        differ in length. Lengths change only with `advance`, after all layers have written.
        """
        if isinstance(where, slice):
            self.keys[layer][:, :, where] = k_BHTN
            self.values[layer][:, :, where] = v_BHTN
        else:
            row, slot, token = where
            self.keys[layer][row, :, slot] = k_BHTN[row, :, token]
            self.values[layer][row, :, slot] = v_BHTN[row, :, token]

    def advance(self, counts: Sequence[int]) -> None:
        """Count the tokens just written to each row."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        assert max(self.lengths) <= self.capacity
