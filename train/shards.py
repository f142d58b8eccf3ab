"""Captured activations on disk: numbered safetensors shards and a `manifest.json` that lists them with their hashes.

A shard holds, for each row, the activation in bfloat16, the token id, the document and the position in its context.
Shards are written under a temporary name and moved into place, then the manifest is; a shard that the manifest does not
list does not exist. The reader gives batches in a seeded order as a pure function of the position in that order:
nothing needs saving for a resume but the number of rows read.

Shapes: N rows, D width of the residual stream, B rows of a batch.
"""

import hashlib
import json
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from train.errors import TrainError

FORMAT, VERSION = "steer-activations", 1


def sha256_of(file: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes `content` atomically."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def write_shard(
    folder: Path, number: int, rows_ND: Tensor, tokens_N: Tensor, docs_N: Tensor, positions_N: Tensor
) -> dict[str, Any]:
    """Writes shard `number` and returns its entry for the manifest."""
    name = f"{number:06d}.safetensors"
    temporary = folder / (name + ".tmp")
    columns = {"tokens": tokens_N.int(), "documents": docs_N.int(), "positions": positions_N.int()}
    temporary.write_bytes(save({"rows": rows_ND.bfloat16().contiguous()} | columns))
    entry = {"name": name, "rows": len(rows_ND), "bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
    os.replace(temporary, folder / name)
    return entry


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of an activations folder. Raises `TrainError` if it is missing or not ours."""
    file = Path(folder) / "manifest.json"
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


def check_shards(folder: Path | str, manifest: dict[str, Any], *, hashes: bool) -> None:
    """Raises `TrainError` naming the first shard that is missing or whose size (with `hashes`: content) is wrong."""
    for shard in manifest["shards"]:
        file = Path(folder) / shard["name"]
        if not file.is_file():
            fault = "is missing"
        elif file.stat().st_size != shard["bytes"]:
            fault = f"has {file.stat().st_size} bytes instead of {shard['bytes']}"
        elif hashes and sha256_of(file) != shard["sha256"]:
            fault = "does not match its hash"
        else:
            continue
        raise TrainError(f"shard {file} {fault}", "run the same steer capture again: it makes the damaged shard anew")


class ShardReader:
    """Rows of an activations folder in a seeded random order, epoch after epoch, each in another order.

    Shards are shuffled, taken `mix` at a time, and the rows of such a group are shuffled; one group lies in memory.
    """

    def __init__(self, folder: Path | str, seed: int, *, mix_bytes: int = 1 << 30):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        check_shards(folder, self.manifest, hashes=False)
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.rows = sum(shard["rows"] for shard in self.shards)
        if not self.rows:
            raise TrainError(f"{folder} holds no activations yet", "run steer capture to its end")
        self.d_in = int(self.manifest["d_in"])
        self._seed = seed
        self._mix = max(1, mix_bytes // max(shard["bytes"] for shard in self.shards))
        self._group: tuple[int, int] = (-1, -1)
        self._group_rows = torch.empty(0, self.d_in)
        self._epoch: tuple[int, list[list[int]], list[int]] = (-1, [], [])

    def batch(self, position: int, size: int) -> Tensor:
        """Rows `position` to `position + size` of the endless shuffled sequence, (size, D), float32."""
        parts = []
        while size > 0:
            epoch, offset = divmod(position, self.rows)
            groups, ends = self._plan(epoch)
            group = bisect_right(ends, offset)
            start = offset - (ends[group - 1] if group else 0)
            part = self._load(epoch, group, groups[group])[start : start + size]
            parts.append(part)
            position, size = position + len(part), size - len(part)
        return torch.cat(parts).float() if len(parts) > 1 else parts[0].float()

    def _plan(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        if self._epoch[0] != epoch:
            order = torch.randperm(len(self.shards), generator=self._generator(epoch, 0)).tolist()
            groups = [order[i : i + self._mix] for i in range(0, len(order), self._mix)]
            ends = list(accumulate(sum(self.shards[shard]["rows"] for shard in group) for group in groups))
            self._epoch = (epoch, groups, ends)
        return self._epoch[1], self._epoch[2]

    def _load(self, epoch: int, group: int, members: list[int]) -> Tensor:
        if self._group != (epoch, group):
            self._group_rows = torch.empty(0, self.d_in)  # the old group is freed before the new one is read
            rows_ND = torch.cat([self._read(self.shards[shard]["name"]) for shard in members])
            order = torch.randperm(len(rows_ND), generator=self._generator(epoch, group + 1))
            self._group_rows, self._group = rows_ND[order], (epoch, group)
        return self._group_rows

    def _read(self, name: str) -> Tensor:
        try:
            with safe_open(self.folder / name, framework="pt") as shard:
                rows_ND: Tensor = shard.get_tensor("rows")
        except (SafetensorError, OSError) as error:
            raise TrainError(
                f"shard {self.folder / name} is damaged ({error})", "run the same steer capture again"
            ) from error
        if rows_ND.ndim != 2 or rows_ND.shape[1] != self.d_in:
            raise TrainError(
                f"shard {self.folder / name} has rows of shape {tuple(rows_ND.shape)}, not (rows, {self.d_in})"
            )
        return rows_ND

    def _generator(self, epoch: int, part: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed} {epoch} {part}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
