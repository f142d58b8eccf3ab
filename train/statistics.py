"""What a finished SAE does on rows of activations: statistics of each latent, FVU and L0.

Chunks go to threads that each run torch on one core: a chunk's pre-activations of all latents are all that is held.

Shapes: C rows of a chunk, D width of the rows, F latents, K kept latents, N rows.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.checkpoint import Stats
from sae.model import SAE, Latents
from train.distributed import ALONE, Team
from train.errors import LossError

HELD, HELD_GPU = 1 << 22, 1 << 28
"""Pre-activations that a chunk should have."""
LEAST_ROWS = 64
"""Rows of a chunk all the same, or reading the encoder would be what takes the time."""


@dataclass(frozen=True)
class Measured:
    """What `measure` found, in the units of the rows."""

    stats: Stats
    fvu: float
    l0: float


def measure(sae: SAE, parts: Iterable[Tensor], threads: int = 1, team: Team = ALONE, k: int = 0) -> Measured:
    """Statistics of the latents, FVU and L0 of `sae` over all rows of `parts`, each (N, D), in the SAE's own units.

    All processes of a team ask together and get the same FVU and L0. Those that share rows each look at their share.
    Of those that share latents each gives its slice as `sae`, with the `k` of the whole, and gets statistics of its
    slice. Raises `LossError` where there is no row, or a number that is none.
    """
    d_sae, device = sae.config.d_sae, sae.W_enc_FD.device
    max_F, count_F = torch.zeros(d_sae, device=device), torch.zeros(d_sae, dtype=torch.int64, device=device)
    sum_F = torch.zeros(d_sae, dtype=torch.float64, device=device)
    sum_D = torch.zeros(sae.config.d_in, dtype=torch.float64, device=device)
    sums = torch.zeros(3, dtype=torch.float64)
    norms: list[Tensor] = []
    size = max(LEAST_ROWS, min(256, HELD // d_sae)) if device.type == "cpu" else max(LEAST_ROWS, HELD_GPU // d_sae)

    def decode(latents: Latents, x_CD: Tensor) -> Tensor:
        return sae.decode(latents, x_CD)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for x_ND in parts:
                x_ND = x_ND[team.rows(len(x_ND))].to(device)
                norms.append(torch.linalg.vector_norm(x_ND, dim=1))
                chunks = [x_CD for x_CD in torch.split(x_ND, size) if len(x_CD)]
                found = list(pool.map(sae.encode, chunks))
                if team.shards > 1 and sae.config.activation == "topk":
                    found = [_winners(latents, k or sae.config.k, team) for latents in found]
                for latents, x_CD, y_CD in zip(found, chunks, pool.map(decode, found, chunks), strict=True):
                    if team.shards > 1:  # what every slice adds by itself must count once
                        nothing = Latents(latents.indices[:, :1] * 0, latents.values[:, :1] * 0)
                        base_CD = sae.decode(nothing, x_CD)
                        y_CD = team.sum_(y_CD - base_CD, "shards") + base_CD
                    sums[0] += float((y_CD - x_CD).double().pow(2).sum())
                    on = latents.values > 0
                    indices, acts = latents.indices[on], latents.values[on]
                    max_F.scatter_reduce_(0, indices, acts, "amax")
                    sum_F += torch.bincount(indices, weights=acts.double(), minlength=d_sae)
                    count_F += torch.bincount(indices, minlength=d_sae)
                sum_D += x_ND.double().sum(0)
                sums[1:] += torch.stack([x_ND.double().pow(2).sum().cpu(), torch.tensor(float(len(x_ND)))])
    finally:
        torch.set_num_threads(before)
    for total in (sums, sum_F, count_F, sum_D):
        team.sum_(total, "readers")
    team.largest_(max_F)
    norms_N = torch.cat(norms) if norms else torch.empty(0)
    norms_N = team.gather(norms_N) if team.readers > 1 else norms_N
    squared_error, squares, rows = sums.tolist()
    variance = squares - float(sum_D.pow(2).sum()) / max(rows, 1)
    if not (rows and variance > 0 and squared_error < float("inf")):
        raise LossError(
            f"the SAE cannot be measured on {rows:.0f} rows of variance {variance:.4g}, error {squared_error:.4g}",
            "if the loss grew before, lower --lr",
        )
    mean_on_F = (sum_F / count_F.clamp(min=1)).float()
    vectors = (max_F.cpu(), mean_on_F.cpu(), (count_F.float() / rows).cpu())
    stats = Stats(*vectors, float(norms_N.median()), int(rows))
    return Measured(stats, squared_error / variance, int(team.sum_(count_F.sum(), "shards")) / rows)


def _winners(latents: Latents, k: int, team: Team) -> Latents:
    """Of this slice's candidates those that are among the `k` largest of all slices; the others are 0."""
    all_CK = team.gather(latents.values, 1)
    floor_C1 = all_CK.topk(min(k, all_CK.shape[1]), 1).values[:, -1:]
    return Latents(latents.indices, latents.values.masked_fill(latents.values < floor_C1, 0))
