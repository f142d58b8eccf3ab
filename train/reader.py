"""What a trainer reads: rows in a seeded random order, without end, as a pure function of the position in it.

`ShardReader` reads an activations folder, with or without the `plan.json` of `steer preprocess`, or any folder of
[rows, width] files. It never writes. Files are cut into pieces; an epoch shuffles the pieces, takes a group of them
into memory and shuffles the rows of the group, while a thread reads the next group. Nothing needs saving for a resume
but the number of rows read.

A row that is held out is never given by `batch`. Whether it is depends on a hash of its document (in a folder without
documents: of its block of `BLOCK` rows) and of the split's seed, so that a document is held out as a whole and no
other seed or order changes which.

Shapes: B rows of a batch, D width of a row, N rows.
"""

import hashlib
import json
from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from train.errors import TrainError
from train.preprocess import Plan, read_plan
from train.row_files import RowFile, find_row_files
from train.shards import check_shards, read_manifest
from train.text import is_held_out

BLOCK = 256
"""Consecutive rows that are held out together where rows have no documents."""
PIECE_BYTES = 64 << 20
"""A file is read in pieces of at most this size, so that a big one is mixed with others."""


class Source(Protocol):
    """What a trainer reads: a folder, or a model as it runs."""

    @property
    def d_in(self) -> int: ...
    @property
    def hook(self) -> str:
        """Where in the model the rows stood; "" if unknown."""
        ...

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        ...

    @property
    def manifest(self) -> dict[str, Any]:
        """What the data are; goes into the manifest of the SAE."""
        ...

    @property
    def digest(self) -> str:
        """Hash of the data: another one is another sequence of rows for the same seed."""
        ...

    def batch(self, position: int, size: int) -> Tensor:
        """Rows `position` to `position + size` of the endless shuffled sequence, (size, D), float32, unscaled."""
        ...

    def held_out(self, rows: int) -> Tensor | None:
        """Up to `rows` rows that `batch` never gives, (N, D), float32; None where nothing is held out."""
        ...


