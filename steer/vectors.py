"""Directions from files, for `vector FILE v`: safetensors, NumPy's npy, and GGUF control vectors."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_3.config import ModelConfig
from llama_3.gguf_file import read_header
from llama_3.hooks import HookPoint
from steer.errors import SteerError


def load_vector(file: str, hook: HookPoint, config: ModelConfig) -> tuple[Tensor, str]:
    """The direction (D,) in float32 that a file holds for a hook point, and what names it: the file and a hash.

    A safetensors file holds one tensor, or one named as the hook point; an npy file one array; of a GGUF control vector
    it is `direction.LAYER`. A `SteerError` names what is missing, of another width, complex, or not finite.
    """
    path = Path(os.path.expanduser(file))
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        raise SteerError(f"the vector {file} cannot be read: {error.strerror}", "check the path") from error
    return _load(path, stamp, hook, hook.width(config))


@lru_cache(maxsize=64)
def _load(path: Path, stamp: int, hook: HookPoint, width: int) -> tuple[Tensor, str]:
    readers = {".safetensors": _of_safetensors, ".npy": _of_npy, ".gguf": _of_gguf}
    if (reader := readers.get(path.suffix)) is None:
        raise SteerError(f"{path} is no vector that is known", "give a .safetensors, .npy or .gguf file")
    try:
        vector = reader(path, hook, width)
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        raise SteerError(f"the vector {path} is damaged: {error}") from error
    if vector.is_complex():
        raise SteerError(f"the vector in {path} holds complex numbers", "store its real part")
    vector_D = vector.reshape(-1).float()
    if not bool(vector_D.isfinite().all()):
        raise SteerError(f"the vector in {path} holds numbers that are not finite in 32 bits")
    return vector_D, f"{path}:{hashlib.sha256(vector_D.numpy().tobytes()).hexdigest()[:16]}"


def _check_shape(path: Path, shape: Sequence[int], hook: HookPoint, width: int) -> None:
    """Refuse what is no vector of this width, before any of it is read."""
    if math.prod(shape) != width or sum(size > 1 for size in shape) > 1:
        raise SteerError(f"the vector in {path} has shape {tuple(shape)}, those at {hook} have {width} numbers")


def _of_npy(path: Path, hook: HookPoint, width: int) -> Tensor:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise SteerError(f"{path} holds several arrays in an archive", "save the one that is meant with `numpy.save`")
    if array.dtype.kind not in "fiuc":
        raise SteerError(f"the vector in {path} is of {array.dtype}, which are no numbers", "store it as float32")
    _check_shape(path, array.shape, hook, width)
    return torch.from_numpy(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))


def _of_safetensors(path: Path, hook: HookPoint, width: int) -> Tensor:
    with safe_open(path, framework="pt") as tensors:
        names = list(tensors.keys())
        if len(names) != 1 and str(hook) not in names:
            raise SteerError(
                f"{path} holds {len(names)} tensors, none of them named {hook}", "keep one, or name them so"
            )
        name = str(hook) if str(hook) in names else names[0]
        _check_shape(path, tensors.get_slice(name).get_shape(), hook, width)
        vector: Tensor = tensors.get_tensor(name)
        return vector


def _of_gguf(path: Path, hook: HookPoint, width: int) -> Tensor:
    """A control vector as repeng writes them: `direction.L` is added to what block L, from 0, puts out."""
    tensors = read_header(path).tensors
    stored = tensors.get(name := f"direction.{hook.layer}")
    if stored is None or hook.site != "resid_post":
        layers = ", ".join(sorted(tensors)[:8]) or "nothing"
        raise SteerError(f"{path} has no direction for {hook}: it holds {layers}", "`at blocks.L.hook_resid_post`")
    if stored.kind != 0:
        raise SteerError(f"{name} in {path} is not stored in float32")
    _check_shape(path, stored.shape, hook, width)
    if stored.offset + 4 * width > path.stat().st_size:
        raise SteerError(f"the vector {path} is damaged: {name} reaches beyond its end")
    return torch.from_numpy(np.fromfile(path, "<f4", width, offset=stored.offset))
