"""Activations as the model makes them, with no disk: a `Source` for the trainer (`train/reader.py`).

Rows in the order of the text, epoch after epoch without end, fill a block; the block is shuffled and served, then the
next. A row is what a shard would hold: rounded to bfloat16. Blocks are numbered, and each is a pure function of text,
plan and seed, so a resume needs nothing but the position: batches before it are passed over by counting their
kept tokens, which costs their tokenising and no forward pass.

Shapes: B rows of a batch, D width of the residual stream, N rows of a block.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from train.capture import NO_TOKEN, Batch, Job, parse_points, run_batch
from train.errors import TrainError

ENDLESS = 1 << 40
"""Rows of an epoch where nobody has counted them."""


class StreamSource:
    """The residuals of a job at one hook, shuffled within blocks of `mix_bytes` / 2, two of which may be in memory.

    Of a plan that holds documents out, the others are served. With a `shuffle` in the plan each epoch has an order of
    its own. `rows` is what one epoch holds, if that is known; it decides about nothing here. `ahead` runs the model for
    the next block in a thread while this one is served; by default on a card: on a CPU of two
    cores both want the same ones, and it took 1.4 times as long.
    Raises `TrainError` for a hook that is not there, and from `batch` for a text without tokens to keep.
    """

    def __init__(
        self,
        job: Job,
        hook: str,
        seed: int,
        *,
        rows: int = ENDLESS,
        mix_bytes: int = 1 << 30,
        provenance: dict[str, str] | None = None,
        ahead: bool | None = None,
    ):
        if job.plan.part == "held-out":
            raise TrainError("a plan of the held-out part leaves nothing to train on", "use the part train")
        share = job.plan.held_out
        self._job = replace(job, plan=replace(job.plan, part="train")) if share else job
        self._points = parse_points(job.model, [hook])
        self.hook, self.d_in = str(self._points[0]), self._points[0].width(job.model.config)
        self.rows, self._seed = rows, seed
        self.block_rows = max(1, mix_bytes // 2 // (2 * self.d_in))
        self.manifest: dict[str, Any] = {"hook": self.hook, "d_in": self.d_in, "streamed": True}
        self.manifest |= self._job.made_from() | {"block_rows": self.block_rows} | (provenance or {})
        self.digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()
        self._ahead = job.model.device.type != "cpu" if ahead is None else ahead
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._coming: tuple[int, Future[Tensor]] | None = None
        self._block: tuple[int, Tensor] = (-1, torch.empty(0, self.d_in))
        self._stream: Iterator[Batch] | None = None
        self._next = 0
        """number, in the endless text, of the first row of the next batch"""
        self._left_ND = torch.empty(0, self.d_in, dtype=torch.bfloat16)
        """rows before it that no block has taken yet"""

    def batch(self, position: int, size: int) -> Tensor:
        """Rows `position` to `position + size` of the endless sequence, (size, D), float32; a function of these alone.

        Going on is cheap; going back reads the text from its beginning.
        """
        parts = []
        while size > 0:
            number, start = divmod(position, self.block_rows)
            part = self._take(number)[start : start + size]
            parts.append(part)
            position, size = position + len(part), size - len(part)
        return torch.cat(parts).float() if len(parts) > 1 else parts[0].float()

    def held_out(self, rows: int) -> Tensor | None:
        """The first `rows` rows of the held-out documents, (N, D), float32; None where nothing is held out."""
        if not self._job.plan.held_out or rows < 1:
            return None
        parts: list[Tensor] = []
        for batch in replace(self._job, plan=replace(self._job.plan, part="held-out")).batches():
            parts.append(self._run(batch)[:rows])
            rows -= len(parts[-1])
            if rows <= 0:
                break
        kept_ND = torch.cat([torch.empty(0, self.d_in), *parts])
        return kept_ND.float() if len(kept_ND) else None

    def close(self) -> None:
        """Ends the thread, after the block it is at."""
        self._worker.shutdown(cancel_futures=True)

    def _take(self, number: int) -> Tensor:
        """The rows of a block in the order in which they are served, (N, D), bfloat16."""
        if self._block[0] != number:
            self._block = (-1, torch.empty(0, self.d_in))  # freed before the next one is made
            coming, self._coming = self._coming, None
            # Blocks are made on the one thread even when nobody runs ahead: what they go on from is touched there only.
            made = coming[1] if coming and coming[0] == number else self._worker.submit(self._make, number)
            self._block = (number, made.result())
            if self._ahead:
                self._coming = (number + 1, self._worker.submit(self._make, number + 1))
        return self._block[1]

    def _make(self, number: int) -> Tensor:
        start = number * self.block_rows
        if self._stream is None or start < self._next - len(self._left_ND):
            self._stream, self._next, self._left_ND = self._endless(), 0, self._left_ND[:0]
        rows_ND = torch.empty(self.block_rows, self.d_in, dtype=torch.bfloat16)
        fresh_ND = self._left_ND[max(0, start - self._next + len(self._left_ND)) :]
        filled = 0
        while True:
            part_ND = fresh_ND[: self.block_rows - filled]
            rows_ND[filled : filled + len(part_ND)] = part_ND
            filled, self._left_ND = filled + len(part_ND), fresh_ND[len(part_ND) :].clone()
            if filled == self.block_rows:
                break
            batch = next(self._stream)
            first, self._next = self._next, self._next + int(batch.kept_BT.sum())
            fresh_ND = self._run(batch)[max(0, start - first) :] if self._next > start else rows_ND[:0]
        digest = hashlib.sha256(f"{self._seed} {number}".encode()).digest()
        order = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return rows_ND[torch.randperm(self.block_rows, generator=order)]

    def _run(self, batch: Batch) -> Tensor:
        return run_batch(self._job.model, batch, self._points)[0][0].bfloat16().cpu()

    def _endless(self) -> Iterator[Batch]:
        """The batches of one epoch after the other."""
        plan, epoch = self._job.plan, 0
        while True:
            kept = 0
            order = plan if plan.shuffle is None else replace(plan, shuffle=plan.shuffle + epoch)
            for batch in replace(self._job, plan=order).batches():
                kept += int(batch.kept_BT.sum())
                yield batch
            if not kept:
                raise TrainError(f"{self._job.files[0]} holds no token to capture", NO_TOKEN)
            epoch += 1