def open_source(
    folder: Path | str, seed: int, *, held_out: float | None = None, mix_bytes: int = 1 << 30
) -> "ShardReader":
    """The rows of an activations folder or of any folder of [rows, width] .safetensors or .npy files, as a `Source`.

    `held_out` is the share of documents to hold out; by default that of the folder's plan, or none. `mix_bytes` is the
    memory for rows. `TrainError` naming the file that is damaged, or whose rows do not fit the others.
    """
    return ShardReader(folder, seed, held_out=held_out, mix_bytes=mix_bytes)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file."""

    file: RowFile
    start: int
    stop: int
    unit: int
    """number of its first block in the folder"""
    rows: int
    """of them not held out"""


class ShardReader:
    """The rows of a folder as a `Source`; `plan` is what `steer preprocess` found out about them, if it was run."""

    def __init__(
        self,
        folder: Path | str,
        seed: int,
        *,
        held_out: float | None = None,
        split_seed: int = 0,
        mix_bytes: int = 1 << 30,
        use_plan: bool = True,
    ):
        self.folder = Path(folder)
        self.notice: str | None = None
        """what a person should know of the rows before they are used"""
        entries, self._captured = self._open()
        self.plan: Plan | None = read_plan(self.folder) if use_plan else None
        if self.plan:
            self.plan.check_made_from(self.folder, entries, self.d_in)
            if held_out is not None and held_out != self.plan.held_out:
                raise TrainError(
                    f"the plan in {folder} holds out {self.plan.held_out:g} of the documents, not {held_out:g}",
                    "leave the share out, or run steer preprocess again",
                )
            held_out, split_seed, entries = self.plan.held_out, self.plan.seed, list(self.plan.made_from)
        self.share, self.split_seed = held_out or 0.0, split_seed
        if not 0 <= self.share < 1:
            raise TrainError(f"the held-out share is {self.share:g}, but must be at least 0 and less than 1")
        self.made_from = entries
        self.digest = self._digest()
        if self.share:
            self.manifest |= {"held_out": self.share, "split_seed": split_seed}
        self._seed = seed
        self._dtype = reduce(torch.promote_types, (file.dtype for file in self.files))
        self.pieces = self._cut()
        self.rows = sum(piece.rows for piece in self.pieces)
        self.held_out_rows = sum(file.rows for file in self.files) - self.rows
        if not self.rows:
            raise TrainError(f"{folder} has no rows left to train on: all are held out", "hold out a smaller share")
        row_bytes = self.d_in * self._dtype.itemsize
        biggest = max(piece.rows for piece in self.pieces) * row_bytes
        # Where all rows fit they are one group and stay; else two groups share the memory, one read ahead.
        fits = self.rows * row_bytes <= mix_bytes
        self._mix = len(self.pieces) if fits else max(1, mix_bytes // 2 // biggest)
        self._epochs: dict[int, tuple[list[list[int]], list[int]]] = {}
        self._group: tuple[list[int], Tensor] = ([], torch.empty(0, self.d_in))
        self._order: tuple[tuple[int, int], Tensor] = ((-1, -1), torch.empty(0))
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[list[int], Future[Tensor]] | None = None

    def batch(self, position: int, size: int) -> Tensor:
        """Rows `position` to `position + size` of the endless shuffled sequence, (size, D), float32."""
        parts = []
        while size > 0:
            epoch, offset = divmod(position, self.rows)
            groups, ends = self._epoch(epoch)
            number = bisect_right(ends, offset)
            start = offset - (ends[number - 1] if number else 0)
            rows_ND = self._take(epoch, number, groups[number])
            part = rows_ND.index_select(0, self._order[1][start : start + size])
            parts.append(part)
            position, size = position + len(part), size - len(part)
        return torch.cat(parts).float() if len(parts) > 1 else parts[0].float()

    def held_out(self, rows: int) -> Tensor | None:
        """The first `rows` held-out rows in an order that depends on the split alone, (N, D), float32; None if none."""
        if not self.held_out_rows or rows < 1:
            return None
        parts: list[Tensor] = []
        order = torch.randperm(len(self.pieces), generator=_generator("held out", self.split_seed)).tolist()
        for number in order:
            if self.pieces[number].rows < self.pieces[number].stop - self.pieces[number].start:
                parts.append(self.read(self.pieces[number], held_out=True))
                rows -= len(parts[-1])
                if rows <= 0:
                    break
        kept_ND = torch.cat(parts)
        return kept_ND[: len(kept_ND) + min(rows, 0)].float()

    def read(self, piece: Piece, *, held_out: bool = False) -> Tensor:
        """The rows of a piece that are (or are not) held out, (N, D), as stored, in the order of the file."""
        rows_ND = piece.file.read(piece.start, piece.stop)
        chosen_N = torch.arange(piece.start, piece.stop)
        if self.share:
            chosen_N = chosen_N[
                torch.from_numpy(self._held(piece.file, piece.start, piece.stop, piece.unit) == held_out)
            ]
            rows_ND = rows_ND[chosen_N - piece.start]
        # The extremes are NaN where any number is, and cost a hundredth of asking each number.
        if len(rows_ND) and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(rows_ND)):
            bad_N = ~torch.isfinite(rows_ND).all(1)
            first = int(bad_N.nonzero()[0])
            value = float(rows_ND[first][~torch.isfinite(rows_ND[first])][0])
            raise TrainError(
                f"row {int(chosen_N[first])} of {piece.file.path} holds {value}",
                "make the file again, without that row",
            )
        return rows_ND

    def _open(self) -> tuple[list[dict[str, Any]], bool]:
        """Finds the files and what they are: their entries for a plan, and whether they are a capture."""
        if (self.folder / "manifest.json").exists():
            manifest = read_manifest(self.folder)
            check_shards(self.folder, manifest, hashes=False)
            if not manifest["shards"]:
                raise TrainError(f"{self.folder} holds no activations yet", "run steer capture to its end")
            self.d_in, self.hook = int(manifest["d_in"]), str(manifest["hook"])
            self.manifest = {name: value for name, value in manifest.items() if name not in ("shards", "done")}
            if not manifest["done"]:
                asked = manifest.get("max_tokens", 0)
                rows = sum(shard["rows"] for shard in manifest["shards"])
                self.notice = f"the capture in {self.folder} is not finished: {rows:,} of at most {asked:,} rows"
            entries = [
                {name: shard[name] for name in ("name", "rows", "bytes", "sha256")} for shard in manifest["shards"]
            ]
            self.files = [
                RowFile(self.folder / entry["name"], entry["rows"], self.d_in, torch.bfloat16, "rows")
                for entry in entries
            ]
            return entries, True
        self.files = find_row_files(self.folder)
        if not self.files:
            raise TrainError(
                f"{self.folder} holds no activations (no manifest.json, no .safetensors or .npy file)",
                "make some with steer capture",
            )
        self.d_in, self.hook = self.files[0].d_in, ""
        rows = sum(file.rows for file in self.files)
        self.manifest = {"hook": "", "d_in": self.d_in, "files": len(self.files), "rows": rows}
        return [
            {
                "name": file.path.name,
                "rows": file.rows,
                "bytes": file.path.stat().st_size,
                "sample": _sampled_hash(file.path),
            }
            for file in self.files
        ], False

    def _digest(self) -> str:
        """Hash of files, split and plan. Of a foreign file without a plan it takes name, size and 16 samples."""
        if self._captured or self.plan:
            content: list[Any] = [(entry["rows"], entry["sha256"]) for entry in self.made_from]
        else:
            content = [(entry["rows"], entry["bytes"], entry["sample"]) for entry in self.made_from]
        if self.plan or self.share:
            content = [content, self.share, self.split_seed, self.plan and self.plan.scale.mode]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _cut(self) -> list[Piece]:
        pieces, unit = [], 0
        most = max(1, PIECE_BYTES // (self.d_in * self._dtype.itemsize) // BLOCK) * BLOCK
        for file in self.files:
            for start in range(0, file.rows, most):
                stop = min(file.rows, start + most)
                held = int(self._held(file, start, stop, unit).sum()) if self.share else 0
                pieces.append(Piece(file, start, stop, unit, stop - start - held))
                unit += -(-(stop - start) // BLOCK)
        return pieces

    def _held(self, file: RowFile, start: int, stop: int, unit: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Which rows of a piece are held out, (N,)."""
        units_N = file.documents(start, stop).numpy() if self._captured else unit + np.arange(stop - start) // BLOCK
        known, places_N = np.unique(units_N, return_inverse=True)
        return np.array([is_held_out(int(unit), self.share, self.split_seed) for unit in known])[places_N]

    def _epoch(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """The groups of an epoch, each a list of pieces, and where each ends in it."""
        if epoch not in self._epochs:
            order = torch.randperm(len(self.pieces), generator=_generator(self._seed, epoch, 0)).tolist()
            groups = [sorted(order[i : i + self._mix]) for i in range(0, len(order), self._mix)]
            ends = list(accumulate(sum(self.pieces[piece].rows for piece in group) for group in groups))
            self._epochs = {at: plan for at, plan in self._epochs.items() if abs(at - epoch) == 1} | {
                epoch: (groups, ends)
            }
        return self._epochs[epoch]

    def _take(self, epoch: int, number: int, members: list[int]) -> Tensor:
        """The rows of a group, as the files have them; `_order` then is their order."""
        if self._order[0] != (epoch, number):
            if self._group[0] != members:
                self._group = ([], torch.empty(0, self.d_in))  # the old group is freed before another is read
                ahead, self._ahead = self._ahead, None
                rows_ND = ahead[1].result() if ahead and ahead[0] == members else self._load(members)
                self._group = (members, rows_ND)
            order_N = torch.randperm(len(self._group[1]), generator=_generator(self._seed, epoch, number + 1))
            self._order = ((epoch, number), order_N)
            self._read_ahead(epoch, number, members)
        return self._group[1]

    def _read_ahead(self, epoch: int, number: int, members: list[int]) -> None:
        groups = self._epoch(epoch)[0]
        coming = groups[number + 1] if number + 1 < len(groups) else self._epoch(epoch + 1)[0][0]
        if coming != members:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="rows")
            self._ahead = (coming, self._pool.submit(self._load, coming))

    def _load(self, members: list[int]) -> Tensor:
        rows_ND = torch.empty(sum(self.pieces[number].rows for number in members), self.d_in, dtype=self._dtype)
        end = 0
        for number in members:
            part_ND = self.read(self.pieces[number])
            rows_ND[end : end + len(part_ND)] = part_ND
            end += len(part_ND)
        return rows_ND


def _generator(*parts: object) -> torch.Generator:
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _sampled_hash(path: Path) -> str:
    """Hash of 16 pieces of 64 KiB that lie evenly in a file: reading all of it would take as long as an epoch."""
    digest, size, piece = hashlib.sha256(), path.stat().st_size, 1 << 16
    with path.open("rb") as handle:
        for number in range(16):
            handle.seek(max(0, (size - piece) * number // 15))
            digest.update(handle.read(piece))
    return digest.hexdigest()
