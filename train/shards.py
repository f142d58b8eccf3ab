"""Captured activations on disk: numbered safetensors shards and a `manifest.json` that lists them with their hashes.

A shard holds, for each row, the activation in bfloat16, the token id, the document and the position in its context.
Shards are written under a temporary name and moved into place, then the manifest is; a shard that the manifest does not
list does not exist. An entry says which batches of the text its rows come from, so that one damaged shard is made again
alone. Processes that share a capture write a folder `rank-NN` each, with a manifest of its own, and never wait for one
another; `read_manifest` puts them together.

Shapes: N rows, D width of the residual stream, B rows of a batch.
"""

import hashlib
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.errors import TrainError

FORMAT, VERSION = "steer-activations", 1
AGAIN = "run the same steer capture again: it makes the damaged shard anew"
COLUMNS = ("documents", "positions", "tokens")
"""What a shard holds beside its `rows`: int32, one number for each."""
Piece = tuple[Tensor, Tensor, Tensor, Tensor]
"""Rows (N, D) in bfloat16 with their documents, positions and tokens (N)."""


def sha256_of(file: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes `content` atomically. `TrainError` naming the file where the disk does not take it."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        hint = "make room there and run the same command again: what was written before is kept"
        raise TrainError(f"{file} cannot be written: {error.strerror or error}", hint) from error


def row_bytes(d_in: int) -> int:
    """What a row takes on disk."""
    return 2 * d_in + 4 * len(COLUMNS)


def write_shard(
    folder: Path, number: int, rows_ND: Tensor, tokens_N: Tensor, docs_N: Tensor, positions_N: Tensor
) -> dict[str, Any]:
    """Writes shard `number` and returns its entry for the manifest."""
    return write_pieces(folder, number, [(rows_ND.bfloat16(), docs_N.int(), positions_N.int(), tokens_N.int())])


def write_pieces(folder: Path, number: int, pieces: list[Piece]) -> dict[str, Any]:
    """As `write_shard`, for rows that lie in several pieces: each goes to the file from where it is, hashed on its way.

    Raises `TrainError` when the disk takes no more; what was written before stays as it was.
    """
    name = f"{number:06d}.safetensors"
    temporary, digest, size = folder / (name + ".tmp"), hashlib.sha256(), 0
    try:
        with temporary.open("wb") as file:
            for part in _safetensors(pieces):
                digest.update(part)
                file.write(part)
                size += len(part)
        os.replace(temporary, folder / name)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = error.strerror or str(error)
        hint = "make room and run the same steer capture again: it goes on where this one stopped"
        raise TrainError(f"shard {folder / name} cannot be written: {why}", hint) from error
    rows = sum(len(piece[0]) for piece in pieces)
    return {"name": name, "rows": rows, "bytes": size, "sha256": digest.hexdigest()}


def _safetensors(pieces: list[Piece]) -> Iterator[bytes | memoryview]:
    """The bytes of a shard as safetensors lays them out: wider types first, then by name."""
    rows, d_in = sum(len(piece[0]) for piece in pieces), pieces[0][0].shape[1]
    header, offset = {}, 0
    for name, kind, shape in (*((name, "I32", [rows]) for name in COLUMNS), ("rows", "BF16", [rows, d_in])):
        end = offset + (4 * rows if kind == "I32" else 2 * rows * d_in)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for column in (1, 2, 3, 0):
        for piece in pieces:
            bytes_N: np.ndarray[Any, Any] = piece[column].contiguous().flatten().view(torch.uint8).numpy()
            yield bytes_N.data


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of an activations folder, that of several processes put together into one.

    Raises `TrainError` if it is missing or not ours.
    """
    folder = Path(folder)
    manifest = own_manifest(folder)
    if "ranks" not in manifest or "rank" in manifest:
        return manifest
    ranks = manifest["ranks"]
    if not isinstance(ranks, int) or not 1 < ranks < 1 << 16:
        raise TrainError(f"{folder / 'manifest.json'} is damaged: it was made by {ranks!r} processes")
    parts = [(f"rank-{rank:02}", own_manifest(folder / f"rank-{rank:02}")) for rank in range(ranks)]
    alike = {key: value for key, value in manifest.items() if key not in ("shards", "done")}
    for name, part in parts:
        if any(part.get(key) != value for key, value in alike.items()):
            raise TrainError(f"{folder / name} holds another capture than the rest of {folder}")
    shards = [shard | {"name": f"{name}/{shard['name']}"} for name, part in parts for shard in part["shards"]]
    return alike | {"shards": shards, "done": all(part.get("done") for _, part in parts)}


def share_folder(folder: Path, made_from: dict[str, Any], rank: int, ranks: int) -> tuple[Path, dict[str, Any]]:
    """Where process `rank` of `ranks` writes, and what its manifest tells beside `made_from`.

    The first process leaves a manifest without shards in `folder`, which says that there are others below it.
    """
    if ranks == 1:
        return folder, made_from
    made_from = made_from | {"ranks": ranks}
    if rank == 0:
        _begin(folder, made_from)
    return folder / f"rank-{rank:02}", made_from | {"rank": rank}


def _begin(folder: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder that holds this capture or is new. `TrainError` if it holds another."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "manifest.json").exists():
        manifest = {"format": FORMAT, "version": VERSION} | made_from | {"shards": [], "done": False}
        write_json(folder / "manifest.json", manifest)
        return manifest
    manifest = own_manifest(folder)
    if "text" not in manifest and isinstance(text := made_from.get("text"), dict):  # made before there were plans
        defaults = {"unit": "context", "bos": True, "shuffle": None, "dedupe": False, "part": "all"}
        manifest["text"] = text | defaults | {"context": manifest.pop("context", None)}
    manifest.setdefault("chat_format", "llama-3")
    manifest.setdefault("keep_special", False)
    for name in ("ranks", *made_from):
        if (found := manifest.get(name)) != (value := made_from.get(name)):
            name, found, value = _difference(name, found, value)
            raise TrainError(
                f"{folder} holds a capture with {name} = {found!r}, not {value!r}",
                "use another folder, or repeat the call it was made with",
            )
    return manifest


def _difference(name: str, found: Any, value: Any) -> tuple[str, Any, Any]:
    """What differs, in what is itself named values too: the first of these."""
    if isinstance(found, dict) and isinstance(value, dict):
        name = next(key for key in value if found.get(key) != value[key])
        return name, found.get(name), value[name]
    if name == "files":
        was, now = ({entry["name"]: str(entry["sha256"])[:12] for entry in files} for files in (found or [], value))
        changed = next((file for file in now if file in was and was[file] != now[file]), None)
        return (f"the hash of {changed}", was[changed], now[changed]) if changed else (name, [*was], [*now])
    return name, found, value


def own_manifest(folder: Path) -> dict[str, Any]:
    """The manifest that lies in a folder; of several processes, what they have in common. Errors as `read_manifest`."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrainError(f"{folder} holds no activations (no manifest.json)", "make some with steer capture") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TrainError(f"{file} is not readable JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TrainError(f"{file} is not the manifest of captured activations")
    if manifest.get("version") != VERSION:
        raise TrainError(f"{file} has format version {manifest.get('version')!r}; this program reads version {VERSION}")
    shards = manifest.get("shards")
    whole = isinstance(manifest.get("hook"), str) and isinstance(manifest.get("d_in"), int) and manifest["d_in"] > 0
    if not (whole and isinstance(shards, list) and all(map(_is_entry, shards))):
        raise TrainError(f"{file} is damaged: it does not say what its shards hold", "capture again in another folder")
    return manifest


def _is_entry(shard: Any) -> bool:
    """Whether `shard` is an entry that `write_shard` could have made; its file lies in the folder itself."""
    if not isinstance(shard, dict) or not isinstance(shard.get("sha256"), str):
        return False
    counts, name = (shard.get("rows"), shard.get("bytes")), shard.get("name")
    return all(isinstance(n, int) and n > 0 for n in counts) and isinstance(name, str) and name == Path(name).name


def shard_fault(folder: Path | str, shard: dict[str, Any], d_in: int, *, hashes: bool) -> str | None:
    """What is wrong with the file of an entry: missing, of another size or shape, with `hashes` of another content."""
    file = Path(folder) / shard["name"]
    if not file.is_file():
        return "is missing"
    if (size := file.stat().st_size) != shard["bytes"]:
        return f"has {size} bytes instead of {shard['bytes']}"
    try:
        with safe_open(file, framework="pt") as stored:
            shape = tuple(stored.get_slice("rows").get_shape())
    except (SafetensorError, OSError) as error:
        return f"is damaged ({error})"
    if shape != (shard["rows"], d_in):
        return f"has rows of shape {shape}, not {(shard['rows'], d_in)}"
    return "does not match its hash" if hashes and sha256_of(file) != shard["sha256"] else None


def check_shards(folder: Path | str, manifest: dict[str, Any], *, hashes: bool) -> None:
    """Raises `TrainError` naming the first shard that is not what its entry says (with `hashes`: to the last byte)."""
    for shard in manifest["shards"]:
        if fault := shard_fault(folder, shard, manifest["d_in"], hashes=hashes):
            raise TrainError(f"shard {Path(folder) / shard['name']} {fault}", AGAIN)


class Background:
    """A thread that does what it is given, one thing after another, at most `waiting` of them pending.

    What goes wrong there is raised here, by the next `give` or at the end, and nothing further is done. When the block
    ends, by an error too, what was given before is done first.
    """

    def __init__(self, waiting: int = 2):
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="shards", daemon=True)

    def give(self, job: Callable[[], None]) -> None:
        """Has `job` done later; waits while too many are pending."""
        self.check()
        self._jobs.put(job)

    def check(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:
                    self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._jobs.put(None)
        self._thread.join()
        if kind is None:
            self.check()


@dataclass
class _Gap:
    """Rows that a folder lacks: those of batches `first` to `end`, or of all that follow."""

    index: int
    """of the shard"""
    first: int
    end: int | None
    rows: int
    """at most"""


class ShardWriter:
    """One activations folder as it grows. Rows wait in memory until they fill a shard, which the background writes.

    A folder that holds a part of this capture already is gone on with: `wants` says of which batches rows are missing,
    in damaged shards or at the end. Raises `TrainError` if the folder holds something else.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], rows: int, background: Background):
        self.folder, self._background = folder, background
        self._per_shard = max(1, int(made_from["shard_bytes"]) // (2 * int(made_from["d_in"])))
        self._waiting: list[Piece] = []
        self._waiting_rows = 0
        self.manifest = _begin(folder, made_from)
        self.damaged: list[str] = []
        """What was wrong with shards that are made again, one sentence each."""
        self._gaps = deque(self._find_gaps(rows))

    @property
    def rows(self) -> int:
        """Rows on disk."""
        return sum(shard["rows"] for shard in self.manifest["shards"])

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Entries of the shards on disk."""
        return list(self.manifest["shards"])

    @property
    def missing(self) -> int:
        """The most rows that are still to be written."""
        shards = self.manifest["shards"]
        return sum(gap.rows if gap.end is None else shards[gap.index]["rows"] for gap in self._gaps)

    @property
    def done(self) -> bool:
        return not self._gaps

    def wants(self, number: int) -> bool:
        """Whether rows of batch `number` are missing."""
        return bool(self._gaps) and self._gaps[0].first <= number

    def add(self, number: int, piece: Piece) -> None:
        """Takes the rows of batch `number`, which it wants; batches come in order."""
        gap = self._gaps[0]
        rows = gap.rows - self._waiting_rows
        rows_ND = piece[0][:rows].bfloat16().cpu()
        self._waiting.append((rows_ND, piece[1][:rows].int(), piece[2][:rows].int(), piece[3][:rows].int()))
        self._waiting_rows += len(rows_ND)
        full = self._waiting_rows >= gap.rows
        if number + 1 == gap.end or (gap.end is None and (full or self._waiting_rows >= self._per_shard)):
            self._flush(number + 1, done=full and gap.end is None)

    def finish(self, batches_read: int) -> None:
        """Writes what is left once the text is at its end."""
        if self._gaps:
            self._flush(batches_read, done=True)

    def _flush(self, batches_read: int, *, done: bool) -> None:
        gap, pieces, rows = self._gaps.popleft(), self._waiting, self._waiting_rows
        self._waiting, self._waiting_rows = [], 0
        if gap.end is None and not done:
            self._gaps.append(_Gap(gap.index + 1, batches_read, None, gap.rows - rows))

        def write() -> None:
            shards = self.manifest["shards"]
            if rows:
                entry = write_pieces(self.folder, gap.index, pieces) | {"first": gap.first, "batches": batches_read}
                shards[gap.index : gap.index + 1] = [entry]
            self.manifest["done"] = done or self.manifest["done"]
            write_json(self.folder / "manifest.json", self.manifest)

        self._background.give(write)

    def _find_gaps(self, rows: int) -> Iterator[_Gap]:
        """What is missing, in the order of the text; at most `rows` rows are on disk in the end."""
        first = before = 0
        for index, shard in enumerate(self.manifest["shards"]):
            end = shard.get("batches")
            if not isinstance(end, int) or end <= first or shard["name"] != f"{index:06d}.safetensors":
                where = f"{self.folder / 'manifest.json'} is damaged: it does not say where shard {shard['name']}"
                raise TrainError(f"{where} comes from", "capture again in another folder")
            if fault := shard_fault(self.folder, shard, self.manifest["d_in"], hashes=True):
                self.damaged.append(f"shard {self.folder / shard['name']} {fault}")
                yield _Gap(index, first, end, rows - before)
            first, before = end, before + shard["rows"]
        if not self.manifest["done"]:
            yield _Gap(len(self.manifest["shards"]), first, None, rows - before)
