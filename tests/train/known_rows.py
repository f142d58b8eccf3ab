"""Rows made of known directions, in the forms a trainer reads, and runs small enough for a test."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.config import TrainConfig
from train.shards import FORMAT, VERSION, write_json, write_shard

HOOK = "blocks.0.hook_resid_post"


def known_rows(rows: int, d: int = 16, atoms: int = 32) -> tuple[Tensor, Tensor]:
    """(rows that are sums of 3 of `atoms` unit directions around a mean far from 0, those directions)."""
    generator = torch.Generator().manual_seed(0)
    atoms_FD = torch.nn.functional.normalize(torch.randn(atoms, d, generator=generator), dim=1)
    chosen = torch.rand(rows, atoms, generator=generator).topk(3).indices
    strengths = 5 + 5 * torch.rand(rows, 3, generator=generator)
    return (atoms_FD[chosen] * strengths[..., None]).sum(1) + 20, atoms_FD


def write_rows(folder: Path, rows: int = 4000, d: int = 16) -> Path:
    """A folder with one .npy file of known rows."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "rows.npy", known_rows(rows, d)[0].numpy())
    return folder


def write_activations(folder: Path, rows_ND: Tensor) -> None:
    """A folder as `steer capture` writes it, every row a document."""
    folder.mkdir()
    count = torch.arange(len(rows_ND))
    shards = [
        write_shard(folder, i, rows_ND[i::4].contiguous(), count[i::4], count[i::4], count[i::4]) for i in range(4)
    ]
    manifest: dict[str, Any] = {"hook": HOOK, "d_in": rows_ND.shape[1], "shards": shards, "done": True}
    write_json(folder / "manifest.json", {"format": FORMAT, "version": VERSION} | manifest)


def small(**values: Any) -> TrainConfig:
    """A run of 40 steps, with a checkpoint and an evaluation every 10."""
    chosen = {"latents": 64, "k": 3, "tokens": 5120, "batch": 128, "lr": 3e-3, "dead_after": 1500, "stats_rows": 1000}
    chosen |= {"checkpoint_every": 10, "evaluate_every": 10, "log_every": 5, "initial_l0": 6.0}
    return TrainConfig.of(**(chosen | values))
