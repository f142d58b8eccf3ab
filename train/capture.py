"""Runs a model over text and writes what its residual stream held to shards.

Every token gives one row per hook point, except the first of a context and special tokens, whose residuals are unlike
all others. The model stops after the last point asked for. Contexts are gathered in pools, sorted by length and cut
into batches, so that little is padded; the order is the same in every run of the same call. A killed capture goes on
after its last complete shard, and leaves the bytes an unbroken one would have left.

Shapes: B rows of a batch, T tokens, D width of the residual stream, N captured rows.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_3.chat_format import ChatFormat
from llama_3.hooks import SITES, HookPoint, Hooks, Span
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from train.errors import TrainError
from train.shards import FORMAT, VERSION, check_shards, read_manifest, sha256_of, write_json, write_shard
from train.text import Row, default_chat, read_rows

POOL_TOKENS = 1 << 18
"""Tokens gathered before contexts are sorted by length."""


@dataclass(frozen=True)
class CaptureSummary:
    tokens: int
    """rows on disk for each hook"""
    shards: int
    """over all hooks"""
    bytes: int
    """over all hooks"""


@dataclass(frozen=True)
class Batch:
    """Contexts run together: right-padded tokens, and which of them are captured."""

    tokens_BT: Tensor
    lengths: list[int]
    kept_BT: Tensor
    documents_B: Tensor


def batches(rows: Iterator[Row], special_ids: Sequence[int], batch_tokens: int) -> Iterator[Batch]:
    """Batches of similar length of at most `batch_tokens` tokens with padding (one row at least), order fixed."""
    special = torch.tensor(sorted(special_ids), dtype=torch.int64)
    number = 0
    while pool := list(_take_tokens(rows, POOL_TOKENS)):
        pool.sort(key=lambda row: len(row.tokens))
        cut: list[list[Row]] = [[]]
        for row in pool:
            if cut[-1] and (len(cut[-1]) + 1) * len(row.tokens) > batch_tokens:
                cut.append([])
            cut[-1].append(row)
        random.Random(number).shuffle(cut)  # else a capture that stops early would hold the short documents of a pool
        number += 1
        for chosen in cut:
            lengths = [len(row.tokens) for row in chosen]
            tokens_BT = torch.zeros(len(chosen), max(lengths), dtype=torch.int64)
            kept_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
            for i, row in enumerate(chosen):
                tokens_BT[i, : lengths[i]] = torch.tensor(row.tokens)
                kept_BT[i, 1 : lengths[i]] = True
            kept_BT &= ~torch.isin(tokens_BT, special)
            yield Batch(tokens_BT, lengths, kept_BT, torch.tensor([row.document for row in chosen]))


def capture(
    model: Transformer,
    tokenizer: Tokenizer,
    files: Sequence[Path | str],
    out: Path | str,
    hooks: Sequence[str],
    max_tokens: int,
    *,
    context: int = 512,
    batch_tokens: int = 8192,
    shard_bytes: int = 32 << 20,
    chat: ChatFormat | None = None,
    provenance: dict[str, str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CaptureSummary:
    """Captures up to `max_tokens` rows at each hook into `out` (one hook) or `out/HOOK` (several).

    Dialogs are written in `chat`, by default as in Llama 3; one that shows the day goes on with that on which the
    capture began. `provenance` (hashes of the model, say) goes into the
    manifests. `on_progress(tokens, max_tokens)` is called after each shard. Raises `TrainError` if `out` holds a
    capture of something else, or the text holds no captured token.
    """
    points = sorted({HookPoint.parse(hook) for hook in hooks}, key=lambda point: (point.layer, SITES.index(point.site)))
    if not points or max_tokens < 1 or not files:
        raise TrainError("a capture needs at least one file, one hook and one token")
    for point in points:
        if point.layer >= model.config.n_layers:
            raise TrainError(f"the model has no {point}", f"its layers are 0 to {model.config.n_layers - 1}")
    folders = [Path(out) if len(points) == 1 else Path(out) / str(point) for point in points]
    context, chat = min(context, model.config.max_context), _on_its_day(chat or default_chat(tokenizer), folders[0])
    made_from = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "files": [{"name": Path(file).name, "sha256": _hash_of(file)} for file in files],
        "max_tokens": max_tokens,
        "context": context,
        "batch_tokens": batch_tokens,
        "shard_bytes": shard_bytes,
        "chat_format": chat and _name_of(chat),
    } | (provenance or {})
    writers = [
        _Writer(folder, {"hook": str(point), "d_in": point.width(model.config)} | made_from)
        for folder, point in zip(folders, points, strict=True)
    ]
    if not all(writer.done for writer in writers):
        rows = read_rows(files, tokenizer, chat, context)
        stream = batches(rows, sorted(tokenizer.special_ids), batch_tokens)
        start = min(writer.batches for writer in writers)
        number = start
        for number, batch in enumerate(islice(stream, start, None), start):
            kept_NT = batch.kept_BT.nonzero()
            for writer, resid_BTD in zip(writers, _residuals(model, batch, points), strict=True):
                writer.add(number, resid_BTD[kept_NT[:, 0], kept_NT[:, 1]], batch, kept_NT)
            if on_progress and any(writer.fresh for writer in writers):
                on_progress(min(writer.rows for writer in writers), max_tokens)
            if all(writer.done for writer in writers):
                break
        for writer in writers:
            writer.finish(number + 1)
        if on_progress:
            on_progress(min(writer.rows for writer in writers), max_tokens)
    tokens = min(writer.rows for writer in writers)
    if not tokens:
        raise TrainError(f"{files[0]} holds no token to capture", "first and special tokens of a context do not count")
    shards = [shard for writer in writers for shard in writer.manifest["shards"]]
    return CaptureSummary(tokens, len(shards), sum(shard["bytes"] for shard in shards))


class _Writer:
    """One activations folder as it grows: rows wait in memory until they fill a shard."""

    def __init__(self, folder: Path, made_from: dict[str, Any]):
        self.folder, self._limit = folder, int(made_from["max_tokens"])
        self._per_shard = max(1, int(made_from["shard_bytes"]) // (2 * int(made_from["d_in"])))
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._waiting_rows = 0
        self.fresh = False
        """whether the last `add` wrote a shard"""
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "manifest.json").exists():
            self.manifest = read_manifest(folder)
            self.manifest.setdefault("chat_format", "llama-3")  # the only one when none was recorded
            for name, value in made_from.items():
                if self.manifest.get(name) != value:
                    raise TrainError(
                        f"{folder} holds a capture with {name} = {self.manifest.get(name)!r}, not {value!r}",
                        "use another folder, or repeat the call it was made with",
                    )
            self._drop_damaged()
        else:
            self.manifest = {"format": FORMAT, "version": VERSION} | made_from | {"shards": [], "done": False}
            write_json(folder / "manifest.json", self.manifest)

    @property
    def rows(self) -> int:
        """Rows on disk."""
        return sum(shard["rows"] for shard in self.manifest["shards"])

    @property
    def batches(self) -> int:
        """Batches whose rows are all on disk."""
        shards = self.manifest["shards"]
        return int(shards[-1]["batches"]) if shards else 0

    @property
    def done(self) -> bool:
        return bool(self.manifest["done"])

    def add(self, number: int, rows_ND: Tensor, batch: Batch, kept_NT: Tensor) -> None:
        """Takes the rows of batch `number`, unless they are already on disk."""
        self.fresh = False
        if self.done or number < self.batches:
            return
        rows_ND = rows_ND[: self._limit - self.rows - self._waiting_rows].bfloat16().cpu()
        kept_NT = kept_NT[: len(rows_ND)]
        tokens_N = batch.tokens_BT[kept_NT[:, 0], kept_NT[:, 1]]
        self._waiting.append((rows_ND, tokens_N, batch.documents_B[kept_NT[:, 0]], kept_NT[:, 1]))
        self._waiting_rows += len(rows_ND)
        full = self.rows + self._waiting_rows >= self._limit
        if full or self._waiting_rows >= self._per_shard:
            self._flush(number + 1, done=full)

    def finish(self, batches_read: int) -> None:
        """Writes what is left once the text is at its end."""
        if not self.done:
            self._flush(batches_read, done=True)

    def _flush(self, batches_read: int, *, done: bool) -> None:
        if self._waiting_rows:
            columns = [torch.cat(column) for column in zip(*self._waiting, strict=True)]
            shard = write_shard(self.folder, len(self.manifest["shards"]), *columns)
            self.manifest["shards"].append(shard | {"batches": batches_read})
        self._waiting, self._waiting_rows, self.fresh = [], 0, True
        self.manifest["done"] = done
        write_json(self.folder / "manifest.json", self.manifest)

    def _drop_damaged(self) -> None:
        """Forgets the shards from the first damaged one on, so that they are made again."""
        for number in range(len(self.manifest["shards"])):
            try:
                check_shards(self.folder, {"shards": self.manifest["shards"][number : number + 1]}, hashes=True)
            except TrainError:
                del self.manifest["shards"][number:]
                self.manifest["done"] = False
                write_json(self.folder / "manifest.json", self.manifest)
                return


def _residuals(model: Transformer, batch: Batch, points: list[HookPoint]) -> list[Tensor]:
    """The residual stream (B, T, D) at each point."""
    seen: dict[HookPoint, Tensor] = {}
    hooks = Hooks()
    for point in points[:-1]:

        def record(resid_BTD: Tensor, span: Span, point: HookPoint = point) -> Tensor:
            seen[point] = resid_BTD
            return resid_BTD

        hooks.add(point, record)
    with torch.inference_mode():
        tokens_BT = batch.tokens_BT.to(model.device)
        last_BTD = model(tokens_BT, lengths_B=batch.lengths, hooks=hooks, stop_after=points[-1])
    return [seen[point] for point in points[:-1]] + [last_BTD]


def _name_of(chat: ChatFormat) -> str:
    return chat.name + (f" of {chat.date}" if chat.date else "")


def _on_its_day(chat: ChatFormat | None, folder: Path) -> ChatFormat | None:
    """A format that shows the clock's date goes on with that on which the capture in `folder` began."""
    if chat is None or not chat.of_today or not (folder / "manifest.json").exists():
        return chat
    name, _, date = str(read_manifest(folder).get("chat_format")).partition(" of ")
    return chat.on(date) if name == chat.name and date else chat


def _take_tokens(rows: Iterator[Row], tokens: int) -> Iterator[Row]:
    while tokens > 0 and (row := next(rows, None)) is not None:
        tokens -= len(row.tokens)
        yield row


def _hash_of(file: Path | str) -> str:
    if not os.path.isfile(file):
        raise TrainError(f"there is no text file {file}")
    return sha256_of(file)
