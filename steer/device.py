"""Which device and which dtype a model runs in when nobody says, why, and whether it will fit there.

The estimate counts what stays: weights, the cache of keys and values, the SAE, and the largest temporary tensors. It
leaves out what torch keeps for itself, so that nothing is refused that would fit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llama_3.checkpoint import parameter_count, stored_dtype
from llama_3.config import ModelConfig
from llama_3.generate import PREFILL_CHUNK
from llama_3.hub import model_name
from llama_3.packed import quicker
from llama_3.ranks import world
from sae.model import LARGE, SAEConfig
from sae.screen import MARGIN
from sae.screen import available as screening_available
from steer.errors import SteerError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEMES = {"int8": 1.01, "int4": 0.5625}
"""Weight-only quantisations, and the bytes that a weight then takes with its share of the scales."""
CONTEXT = 8192
"""Tokens of the cache that are counted where a model could hold more."""


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


def choose_placement(device: str, dtype: str, path: Path) -> Placement:
    """Device and dtype asked for, for `auto` the fastest device and the dtype as stored; a `SteerError` for what is not
    here."""
    where, reasons = choose_device(device), []
    if device == "auto":
        reasons.append(f"{where}: " + ("there is no other device" if where == "cpu" else "the fastest device here"))
    if dtype != "auto":
        if dtype not in DTYPES:
            raise SteerError(f"`{dtype}` is no dtype", f"choose auto, {', '.join(DTYPES)}")
        return Placement(where, DTYPES[dtype], "; ".join(reasons))
    reasons.append(f"{_named(stored_dtype(path))}: as stored")
    return Placement(where, "auto", "; ".join(reasons))


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


def check_fit(
    config: ModelConfig,
    path: Path,
    placement: Placement,
    quantize: str | None = None,
    sae_bytes: int = 0,
    kept_layers: int = 0,
    packed: bool = False,
) -> Fit:
    """What the model at `path` will take, before it is loaded; `kept_layers` of its blocks are not quantised, and its
    weights are `packed` for many rows.

    A `SteerError` with both figures where that exceeds what is free; its hint names what would fit.
    """
    stored = stored_dtype(path) if placement.dtype == "auto" else placement.dtype

    def fit_of(device: str, dtype: torch.dtype, scheme: str | None) -> Fit:
        parts = estimate(config, dtype, scheme, kept_layers) | {"SAE": sae_bytes}
        if config.tied and packed and not scheme and quicker(torch.device(device), dtype):  # beside the embedding
            parts["packed output matrix"] = config.vocab_size * config.d_model * dtype.itemsize
        return Fit(parts, available_memory(device))

    fit = fit_of(placement.device, stored, quantize)
    if fit.fits or fit.available is None:
        return fit
    hint = "choose a smaller model"
    if placement.device.startswith("cuda") and (cards := torch.cuda.device_count()) > world():
        hint += f", or spread this one over {cards} cards with torchrun"
    for flags, device, dtype, scheme in _alternatives(placement.device, stored, quantize):
        if fit_of(device, dtype, scheme).fits:
            hint = f"with `{flags}` it fits"
            break
    part, size = max(fit.parts.items(), key=lambda entry: entry[1])
    raise SteerError(
        f"{model_name(path)} needs {gib(fit.needed)} GiB on {placement.device} ({part}: {gib(size)}), "
        f"and {gib(fit.available)} GiB are free",
        hint,
    )


def estimate(
    config: ModelConfig, dtype: torch.dtype, scheme: str | None = None, kept_layers: int = 0
) -> dict[str, int]:
    """Bytes of a loaded model, part by part: weights, the cache of keys and values, the largest temporary tensors."""
    width, tokens = dtype.itemsize, min(config.max_context, CONTEXT)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    weights = parameter_count(config) * width
    if scheme in SCHEMES:
        matrices = config.d_model * (2 * q + 2 * kv + 3 * config.d_ff) * max(0, config.n_layers - kept_layers)
        head = config.vocab_size * config.d_model
        # The head takes int8 at most; a tied embedding stays beside it.
        weights += int(head * (SCHEMES["int8"] - (0 if config.tied else width)) - matrices * (width - SCHEMES[scheme]))
    working = PREFILL_CHUNK * (3 * config.d_ff + 6 * config.d_model) * 4 + 8 * config.vocab_size * 4
    cache = 2 * config.n_layers * kv * tokens * width
    return {"weights": weights, f"cache of {tokens:,} tokens": cache, "working memory": working}


def sae_bytes(config: SAEConfig, device: str = "cpu") -> int:
    """Bytes of an SAE as it is loaded, in float32, and on a CPU of the int8 copy that a big TopK encoder gets beside it
    (`SAE.prepare`)."""
    encoder = config.d_in * config.d_sae
    screened = config.activation == "topk" and encoder >= LARGE and config.k + MARGIN < config.d_sae
    copy = encoder if screened and device.startswith("cpu") and screening_available() else 0
    return 4 * (2 * encoder + config.d_sae * (1 + len(config.function.extra)) + config.d_in) + copy


def _alternatives(
    device: str, dtype: torch.dtype, scheme: str | None
) -> Iterator[tuple[str, str, torch.dtype, str | None]]:
    """(flags, device, dtype, quantisation) that take less, the least loss first."""
    schemes = [other for other in SCHEMES if scheme not in SCHEMES or SCHEMES[other] < SCHEMES[scheme]]
    if world() > 1:  # a model shared out over processes is not quantised
        schemes = []
    half = torch.bfloat16
    if dtype.itemsize > half.itemsize:
        yield "--dtype bfloat16", device, half, scheme
    yield from ((f"--quantize {other}", device, dtype, other) for other in schemes)
    if dtype.itemsize > half.itemsize:
        yield from ((f"--dtype bfloat16 --quantize {other}", device, half, other) for other in schemes)
    if not device.startswith("cpu"):
        yield "--device cpu", "cpu", dtype, scheme


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


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _range(kind: str, count: int) -> str:
    return kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}"


def gib(size: int) -> str:
    """A size in GiB, without the unit; small ones with two digits."""
    return f"{size / 2**30:.1f}" if size >= 2**29 else f"{size / 2**30:.2f}"
