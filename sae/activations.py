"""Activation functions of an SAE: from pre-activations to the latents that are on.

An `Activation` says how a pre-activation becomes a value, latent by latent. TopK alone also lets the latents of a
position race for k places. The rest are pointwise, so that as many latents are on as there are positive values; one
more of them is one more entry in `ACTIVATIONS`.

    topk       relu(h), of each position's k largest h                 Gao et al. 2024, arXiv 2406.04093
    batchtopk  relu(h) where h > threshold, measured while in          Bussmann et al. 2024, arXiv 2412.06410
               training the k * tokens largest of a batch are kept
    relu       relu(h), trained with an L1 penalty                     Bricken et al. 2023
    jumprelu   relu(h) where h > threshold                             Rajamanoharan et al. 2024, arXiv 2407.14435
    gated      relu(exp(r_mag) * m + b_mag) where m + b_enc > 0        Rajamanoharan et al. 2024, arXiv 2404.16014
    prolu      m where m > 0 and m + b_enc > 0                         Taggart 2024

with the projection m = W_enc (x - b_dec) and h = m + b_enc. The pre-activation that a function is given is h, for
gated and prolu m. Matryoshka SAEs (Bussmann et al. 2025, arXiv 2503.17547) run as any other.

Shapes: F latents, K kept latents, N rows, `..` any leading dimensions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.kernels import topk_indices

PerLatent = Mapping[str, Tensor]
"""The SAE's numbers for each latent by their names on disk, such as `b_enc` and `threshold`: (F,), or () for one."""


class Latents(NamedTuple):
    """The latents kept at each position, strongest first. A value of 0 means the slot is not active, and then its index
    means nothing: it may repeat another's."""

    indices: Tensor
    """`..K`, int64"""
    values: Tensor
    """`..K`, float32, never negative"""


def relu(pre: Tensor, _: PerLatent) -> Tensor:
    """`relu(pre)`."""
    return pre.relu()


def above_threshold(pre: Tensor, of: PerLatent) -> Tensor:
    """`relu(pre)` where `pre` is more than the latent's threshold; not the part above it."""
    return torch.where(pre > of["threshold"], pre.relu(), 0.0)


def gated(pre: Tensor, of: PerLatent) -> Tensor:
    """A magnitude with its own scale and bias, where the gate is open."""
    magnitude = torch.addcmul(of["b_mag"], pre, of["r_mag"].exp()).relu()
    return torch.where(pre + of["b_enc"] > 0, magnitude, 0.0)


def prolu(pre: Tensor, of: PerLatent) -> Tensor:
    """The projection itself, where it is positive both without and with the bias."""
    return torch.where((pre > 0) & (pre + of["b_enc"] > 0), pre, 0.0)


def prolu_plain(pre: Tensor, of: PerLatent) -> Tensor:
    """`prolu` where the bias is negative, else `relu(pre + bias)`."""
    return torch.where(of["b_enc"] >= 0, (pre + of["b_enc"]).relu(), prolu(pre, of))


@dataclass(frozen=True)
class Activation:
    """An activation function and what it asks of the SAE."""

    values: Callable[[Tensor, PerLatent], Tensor]
    """Values `..F`, never negative, of pre-activations `..F`; for `topk` those before the race."""
    extra: tuple[str, ...] = ()
    """The tensors (F,) that it has beside `b_enc`, by their names on disk."""
    takes_k: bool = False
    """Whether `k` means anything: what is kept of each position, or for `batchtopk` on average."""
    biased: bool = True
    """Whether its pre-activations contain `b_enc`."""


ACTIVATIONS = {
    "topk": Activation(relu, takes_k=True),
    "batchtopk": Activation(above_threshold, ("threshold",), takes_k=True),
    "relu": Activation(relu),
    "jumprelu": Activation(above_threshold, ("threshold",)),
    "gated": Activation(gated, ("r_mag", "b_mag"), biased=False),
    "prolu": Activation(prolu, biased=False),
}
PROLU_PLAIN = Activation(prolu_plain, biased=False)


def check_activation(name: str, k: int, d_sae: int) -> str | None:
    """What is wrong with an activation function and its k in one clause, or None."""
    if name not in ACTIVATIONS:
        return f"unknown activation {name!r} (known: {', '.join(ACTIVATIONS)})"
    if ACTIVATIONS[name].takes_k and not 1 <= k <= d_sae:
        return f"k is {k}, which is not between 1 and {d_sae}"
    if not ACTIVATIONS[name].takes_k and k != 0:
        return f"k is {k}, but {name} takes no k (0)"
    return None


def topk(pre: Tensor, k: int) -> Latents:
    """The `k` largest pre-activations of each position, negative ones set to 0 (Gao et al. 2024, section 2.3)."""
    rows_NF = pre.reshape(-1, pre.shape[-1])
    found_NK = topk_indices(rows_NF, k)
    values_NK, order_NK = rows_NF.gather(1, found_NK).sort(dim=1, descending=True)
    shape = (*pre.shape[:-1], k)
    return Latents(found_NK.gather(1, order_NK).view(shape), values_NK.relu().view(shape))


def positive(values: Tensor) -> Latents:
    """All positive entries of `values` (`..F`); K is the largest number of them at any position, at least 1."""
    rows_NF = values.reshape(-1, values.shape[-1])
    row_P, latent_P = rows_NF.nonzero(as_tuple=True)
    count_N = torch.bincount(row_P, minlength=len(rows_NF))
    most = max(int(count_N.max()), 1) if len(rows_NF) else 1
    slot_P = torch.arange(len(row_P), device=row_P.device) - (count_N.cumsum(0) - count_N)[row_P]
    indices_NK = torch.zeros(len(rows_NF), most, dtype=torch.int64, device=values.device)
    values_NK = torch.zeros(len(rows_NF), most, dtype=values.dtype, device=values.device)
    indices_NK[row_P, slot_P] = latent_P
    values_NK[row_P, slot_P] = rows_NF[row_P, latent_P]
    values_NK, order_NK = values_NK.sort(dim=1, descending=True)
    shape = (*values.shape[:-1], most)
    return Latents(indices_NK.gather(1, order_NK).view(shape), values_NK.view(shape))


def dense(latents: Latents, d_sae: int) -> Tensor:
    """`..F` with the values of `latents` in place and 0 elsewhere."""
    out = torch.zeros(*latents.values.shape[:-1], d_sae, dtype=latents.values.dtype, device=latents.values.device)
    return out.scatter_add_(-1, latents.indices, latents.values)
