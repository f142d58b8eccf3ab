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
from sae.model import SAE
from train.errors import TrainError

HELD = 1 << 22
"""Pre-activations that a chunk may have."""


@dataclass(frozen=True)
class Measured:
    """What `measure` found, in the units of the rows."""

    stats: Stats
    fvu: float
    l0: float


def measure(sae: SAE, parts: Iterable[Tensor], threads: int = 1) -> Measured:
    """Statistics of the latents, FVU and L0 of `sae` over all rows of `parts`, each (N, D), in the SAE's own units.

    Raises `TrainError` where there is no row, or a number that is none.
    """
    d_sae = sae.config.d_sae
    max_F, count_F = torch.zeros(d_sae), torch.zeros(d_sae, dtype=torch.int64)
    sum_F = torch.zeros(d_sae, dtype=torch.float64)
    sum_D = torch.zeros(sae.config.d_in, dtype=torch.float64)
    squares = squared_error = 0.0
    norms: list[Tensor] = []
    size = max(1, min(256, HELD // d_sae))

    def run(x_CD: Tensor) -> tuple[Tensor, Tensor, float]:
        latents = sae.encode(x_CD)
        error = (sae.decode(latents, x_CD) - x_CD).double().pow(2).sum()
        on = latents.values > 0
        return latents.indices[on], latents.values[on], float(error)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for x_ND in parts:
                norms.append(torch.linalg.vector_norm(x_ND, dim=1))
                results = list(pool.map(run, torch.split(x_ND, size)))
                indices = torch.cat([found for found, _, _ in results])
                acts = torch.cat([found for _, found, _ in results]).float()
                squared_error += sum(error for _, _, error in results)
                max_F.scatter_reduce_(0, indices, acts, "amax")
                sum_F += torch.bincount(indices, weights=acts.double(), minlength=d_sae)
                count_F += torch.bincount(indices, minlength=d_sae)
                sum_D += x_ND.double().sum(0)
                squares += float(x_ND.double().pow(2).sum())
    finally:
        torch.set_num_threads(before)
    rows = sum(len(part) for part in norms)
    variance = squares - float(sum_D.pow(2).sum()) / max(rows, 1)
    if not (rows and variance > 0 and squared_error < float("inf")):
        raise TrainError(f"the SAE cannot be measured on {rows} rows of variance {variance}, error {squared_error}")
    mean_on_F = (sum_F / count_F.clamp(min=1)).float()
    stats = Stats(max_F, mean_on_F, count_F.float() / rows, float(torch.cat(norms).median()), rows)
    return Measured(stats, squared_error / variance, int(count_F.sum()) / rows)
