"""Losses and measures of an SAE as pure functions, and what keeps its decoder rows at length 1.

Shapes: B tokens, D width of the residual stream, F latents, K kept latents.
"""

import torch
from torch import Tensor


def mse(x_BD: Tensor, y_BD: Tensor) -> Tensor:
    """Squared distance of x and y summed over D, mean over tokens (a scalar)."""
    return (x_BD - y_BD).pow(2).sum(-1).mean()


def total_variance(x_BD: Tensor) -> Tensor:
    """Squared distance of x from its mean over tokens, summed over D, mean over tokens (a scalar)."""
    return mse(x_BD, x_BD.mean(0))


def normalised_mse(x_BD: Tensor, y_BD: Tensor, variance: Tensor | float) -> Tensor:
    """`mse` as a share of a variance measured once on the data, so that the loss does not depend on their scale."""
    return mse(x_BD, y_BD) / variance


def fvu(x_BD: Tensor, y_BD: Tensor) -> Tensor:
    """Fraction of variance unexplained: sum of squared norms of x - y over that of x - mean x, on these tokens."""
    return mse(x_BD, y_BD) / total_variance(x_BD)


def l0(values_BK: Tensor) -> Tensor:
    """Mean number of active latents at a token (a scalar)."""
    return (values_BK > 0).sum(-1).float().mean()


def cosine(x_BD: Tensor, y_BD: Tensor) -> Tensor:
    """Cosine of the angle between x and y, mean over tokens (a scalar); 0 where either is zero."""
    return torch.nn.functional.cosine_similarity(x_BD, y_BD, dim=-1).mean()


def l1(values_BK: Tensor, norms_BK: Tensor | float = 1.0) -> Tensor:
    """Sum of a token's activations, mean over tokens (a scalar): the penalty of Bricken et al. 2023. `norms_BK`, the
    lengths of their decoder rows, are needed where these are not 1, or the penalty could be had away by scaling."""
    return (values_BK.abs() * norms_BK).sum(-1).mean()


def auxk(error_BD: Tensor, revived_BD: Tensor) -> Tensor:
    """How far dead latents are from explaining what the live ones missed, `mse` as a share of the variance of that
    (a scalar; 0 where nothing varies). Gao et al. 2024, appendix A.2; the normaliser is that of their code."""
    loss = mse(error_BD, revived_BD) / total_variance(error_BD)
    return torch.where(loss.isfinite(), loss, 0.0)


def auxk_target(x_BD: Tensor, y_BD: Tensor) -> Tensor:
    """What the dead latents are asked to explain: the part of x that the live ones missed, as a constant
    (Gao et al. 2024, appendix A.2)."""
    return (x_BD - y_BD).detach()


def normalise_rows_(W_dec_FD: Tensor) -> Tensor:
    """Scales every latent's decoder row to length 1, in place."""
    return W_dec_FD.div_(torch.linalg.vector_norm(W_dec_FD, dim=1, keepdim=True).clamp_(min=1e-12))


def project_gradient_(grad_FD: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Takes from each latent's gradient its part along that latent's decoder row, of length 1, in place.

    Without it Adam would spend its step on a change of length that `normalise_rows_` undoes.
    """
    return grad_FD.addcmul_((grad_FD * W_dec_FD).sum(1, keepdim=True), W_dec_FD, value=-1.0)
