"""Directions from files, for `vector FILE v`: safetensors, NumPy's npy, and GGUF control vectors."""

from __future__ import annotations

import hashlib
import math
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
    it is `direction.LAYER`. A `SteerError` names what is missing, of another width, or not finite.
    """
    path = Path(file).expanduser()
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        raise SteerError(f"the vector {file} cannot be read: {error.strerror}", "check the path") from error
    return _load(path, stamp, hook, hook.width(config))


@lru_cache(maxsize=64)
def _load(path: Path, stamp: int, hook: HookPoint, width: int) -> tuple[Tensor, str]:
    try:
        match path.suffix:
            case ".safetensors":
                vector = _of_safetensors(path, hook)
            case ".npy":
                vector = torch.from_numpy(np.load(path, mmap_mode="r", allow_pickle=False).astype(np.float32))
            case ".gguf":
                vector = _of_gguf(path, hook)
            case _:
                raise SteerError(f"{path} is no vector that is known", "give a .safetensors, .npy or .gguf file")
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        raise SteerError(f"the vector {path} is damaged: {error}") from error
    if vector.numel() != width or vector.squeeze().dim() > 1:
        raise SteerError(f"the vector in {path} has shape {tuple(vector.shape)}, those at {hook} have {width} numbers")
    vector = vector.reshape(-1).float()
    if not bool(vector.isfinite().all()):
        raise SteerError(f"the vector in {path} holds numbers that are not finite")
    return vector, f"{path}:{hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:16]}"


def _of_safetensors(path: Path, hook: HookPoint) -> Tensor:
    with safe_open(path, framework="pt") as tensors:
        names = list(tensors.keys())
        if len(names) != 1 and str(hook) not in names:
            raise SteerError(
                f"{path} holds {len(names)} tensors, none of them named {hook}", "keep one, or name them so"
            )
        vector: Tensor = tensors.get_tensor(str(hook) if str(hook) in names else names[0])
        return vector


def _of_gguf(path: Path, hook: HookPoint) -> Tensor:
    """A control vector as repeng writes them: `direction.L` is added to what block L, from 0, puts out."""
    tensors = read_header(path).tensors
    stored = tensors.get(name := f"direction.{hook.layer}")
    if stored is None or hook.site != "resid_post":
        layers = ", ".join(sorted(tensors)[:8]) or "nothing"
        raise SteerError(f"{path} has no direction for {hook}: it holds {layers}", "`at blocks.L.hook_resid_post`")
    if stored.kind != 0:
        raise SteerError(f"{name} in {path} is not stored in float32")
    size = math.prod(stored.shape)
    if stored.offset + 4 * size > path.stat().st_size:
        raise SteerError(f"the vector {path} is damaged: {name} reaches beyond its end")
    return torch.from_numpy(np.fromfile(path, "<f4", size, offset=stored.offset)).reshape(stored.shape)
