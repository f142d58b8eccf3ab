"""Files of tensors, read a few rows at a time: safetensors and the archives of `torch.save`.

Weights may be larger than the memory beside the model they fill. Raw bytes are therefore read into one small buffer
and not mapped; `torch.save` archives can only be mapped, and are opened anew after a while, since pages once read count
as resident until their mapping goes. Every size a header claims is compared with the file before it is believed, and a
pickle is read by torch's unpickler for tensors, which calls nothing.
"""

import json
import math
import pickle
import re
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from llama_3.config import described
from llama_3.errors import config_error

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

MAPPED_BYTES = 64 << 20
"""What may be read through a mapping before it is dropped."""

LONGEST_HEADER = 100 << 20
"""safetensors' own limit for a header, in bytes."""


class RawFile:
    """Bytes of a file, read into one buffer that is used again."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, FileIO(path)
        self.size = path.stat().st_size
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, offset: int, count: int) -> Tensor:
        """uint8 (count,), good until the next call; ValueError where the file ends before that."""
        if offset + count > self.size:
            raise damaged(self.path, f"{offset + count:,} bytes are needed")
        if len(self._buffer) < count:
            self._buffer = torch.empty(count, dtype=torch.uint8)
        wanted = self._buffer.numpy().data[:count]
        self._file.seek(offset)
        got = 0
        while got < count:
            step = self._file.readinto(wanted[got:])
            if not step:
                raise damaged(self.path, "it ends early")
            got += step
        return self._buffer[:count]


class SafetensorsFile(RawFile):
    """The tensors of one safetensors file; ValueError when its header and its bytes disagree."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._offsets: dict[str, int] = {}
        try:
            self._read_header()
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            self._file.close()
            if hasattr(error, "hint"):
                raise
            raise damaged(path, described(error)) from error

    def _read_header(self) -> None:
        length = int.from_bytes(self.read(0, 8).numpy().tobytes(), "little")
        if length > LONGEST_HEADER:
            raise damaged(self.path, f"its header claims {length:,} bytes")
        header = json.loads(self.read(8, length).numpy().tobytes())
        if not isinstance(header, dict):
            raise damaged(self.path, "its header is no JSON object")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape, (start, stop) = FLOATS.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
            if dtype is None:
                kind = described(entry["dtype"])
                raise config_error(
                    f"{self.path} holds {described(name)} in {kind}, and weights are read in {', '.join(FLOATS)}",
                    "use the folder with the original bf16 weights",
                )
            if any(type(size) is not int or size < 0 for size in (*shape, start, stop)):
                raise damaged(self.path, f"{described(name)} has no proper shape or place")
            if stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > self.size:
                raise damaged(self.path, f"{described(name)} does not fit its place")
            self.shapes[name], self.dtypes[name], self._offsets[name] = tuple(shape), dtype, 8 + length + start

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, good until the next call."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        row = math.prod(shape[1:]) * dtype.itemsize
        data = self.read(self._offsets[name] + start * row, (stop - start) * row)
        return data.view(dtype).view(stop - start, *shape[1:])


class PickleFile:
    """The tensors of one archive that `torch.save` wrote, one of `files` read in turns; no code in it is run."""

    def __init__(self, path: Path, files: int = 1) -> None:
        self.path, self._read = path, 0
        self._most = max(MAPPED_BYTES // files, path.stat().st_size // 50)
        self._tensors = _load_archive(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors = {}

    def same(self, one: str, other: str) -> bool:
        """Whether two names stand for one and the same weights."""
        a, b = self._tensors[one], self._tensors[other]
        return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, to be let go before the next call."""
        if self._read >= self._most:
            self._tensors = {}
            self._tensors, self._read = _load_archive(self.path), 0
        part = self._tensors[name][start:stop]
        self._read += part.nbytes
        return part


def _load_archive(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL `?([\w.]+)", str(error))):
            raise config_error(
                f"{path} holds more than tensors: it asks for {described(code[1])}, and nothing in it was run",
                "use the model's safetensors files",
            ) from error
        if "mmap can only" in str(error):
            raise config_error(f"{path} is no archive of torch 1.6 or later", "convert it to safetensors") from error
        raise damaged(path, described(str(error).partition("\n")[0])) from error
    if not isinstance(found, Mapping) or not found:
        raise config_error(f"{path} holds no table of tensors", "use the model's safetensors files")
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise config_error(
                f"{path} holds {described(name)}, which is no tensor", "use the model's safetensors files"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in FLOATS.values():
            raise config_error(
                f"{path} holds {described(name)} in {tensor.dtype}, and weights are read in {', '.join(FLOATS)}"
            )
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise damaged(path, f"{described(name)} has more numbers than the file")
        tensors[name] = tensor.detach()
    return tensors


def damaged(path: Path, why: str) -> ValueError:
    """The error for a file whose header and bytes disagree."""
    return config_error(
        f"{path} is damaged or cut short ({path.stat().st_size:,} bytes): {why}", "download the file again"
    )
