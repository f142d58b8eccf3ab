"""One file of rows: a 2-D floating-point tensor in safetensors, or a .npy array; read piecewise, never unpickled.

A file is opened for its shape and dtype, and mapped anew for each piece that is read, so nothing stays open and a
damaged file is named whenever it is met.

Shapes: N rows, D their width.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.errors import TrainError

NAMES = ("rows", "activations", "embeddings")
"""Tensors of a safetensors file that are taken for its rows, in this order; else its only 2-D one."""
AGAIN = "make the file again; steer capture, run as before, makes a damaged shard anew"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}


@dataclass(frozen=True)
class RowFile:
    """What a file holds: `rows` rows of width `d_in`, given as `dtype` (float64 is read as float32)."""

    path: Path
    rows: int
    d_in: int
    dtype: torch.dtype
    tensor: str = ""
    """its name in a safetensors file; "" in a .npy file"""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return self.d_in * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, (N, D). `TrainError` where the file is damaged or not what it was."""
        rows_ND = _npy_rows(self.path, start, stop) if not self.tensor else self._stored(self.tensor, start, stop)
        if rows_ND.ndim != 2 or rows_ND.shape[1] != self.d_in:
            raise TrainError(f"{self.path} has rows of shape {tuple(rows_ND.shape[1:])}, not ({self.d_in},)")
        return rows_ND.to(self.dtype)

    def documents(self, start: int, stop: int) -> Tensor:
        """The document of each row, (N,), where the file is a shard of a capture."""
        return self._stored("documents", start, stop)

    def _stored(self, name: str, start: int, stop: int) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as stored:
                tensor: Tensor = stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise TrainError(f"{self.path} is damaged ({error})", AGAIN) from error
        if len(tensor) != self.rows:
            raise TrainError(f"{self.path} has {len(tensor)} {name}, but should have {self.rows}", AGAIN)
        return tensor[start:stop]


def find_row_files(folder: Path | str) -> list[RowFile]:
    """The .safetensors and .npy files of a folder, by name; `TrainError` naming the first of another width."""
    names = sorted(file for file in Path(folder).glob("*") if file.suffix in (".safetensors", ".npy"))
    files = [_open_npy(name) if name.suffix == ".npy" else _open_safetensors(name) for name in names]
    for file in files:
        if file.d_in != files[0].d_in:
            raise TrainError(
                f"{file.path} has rows of width {file.d_in}, but {files[0].path.name} has {files[0].d_in}",
                "put files of one width into one folder",
            )
    return files


def _open_safetensors(path: Path) -> RowFile:
    try:
        with safe_open(path, framework="pt") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
            flat = [name for name, shape in shapes.items() if len(shape) == 2]
            chosen = next((name for name in NAMES if name in shapes), flat[0] if len(flat) == 1 else None)
            if chosen is None:
                raise TrainError(
                    f"{path} holds {len(flat)} two-dimensional tensors, and none is named {', '.join(NAMES)}",
                    "a file of rows holds one tensor of shape (rows, width)",
                )
            kind = stored.get_slice(chosen).get_dtype()
    except (SafetensorError, OSError) as error:
        raise TrainError(f"{path} is no safetensors file ({error})") from error
    return _checked(path, shapes[chosen], _DTYPES.get(kind), kind, chosen)


def _open_npy(path: Path) -> RowFile:
    array = _map_npy(path)
    kind = array.dtype
    dtype = (torch.float16 if kind.itemsize == 2 else torch.float32) if kind.kind == "f" else None
    return _checked(path, array.shape, dtype, str(kind))


def _checked(path: Path, shape: tuple[int, ...], dtype: torch.dtype | None, kind: str, tensor: str = "") -> RowFile:
    if len(shape) != 2:
        raise TrainError(f"{path} has the shape {shape}, not (rows, width)")
    if not all(shape):
        raise TrainError(f"{path} is empty: its shape is {shape}")
    if dtype is None:
        raise TrainError(f"{path} holds {kind}, not floating-point numbers")
    return RowFile(path, shape[0], shape[1], dtype, tensor)


def _map_npy(path: Path) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise TrainError(f"{path} is no .npy file of numbers ({error})") from error
    if not isinstance(mapped, np.ndarray):  # an archive under the name of an array
        raise TrainError(f"{path} is an archive, not a single array", "save it with numpy.save")
    return mapped


def _npy_rows(path: Path, start: int, stop: int) -> Tensor:
    piece = _map_npy(path)[start:stop]
    return torch.from_numpy(piece.astype(np.float16 if piece.dtype.itemsize == 2 else np.float32))
