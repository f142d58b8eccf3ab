"""Runs a model over text and writes what its residual stream held to shards.

Every token gives one row per hook point, except (unless asked for) the first of a context and special tokens, whose
residuals are unlike all others. The model stops after the last point asked for. Contexts are gathered in pools, sorted
by length and cut into batches, so that little is padded; the batches are a pure function of the text, so that whatever
is missing, after a kill or in a damaged shard, is made again by running just those of its rows, to the same bytes.
While the model runs, a thread writes.

Processes of one capture take the documents whose number modulo their own number is theirs, and write a folder each.

Shapes: B rows of a batch, T tokens, D width of the residual stream, N captured rows.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_3.chat_format import ChatFormat
from llama_3.hooks import SITES, HookPoint, Hooks, Span
from llama_3.model import Transformer
from llama_3.quantize import Int4Linear, QuantizedLinear
from llama_3.tokenizer import Tokenizer
from train.cost import TRIAL_SECONDS, Cost, check_room, duration, estimate, readable, trial
from train.documents import HUB, list_sources
from train.errors import TrainError
from train.lock import only_process
from train.shards import (
    Background,
    Piece,
    ShardWriter,
    own_manifest,
    read_manifest,
    row_bytes,
    sha256_of,
    share_folder,
)
from train.text import Row, TextCounts, TextPlan, default_chat, read_rows

POOL_TOKENS = 1 << 18
"""Tokens gathered before contexts are sorted by length."""
BATCH_TOKENS = 8192
SHARD_BYTES = 32 << 20
NO_TOKEN = "first and special tokens of a context do not count"
_BYTES_PER_TOKEN = {".txt": 8, ".jsonl": 10, ".gz": 4, ".xz": 3, ".parquet": 4}
"""Bytes of a file that surely give a token."""


@dataclass(frozen=True)
class CaptureSummary:
    tokens: int
    """rows on disk for each hook"""
    shards: int
    """over all hooks"""
    bytes: int
    """over all hooks"""


@dataclass(frozen=True)
class Progress:
    """How far one process of a capture is."""

    tokens: int
    """rows on disk for each hook"""
    of: int
    """at most"""
    tokens_per_second: float
    seconds_left: float
    """at most: the text may end before"""

    def __str__(self) -> str:
        if self.tokens >= self.of or not self.tokens_per_second:
            return f"captured {self.tokens:,} tokens"
        left = f"{self.tokens_per_second:,.0f} tokens/s, {duration(self.seconds_left)} left"
        return f"captured {self.tokens:,} of at most {self.of:,} tokens, {left}"


@dataclass(frozen=True)
class Batch:
    """Contexts run together: right-padded tokens, and which of them are captured."""

    tokens_BT: Tensor
    lengths: list[int]
    kept_BT: Tensor
    documents_B: Tensor
    """of the first token of each row"""
    later: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """packed rows: place and number of each document after the first, by row"""

    def documents_at(self, kept_NT: Tensor) -> Tensor:
        """The document of each (row, position), (N,)."""
        documents_N = self.documents_B[kept_NT[:, 0]]
        for row, starts in self.later.items():
            for place, document in starts:
                documents_N[(kept_NT[:, 0] == row) & (kept_NT[:, 1] >= place)] = document
        return documents_N


def batches(
    rows: Iterator[Row], special_ids: Sequence[int], batch_tokens: int, *, keep_special: bool = False
) -> Iterator[Batch]:
    """Batches of similar length of at most `batch_tokens` tokens with padding (one row at least), order fixed."""
    special = torch.tensor(sorted(special_ids), dtype=torch.int64)
    number = 0
    while pool := list(take_tokens(rows, POOL_TOKENS)):
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
                kept_BT[i, 0 if keep_special else 1 : lengths[i]] = True
            if not keep_special:
                kept_BT &= ~torch.isin(tokens_BT, special)
            documents_B = torch.tensor([row.document for row in chosen])
            yield Batch(tokens_BT, lengths, kept_BT, documents_B, {i: r.later for i, r in enumerate(chosen) if r.later})


def parse_points(model: Transformer, hooks: Sequence[str]) -> list[HookPoint]:
    """The points that `hooks` name, each once, in the order of a forward pass; `TrainError` where there is no such."""
    points = sorted({HookPoint.parse(hook) for hook in hooks}, key=lambda point: (point.layer, SITES.index(point.site)))
    for point in points:
        if point.layer >= model.config.n_layers:
            raise TrainError(f"the model has no {point}", f"its layers are 0 to {model.config.n_layers - 1}")
    return points


def run_batch(model: Transformer, batch: Batch, points: Sequence[HookPoint]) -> tuple[list[Tensor], Tensor]:
    """The residuals (N, D) of a batch's captured tokens at each point, on the model's device, and their (row, position)
    (N, 2). `TrainError` naming the first that is not a number."""
    kept_NT = batch.kept_BT.nonzero()
    if not len(kept_NT):
        return [torch.empty(0, point.width(model.config)) for point in points], kept_NT
    row_N, at_N = kept_NT.to(model.device).unbind(1)
    seen: dict[HookPoint, Tensor] = {}
    hooks = Hooks()
    for point in points[:-1]:

        def record(resid_BTD: Tensor, span: Span, point: HookPoint = point) -> Tensor:
            seen[point] = resid_BTD[row_N, at_N]
            return resid_BTD

        hooks.add(point, record)
    with torch.inference_mode():
        tokens_BT = batch.tokens_BT.to(model.device)
        last_BTD = model(tokens_BT, lengths_B=batch.lengths, hooks=hooks, stop_after=points[-1])
        seen[points[-1]] = last_BTD[row_N, at_N]
        for point in points:
            # One sum finds out whether every number is finite; only then is it asked which.
            if not bool(torch.isfinite(seen[point].sum(dtype=torch.float32))):
                _refuse_infinite(seen[point], point, batch, kept_NT)
    return [seen[point] for point in points], kept_NT


def _refuse_infinite(rows_ND: Tensor, point: HookPoint, batch: Batch, kept_NT: Tensor) -> None:
    bad_N = (~torch.isfinite(rows_ND).all(1)).nonzero()
    if len(bad_N):
        at = int(bad_N[0])
        document, position = int(batch.documents_at(kept_NT)[at]), int(kept_NT[at, 1])
        raise TrainError(
            f"{point} holds a number that is not finite in document {document} at position {position} of its context",
            "run the model in another dtype (--dtype bfloat16 or float32)",
        )


@dataclass(frozen=True)
class Job:
    """What is captured from what: all that decides about the rows, but for where they go."""

    model: Transformer
    tokenizer: Tokenizer
    files: Sequence[Path | str]
    plan: TextPlan
    chat: ChatFormat | None
    batch_tokens: int = BATCH_TOKENS
    keep_special: bool = False
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.plan.context > (most := self.model.config.max_context):
            object.__setattr__(self, "plan", TextPlan(**asdict(self.plan) | {"context": most}))

    def batches(self, counts: TextCounts | None = None) -> Iterator[Batch]:
        """The batches of this process's documents, always the same."""
        rows = read_rows(
            self.files, self.tokenizer, self.chat, self.plan, counts, rank=self.rank, world=self.ranks
        )  # fmt: skip
        special = sorted(self.tokenizer.special_ids)
        return batches(rows, special, self.batch_tokens, keep_special=self.keep_special)

    def made_from(self) -> dict[str, Any]:
        """What a manifest tells of this; reads every file, for its hash."""
        return {
            "dtype": precision(self.model),
            "files": [_described(source) for source in list_sources(self.files)],
            "text": asdict(self.plan),
            "keep_special": self.keep_special,
            "batch_tokens": self.batch_tokens,
            "chat_format": self.chat and _name_of(self.chat),
        }


