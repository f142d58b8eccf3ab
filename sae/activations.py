"""Activation functions of an SAE: from pre-activations to the latents that are on.

Each takes `pre_..F` and the number `k` of latents it may keep, and returns `Latents`. A new activation function is one
more entry in `ACTIVATIONS`; nothing else in the package asks which one is in use.

Shapes: F latents, K kept latents, `..` any leading dimensions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sae.kernels import topk_indices


class Latents(NamedTuple):
    """The latents kept at each position, strongest first. A value of 0 means the slot is not active."""

    indices: Tensor
    """`..K`, int64"""
    values: Tensor
    """`..K`, float32, never negative"""


def topk(pre: Tensor, k: int) -> Latents:
    """The `k` largest pre-activations of each position, negative ones set to 0 (Gao et al. 2024, section 2.3)."""
    rows_BF = pre.reshape(-1, pre.shape[-1])
    found_BK = topk_indices(rows_BF, k)
    values_BK, order_BK = rows_BF.gather(1, found_BK).sort(dim=1, descending=True)
    shape = (*pre.shape[:-1], k)
    return Latents(found_BK.gather(1, order_BK).view(shape), values_BK.relu().view(shape))


def relu(pre: Tensor, k: int) -> Latents:
    """All positive pre-activations; K is the largest number of them at any position (at least 1). `k` must be 0."""
    assert k == 0, "relu keeps whatever is positive"
    most = int((pre > 0).sum(-1).max()) if pre.numel() else 0
    return topk(pre, max(most, 1))


ACTIVATIONS: dict[str, Callable[[Tensor, int], Latents]] = {"topk": topk, "relu": relu}


def check_activation(name: str, k: int, d_sae: int) -> str | None:
    """What is wrong with an activation function and its k in one clause, or None."""
    if name not in ACTIVATIONS:
        return f"unknown activation {name!r} (known: {', '.join(ACTIVATIONS)})"
    if name == "topk" and not 1 <= k <= d_sae:
        return f"k is {k}, which is not between 1 and {d_sae}"
    if name == "relu" and k != 0:
        return f"k is {k}, but relu takes no k (0)"
    return None


def dense(latents: Latents, d_sae: int) -> Tensor:
    """`..F` with the values of `latents` in place and 0 elsewhere."""
    out = torch.zeros(*latents.values.shape[:-1], d_sae, dtype=latents.values.dtype, device=latents.values.device)
    return out.scatter_(-1, latents.indices, latents.values)
