"""Which device and which dtype a model runs in when nobody says, why, and whether it will fit there.

The estimate counts what stays: weights, the cache of keys and values, the SAE, and the largest temporary tensors. It
leaves out what torch keeps for itself, so that nothing is refused that would fit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llama_3.config import ModelConfig, read_json
from llama_3.hub import model_name
from steer.errors import SteerError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEMES = {"int8": 1.01, "int4": 0.5625}
"""Weight-only quantisations, and the bytes that a weight then takes with its share of the scales."""
SMALL = 100_000_000
"""Parameters up to which a CPU computes faster than it reads: there float32 wins over halving what is read."""
CONTEXT = 8192
"""Tokens of the cache that are counted where a model could hold more."""
CHUNK = 512
"""Tokens read at once, for the estimate of temporary tensors."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs and in what."""

    device: str
    dtype: torch.dtype | Literal["auto"]
    """`auto`: as stored."""
    reason: str = ""
    """Why, for what was left to steer; empty where both were asked for."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Bytes that a model will take, part by part, and those that are free; None where nobody knows."""

    parts: dict[str, int]
    available: int | None

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.available is None or self.needed <= self.available


def choose_placement(device: str, dtype: str, config: ModelConfig, path: Path) -> Placement:
    """Device and dtype asked for, or for `auto` the fastest that loses nothing; a `SteerError` for what is not here.

    `dtype="auto"` is as stored; but a CPU without bfloat16 instructions runs a small model faster in float32. A large
    one waits for memory there, which bfloat16 halves.
    """
    where, reasons = choose_device(device), []
    if device == "auto":
        others = " and ".join(name for name, there in _accelerators().items() if not there)
        reasons.append(f"{where}: " + (f"no {others} here" if where == "cpu" else "the fastest device here"))
    if dtype != "auto":
        if dtype not in DTYPES:
            raise SteerError(f"`{dtype}` is no dtype", f"choose auto, {', '.join(DTYPES)}")
        return Placement(where, DTYPES[dtype], "; ".join(reasons))
    stored, count = stored_dtype(path), parameter_count(config)
    if where.startswith("cpu") and not _has_bfloat16() and count < SMALL and stored != torch.float32:
        reasons.append(f"float32: a model of {count / 1e6:.0f} M parameters is fastest so on a CPU without bfloat16")
        return Placement(where, torch.float32, "; ".join(reasons))
    reasons.append(f"{_named(stored)}: as stored")
    return Placement(where, "auto", "; ".join(reasons))


def parameter_count(config: ModelConfig) -> int:
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    block = config.d_model * (2 * q + 2 * kv + 3 * config.d_ff + 2)
    return config.vocab_size * config.d_model * (2 - config.tied) + config.n_layers * block + config.d_model


def stored_dtype(path: Path) -> torch.dtype:
    raw = read_json(path / "config.json") or {}
    return DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.bfloat16)


def choose_dtype(wanted: str, folder: Path, device: str) -> torch.dtype | Literal["auto"]:
    from llama_3.config import read_config

    return choose_placement(device, wanted, read_config(folder), folder).dtype


def choose_device(wanted: str) -> str:
    """The device asked for, or for `auto` the fastest there is; a `SteerError` for one that is not."""
    there = _accelerators()
    if wanted == "auto":
        return next((kind for kind, found in there.items() if found), "cpu")
    named = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", wanted)
    if named is None:
        raise SteerError(f"`{wanted}` is no device", "choose auto, cpu, cuda, cuda:1 and so on, or mps")
    if not there.get(named[1], True):
        raise SteerError(f"device `{wanted}` is not available here", "`--device cpu` always is")
    count = torch.cuda.device_count() if named[1] == "cuda" else 1
    if int(named[2] or 0) >= count:
        raise SteerError(f"there is no device `{wanted}`", f"here is {_range(named[1], count)}")
    return wanted


def estimate(
    config: ModelConfig,
    path: Path,
    placement: Placement,
    quantize: str | None = None,
    sae_bytes: int = 0,
    context: int | None = None,
    kept_layers: int = 0,
) -> Fit:
    """What the model takes there. `kept_layers` of its blocks are left as they are when the others are quantised."""
    dtype = stored_dtype(path) if placement.dtype == "auto" else placement.dtype
    width = dtype.itemsize
    tokens = min(context or CONTEXT, config.max_context, CONTEXT)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    block = config.d_model * (2 * q + 2 * kv + 3 * config.d_ff)
    weights = parameter_count(config) * width
    if quantize in SCHEMES:
        weights -= int(block * max(0, config.n_layers - kept_layers) * (width - SCHEMES[quantize]))
    working = CHUNK * (3 * config.d_ff + 6 * config.d_model) * 4 + 8 * config.vocab_size * 4
    cache = 2 * config.n_layers * kv * tokens * width
    parts = {"weights": weights, f"cache of {tokens:,} tokens": cache, "working memory": working, "SAE": sae_bytes}
    return Fit({name: size for name, size in parts.items() if size}, available_memory(placement.device))


def check_fit(
    config: ModelConfig,
    path: Path,
    placement: Placement,
    quantize: str | None = None,
    sae_bytes: int = 0,
    context: int | None = None,
    kept_layers: int = 0,
) -> Fit:
    """`estimate`, or a `SteerError` with both figures where it exceeds what is free; its hint names what would fit."""
    fit = estimate(config, path, placement, quantize, sae_bytes, context, kept_layers)
    if fit.fits or fit.available is None:
        return fit
    hint = "choose a smaller model"
    if placement.device.startswith("cuda") and torch.cuda.device_count() > 1:
        hint += f", or spread this one over {torch.cuda.device_count()} cards with torchrun"
    for flags, other, scheme in _alternatives(placement, quantize):
        if estimate(config, path, other, scheme, sae_bytes, context, kept_layers).fits:
            hint = f"with `{flags}` it would fit"
            break
    part, size = max(fit.parts.items(), key=lambda entry: entry[1])
    raise SteerError(
        f"{model_name(path)} needs {_gib(fit.needed)} GiB on {placement.device} ({part}: {_gib(size)}), "
        f"and {_gib(fit.available)} GiB are free",
        hint,
    )


def _alternatives(placement: Placement, quantize: str | None) -> Iterator[tuple[str, Placement, str | None]]:
    """(flags, placement, quantisation) that take less, the least loss first."""
    half = replace(placement, dtype=torch.bfloat16)
    schemes = [scheme for scheme in SCHEMES if quantize is None or SCHEMES[scheme] < SCHEMES.get(quantize, 9)]
    yield "--dtype bfloat16", half, quantize
    yield from ((f"--quantize {scheme}", placement, scheme) for scheme in schemes)
    yield from ((f"--dtype bfloat16 --quantize {scheme}", half, scheme) for scheme in schemes)
    if not placement.device.startswith("cpu"):
        yield "--device cpu", replace(placement, device="cpu"), quantize


def available_memory(device: str) -> int | None:
    """Bytes that a device can still give; None where the system does not tell."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if device.startswith("mps"):
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = [size for size in (_meminfo(), _cgroup()) if size is not None]
    if free:
        return min(free)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _meminfo(file: Path = Path("/proc/meminfo")) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _cgroup(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves; file pages that can be dropped are free."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        dropped = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)
        return max(0, int(limit) - int(used) + int(dropped[1] if dropped else 0))
    except (OSError, ValueError):  # no limit (`max`), or no such system
        return None


def _accelerators() -> dict[str, bool]:
    """The kinds of device beside the CPU, the faster first: are they here?"""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _range(kind: str, count: int) -> str:
    return kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**29 else f"{size / 2**30:.2f}"
