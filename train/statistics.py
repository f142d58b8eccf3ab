"""What a finished SAE does on rows of its own training data: statistics of each latent, FVU and L0.

Shapes: C rows of a chunk, D width of the residual stream, F latents, K kept latents, N rows.
"""

import torch
from torch import Tensor

from sae.checkpoint import Stats
from train.shards import ShardReader
from train.step import SparseStep

READ_ROWS = 1 << 14
"""Rows read at a time."""


def measure(state: SparseStep, reader: ShardReader, scale: float, rows: int) -> tuple[Stats, float, float]:
    """(statistics in the model's own units, FVU, L0) over up to `rows` rows, none read twice.

    `state` must be entered; its inputs are the rows divided by `scale`.
    """
    rows = min(rows, reader.rows)
    d_sae, b_dec_D = state.d_sae, state.weights["b_dec"]
    max_F, sum_F, count_F = torch.zeros(d_sae), torch.zeros(d_sae, dtype=torch.float64), torch.zeros(d_sae)
    sum_D = torch.zeros(reader.d_in, dtype=torch.float64)
    squares = squared_error = 0.0
    norms: list[Tensor] = []
    for start in range(0, rows, READ_ROWS):
        x_ND = reader.batch(start, min(READ_ROWS, rows - start))
        norms.append(torch.linalg.vector_norm(x_ND, dim=1))
        x_ND.div_(scale)

        def run(chunk: slice, x_ND: Tensor = x_ND) -> tuple[Tensor, Tensor, float]:
            centred_CD = x_ND[chunk] - b_dec_D
            indices_CK, acts_CK = state.encode(centred_CD)
            error_CD = state.reconstruct(indices_CK, acts_CK) - centred_CD
            return indices_CK, acts_CK, float(error_CD.double().pow(2).sum())

        results = state.for_chunks(run, len(x_ND))
        indices = torch.cat([found for found, _, _ in results]).view(-1)
        acts = torch.cat([found for _, found, _ in results]).view(-1)
        squared_error += sum(error for _, _, error in results)
        max_F.scatter_reduce_(0, indices, acts, "amax")
        sum_F += torch.bincount(indices, weights=acts.double(), minlength=d_sae)
        count_F += torch.bincount(indices[acts > 0], minlength=d_sae)
        sum_D += x_ND.double().sum(0)
        squares += float(x_ND.double().pow(2).sum())
    variance = squares - float(sum_D.pow(2).sum()) / rows
    mean_on_F = (sum_F / count_F.clamp(min=1)).float()
    stats = Stats(max_F * scale, mean_on_F * scale, count_F / rows, float(torch.cat(norms).median()), rows)
    return stats, squared_error / variance, float(count_F.sum()) / rows