def capture(
    model: Transformer,
    tokenizer: Tokenizer,
    files: Sequence[Path | str],
    out: Path | str,
    hooks: Sequence[str],
    max_tokens: int,
    *,
    plan: TextPlan | None = None,
    keep_special: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    shard_bytes: int = SHARD_BYTES,
    chat: ChatFormat | None = None,
    provenance: dict[str, str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    on_batch: Callable[[], None] | None = None,
    counts: TextCounts | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> CaptureSummary:
    """Captures up to `max_tokens` rows at each hook into `out` (one hook) or `out/HOOK` (several).

    `plan` says how the text is read. Dialogs are written in `chat`, by default as in Llama 3; one that shows the day
    goes on with that on which the capture began. `provenance` (hashes of the model, say) goes into the manifests.
    `on_progress` is called after each shard, `on_notice` with a sentence on each damaged shard that is made again and
    one on the disk that is needed, `on_batch` before each batch; what they raise ends the capture in good order. As
    process `rank` of `ranks` it takes its share of documents and rows, and the summary is of that share.

    Raises `TrainError` if `out` holds a capture of something else or another process captures there, the disk is too
    small or full, an activation is not finite, or the text holds no token to capture. What is listed in a manifest then
    stays, and the same call goes on.
    """
    points = parse_points(model, hooks)
    if not points or max_tokens < ranks or not files:
        raise TrainError("a capture needs at least one file, one hook and, for every process, one token")
    tops = [Path(out) if len(points) == 1 else Path(out) / str(point) for point in points]
    chat = _on_its_day(chat or default_chat(tokenizer), tops[0])
    job = Job(model, tokenizer, files, plan or TextPlan(), chat, batch_tokens, keep_special, rank, ranks)
    made_from = job.made_from() | {"max_tokens": max_tokens, "shard_bytes": shard_bytes} | (provenance or {})
    share = max_tokens // ranks + (rank < max_tokens % ranks)
    with ExitStack() as locks, Background() as background:
        writers = []
        for top, point in zip(tops, points, strict=True):
            what = {"hook": str(point), "d_in": point.width(model.config)} | made_from
            folder, what = share_folder(top, what, rank, ranks)
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(only_process(folder, "captures", "wait for it, or choose another folder"))
            writers.append(ShardWriter(folder, what, share, background))
        for writer in writers:
            for damage in writer.damaged:
                if on_notice:
                    on_notice(f"{damage}: it is made again")
        disk = _check_room(Path(out), writers, job)
        if on_notice and not all(writer.done for writer in writers):
            on_notice(disk)
        if not all(writer.done for writer in writers):
            _fill(job, points, writers, background, share, on_progress, on_batch, counts)
    tokens = min(writer.rows for writer in writers)
    if on_progress:
        on_progress(Progress(tokens, share, 0.0, 0.0))
    if not tokens and ranks == 1:
        raise TrainError(f"{files[0]} holds no token to capture", NO_TOKEN)
    shards = [shard for writer in writers for shard in writer.shards]
    return CaptureSummary(tokens, len(shards), sum(shard["bytes"] for shard in shards))


def _fill(
    job: Job,
    points: list[HookPoint],
    writers: list[ShardWriter],
    background: Background,
    share: int,
    on_progress: Callable[[Progress], None] | None,
    on_batch: Callable[[], None] | None,
    counts: TextCounts | None,
) -> None:
    """Runs the batches of which rows are missing, and hands these to the writers."""
    number, made, began = -1, 0, time.monotonic()
    listed = [len(writer.shards) for writer in writers]
    missing = min(writer.missing for writer in writers)
    for number, batch in enumerate(job.batches(counts)):
        background.check()
        if on_batch:
            on_batch()
        wanting = [i for i, writer in enumerate(writers) if writer.wants(number)]
        if wanting:
            rows, kept_NT = run_batch(job.model, batch, [points[i] for i in wanting])
            documents_N = batch.documents_at(kept_NT)
            tokens_N = batch.tokens_BT[kept_NT[:, 0], kept_NT[:, 1]]
            for i, rows_ND in zip(wanting, rows, strict=True):
                piece: Piece = (rows_ND, documents_N, kept_NT[:, 1], tokens_N)
                writers[i].add(number, piece)
            made += len(kept_NT)
        if on_progress and listed != (now := [len(writer.shards) for writer in writers]):
            listed, rate = now, made / max(time.monotonic() - began, 1e-9)
            left = max(0, missing - made) / max(rate, 1e-9)
            on_progress(Progress(min(writer.rows for writer in writers), share, rate, left))
        if all(writer.done for writer in writers):
            break
    for writer in writers:
        writer.finish(number + 1)


def summarise(out: Path | str, hooks: Sequence[str]) -> CaptureSummary:
    """The summary of what all processes have written to `out`."""
    points = sorted({str(HookPoint.parse(hook)) for hook in hooks})
    manifests = [read_manifest(Path(out) / point if len(points) > 1 else out) for point in points]
    shards = [shard for manifest in manifests for shard in manifest["shards"]]
    tokens = min(sum(shard["rows"] for shard in manifest["shards"]) for manifest in manifests)
    if not tokens:
        raise TrainError(f"the text holds no token to capture into {out}", NO_TOKEN)
    return CaptureSummary(tokens, len(shards), sum(shard["bytes"] for shard in shards))


def capture_cost(
    job: Job,
    hooks: Sequence[str],
    max_tokens: int,
    *,
    processes: int = 1,
    price_per_hour: float | None = None,
    seconds: float = TRIAL_SECONDS,
) -> Cost:
    """What a capture of `max_tokens` will cost, from the first batches run for some seconds; nothing is written.

    Rows of a text that is read to its end in as many seconds again are counted, else it is taken to hold enough.
    """
    points, kept = parse_points(job.model, hooks), 0
    stream = job.batches()

    def work() -> int:
        nonlocal kept
        batch = next((batch for batch in stream if bool(batch.kept_BT.any())), None)
        if batch is None:
            return 0
        rows, _ = run_batch(job.model, batch, points)
        for rows_ND in rows:
            rows_ND.bfloat16().cpu()
        kept += len(rows[0])
        return len(rows[0])

    rate, memory = trial(work, seconds)
    until = time.monotonic() + seconds
    while kept < max_tokens and time.monotonic() < until and (batch := next(stream, None)) is not None:
        kept += int(batch.kept_BT.sum())
    if not kept:
        raise TrainError(f"{job.files[0]} holds no token to capture", NO_TOKEN)
    tokens = max_tokens if time.monotonic() >= until else min(kept, max_tokens)
    disk = tokens * sum(row_bytes(point.width(job.model.config)) for point in points)
    return estimate(
        tokens, rate, disk_bytes=disk, memory_bytes=memory, processes=processes, price_per_hour=price_per_hour
    )


def _check_room(out: Path, writers: list[ShardWriter], job: Job) -> str:
    """What will be written at most, in a sentence. `TrainError` where the disk clearly cannot hold what is missing."""
    text, ranks, needed, most = fewest_tokens(job.files), job.ranks, 0, 0
    if text and (job.plan.dedupe or job.plan.part == "held-out" or job.plan.long == "drop"):
        text = 0  # nobody knows how much of it is left out
    for writer in writers:
        rows = writer.missing if text is None else min(writer.missing, max(0, text // ranks - writer.rows))
        needed += rows * row_bytes(int(writer.manifest["d_in"]))
        most += writer.missing * row_bytes(int(writer.manifest["d_in"]))
    free = check_room(out, needed, "capture fewer tokens with --max-tokens, or choose a folder on another disk")
    return f"{out} takes at most {readable(most * ranks)} of disk more; {readable(free)} are free"


def fewest_tokens(files: Sequence[Path | str]) -> int | None:
    """Tokens that the files hold at least, by their sizes; None where a source has no size."""
    sources = list_sources(files)
    if any(str(source).startswith(HUB) for source in sources):
        return None
    return sum(Path(file).stat().st_size // _BYTES_PER_TOKEN[Path(file).suffix.lower()] for file in sources)


def precision(model: Transformer) -> str:
    """The numbers that the model computes with, as `bfloat16` or `bfloat16, int8 from block 4`."""
    dtype = str(model.dtype).removeprefix("torch.")
    for layer, block in enumerate(model.blocks):
        if kinds := [type(part) for part in block.modules() if isinstance(part, QuantizedLinear)]:
            scheme = "int4" if any(issubclass(kind, Int4Linear) for kind in kinds) else "int8"
            return f"{dtype}, {scheme} from block {layer}"
    return dtype


def _name_of(chat: ChatFormat) -> str:
    return chat.name + (f" of {chat.date}" if chat.date else "")


def _on_its_day(chat: ChatFormat | None, folder: Path) -> ChatFormat | None:
    """A format that shows the clock's date goes on with that on which the capture in `folder` began."""
    if chat is None or not chat.of_today or not (folder / "manifest.json").exists():
        return chat
    name, _, date = str(own_manifest(folder).get("chat_format")).partition(" of ")
    return chat.on(date) if name == chat.name and date else chat


def take_tokens(rows: Iterator[Row], tokens: int) -> Iterator[Row]:
    """The next rows, until they hold so many tokens."""
    while tokens > 0 and (row := next(rows, None)) is not None:
        tokens -= len(row.tokens)
        yield row


def _described(source: Path | str) -> dict[str, str | None]:
    """Name and hash; a dataset on the hub has only a name, with a revision where one was given."""
    if str(source).startswith(HUB):
        return {"name": str(source), "sha256": None}
    return {"name": Path(source).name, "sha256": sha256_of(source)}
