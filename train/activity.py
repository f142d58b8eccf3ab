"""How long each latent has been silent, written down from time to time under `RUN/activity/`, and read back.

A snapshot is one safetensors file named after its step, five bytes a latent: the tokens since the latent last fired,
exact up to 2^31 - 1, and how often it fired since the snapshot before, as a code of a quarter of an octave. What counts
as dead is asked when reading, so births and deaths can be counted for any threshold. A latent that dies and comes back
between two snapshots is in neither count.

Shapes: F latents.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from train.errors import TrainError

LONGEST = 2**31 - 1
"""Tokens of silence at which a snapshot stops counting."""
CODES = 4
"""Codes an octave of how often a latent fired: at most 9% off."""


@dataclass(frozen=True)
class Snapshot:
    step: int
    tokens: int
    """training tokens up to here"""
    silent_F: Tensor
    """int32, tokens since each latent last fired, at most `LONGEST`"""
    fired_F: Tensor
    """float32, tokens on which each latent fired since the snapshot before, rounded to a quarter of an octave"""


@dataclass(frozen=True)
class Change:
    """What became of the latents since the snapshot before; before the first one all count as alive."""

    step: int
    tokens: int
    births: int
    """dead then, alive now"""
    deaths: int
    """alive then, dead now"""
    dead: int
    """dead now"""
    latents: int


class ActivityLog:
    """The snapshots of a run as they are taken."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def add(self, step: int, tokens: int, silent_F: Tensor, fired_F: Tensor) -> None:
        """Writes the snapshot of `step` and removes those of later steps, which a resumed run takes anew.

        `silent_F`: tokens since each latent last fired; `fired_F`: tokens on which it fired since the last snapshot.
        """
        assert silent_F.shape == fired_F.shape and silent_F.ndim == 1
        self.folder.mkdir(parents=True, exist_ok=True)
        coded_F = torch.log2(fired_F.double() + 1).mul_(CODES).round_().to(torch.uint8)
        content = {"silent": silent_F.clamp(max=LONGEST).int().cpu(), "fired": coded_F.cpu()}
        file = self.folder / f"{step:09d}.safetensors"
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(save(content, {"tokens": str(tokens)}))
        os.replace(temporary, file)
        for other in self.folder.glob("*.safetensors"):
            if other.stem.isdecimal() and int(other.stem) > step:
                other.unlink(missing_ok=True)


def read_activity(folder: Path | str) -> Iterator[Snapshot]:
    """The snapshots in `folder`, oldest first, one in memory at a time; none if there is no such folder.

    Raises `TrainError` for a file that is damaged or of another width than those before.
    """
    latents = 0
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                step, tokens = int(file.stem), int((stored.metadata() or {})["tokens"])
                silent_F, fired_F = stored.get_tensor("silent"), stored.get_tensor("fired")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise _damaged(file, str(error)) from error
        if (silent_F.dtype, fired_F.dtype) != (torch.int32, torch.uint8) or silent_F.shape != fired_F.shape:
            raise _damaged(file, f"it holds {silent_F.dtype} {tuple(silent_F.shape)}")
        if silent_F.ndim != 1 or not len(silent_F) or (latents and len(silent_F) != latents):
            raise _damaged(file, f"it holds {tuple(silent_F.shape)} latents, those before {latents}")
        latents = len(silent_F)
        yield Snapshot(step, tokens, silent_F, torch.exp2(fired_F.float() / CODES) - 1)


def changes(snapshots: Iterator[Snapshot], dead_after: int) -> Iterator[Change]:
    """Births and deaths from one snapshot to the next; dead is silent for at least `dead_after` tokens."""
    before_F: Tensor | None = None
    for shot in snapshots:
        dead_F = shot.silent_F >= min(dead_after, LONGEST)
        was_F = torch.zeros_like(dead_F) if before_F is None else before_F
        births, deaths = int((was_F & ~dead_F).sum()), int((dead_F & ~was_F).sum())
        yield Change(shot.step, shot.tokens, births, deaths, int(dead_F.sum()), len(dead_F))
        before_F = dead_F


def silence_histogram(silent_F: Tensor, octaves: int) -> Tensor:
    """Shares of latents by silence, (octaves + 1,): none, then 1, 2 to 3, 4 to 7 tokens and so on, the last open."""
    bins_F = torch.log2(silent_F.double().clamp(min=0.5)).floor().long() + 1  # exact below 2^52
    return torch.bincount(bins_F.clamp(max=octaves), minlength=octaves + 1).double() / len(silent_F)


def _damaged(file: Path, why: str) -> TrainError:
    return TrainError(f"activity snapshot {file} is damaged ({why})", "delete it; the others can be read without it")
