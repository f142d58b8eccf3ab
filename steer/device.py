"""Which device and which dtype a model runs in when nobody says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from steer.errors import SteerError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> str:
    """The device asked for, or for `auto` the fastest there is; a `SteerError` for one that is not."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = wanted.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise SteerError(f"`{wanted}` is no device", "choose auto, cpu, cuda or mps")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise SteerError(f"device `{wanted}` is not available here", "`--device cpu` always is")
    return wanted


def choose_dtype(wanted: str, folder: Path, device: str) -> torch.dtype | Literal["auto"]:
    """The dtype asked for. For `auto` the weights' own (`auto`), but float32 on a CPU without bfloat16 instructions.

    There it is several times faster, and is taken where it fits: where the weights, twice as large as a bfloat16 file,
    take at most half of the machine's memory.
    """
    if wanted != "auto":
        if wanted not in DTYPES:
            raise SteerError(f"`{wanted}` is no dtype", f"choose auto, {', '.join(DTYPES)}")
        return DTYPES[wanted]
    if device != "cpu" or torch.cpu._is_avx512_bf16_supported() or not hasattr(os, "sysconf"):
        return "auto"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return torch.float32 if 2 * stored <= memory / 2 else "auto"
