"""The sparse autoencoder: a residual vector in, a few active latents out, and back.

    f = act(W_enc (x - b_dec) + b_enc)        y = W_dec^T f + b_dec

Both matrices are latent-major: row i belongs to latent i. All arithmetic is in float32 whatever the weights are stored
in, so that a copy in bfloat16 finds the latents of its float32 twin up to the rounding of the weights themselves. The
module takes no part in autograd: the trainer writes its gradients out by hand.

Shapes: D width of the residual stream, F latents, K kept latents, `..` any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae.activations import ACTIVATIONS, Latents, check_activation
from sae.kernels import decode_sparse
from sae.screen import MARGIN, MOST_TOKENS, Screen
from sae.screen import available as screening_available

if TYPE_CHECKING:
    from sae.checkpoint import Stats

__all__ = ["SAE", "Latents", "SAEConfig"]

LARGE = 1 << 23
"""Numbers from which on an encoder no longer fits a cache, so that reading it is what a token costs."""


@dataclass(frozen=True)
class SAEConfig:
    d_in: int
    """width of the residual stream"""
    d_sae: int
    """number of latents"""
    activation: str = "topk"
    """a key of `sae.activations.ACTIVATIONS`"""
    k: int = 32
    """latents kept at each token; 0 for an activation function that takes no k"""
    hook: str = ""
    """where in the model it reads, such as `blocks.4.hook_resid_post`"""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise ValueError(f"an SAE cannot have {self.d_sae} latents on a width of {self.d_in}")
        if fault := check_activation(self.activation, self.k, self.d_sae):
            raise ValueError(f"the SAE has a bad activation function: {fault}")


class SAE(nn.Module):
    """An SAE with its statistics (`stats`, None if unmeasured) and the manifest of its making (`manifest`)."""

    def __init__(self, config: SAEConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        super().__init__()
        self.config = config
        self.stats: Stats | None = None
        self.manifest: dict[str, Any] = {}
        self._screen: Screen | None = None

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), requires_grad=False)

        self.W_enc_FD = weight(config.d_sae, config.d_in)
        self.b_enc_F = weight(config.d_sae)
        self.W_dec_FD = weight(config.d_sae, config.d_in)
        self.b_dec_D = weight(config.d_in)

    def pre_activations(self, x: Tensor) -> Tensor:
        """`..F` in float32, before the activation function, for `x` (`..D`) of any float dtype."""
        x = x.float() - self.b_dec_D.float()
        if x.numel() == self.config.d_in:  # one row: read at the speed of the memory
            one_F = torch.addmv(self.b_enc_F.float(), self.W_enc_FD.float(), x.reshape(-1))
            return one_F.view(*x.shape[:-1], -1)
        return nn.functional.linear(x, self.W_enc_FD.float(), self.b_enc_F.float())

    def activate(self, pre: Tensor) -> Latents:
        """The latents that pre-activations `..F` leave on."""
        return ACTIVATIONS[self.config.activation](pre, self.config.k)

    def encode(self, x: Tensor) -> Latents:
        """The latents that are on at each position of `x` (`..D`), strongest first."""
        if self._screen is not None and x.shape[:-1].numel() <= MOST_TOKENS:
            x_BD, k = x.reshape(-1, self.config.d_in).float() - self.b_dec_D, self.config.k
            if (found := self._screen.topk(x_BD, self.W_enc_FD, self.b_enc_F, k)) is not None:
                return Latents(found[0].view(*x.shape[:-1], k), found[1].relu().view(*x.shape[:-1], k))
        return self.activate(self.pre_activations(x))

    def prepare(self) -> None:
        """Make reading one token at a time quick, with the weights as they are now: a big TopK encoder gets a `Screen`.

        Latents stay the same, activations up to the order of float32 sums. It takes a quarter of the encoder's memory.
        """
        weight = self.W_enc_FD
        fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and self.config.activation == "topk"
        if fits and weight.numel() >= LARGE and self.config.k + MARGIN < self.config.d_sae and screening_available():
            self._screen = Screen(weight)

    def decode(self, latents: Latents) -> Tensor:
        """The reconstruction `..D` in float32."""
        k = latents.indices.shape[-1]
        y_BD = decode_sparse(latents.indices.reshape(-1, k), latents.values.reshape(-1, k), self.W_dec_FD.float())
        return y_BD.view(*latents.indices.shape[:-1], self.config.d_in) + self.b_dec_D.float()

    def decoder_direction(self, latent: int) -> Tensor:
        """Row `latent` of the decoder, (D,), in float32. The trainer leaves it at length 1."""
        if not 0 <= latent < self.config.d_sae:
            raise ValueError(f"there is no latent {latent}; this SAE has latents 0 to {self.config.d_sae - 1}")
        return self.W_dec_FD[latent].float()
