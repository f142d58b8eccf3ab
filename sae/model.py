"""The sparse autoencoder: a residual vector in, a few active latents out, and back.

    f = act(W_enc (x - b_dec) + b_enc)        y = W_dec^T f + b_dec

Both matrices are latent-major: row i belongs to latent i. `sae/activations.py` has the activation functions. An SAE may
normalise each token by itself, x' = (x - mean) / size over its D numbers, and then its output is y * size + mean; the
normal way is a scale of the whole data, which is folded into the weights. All arithmetic is in float32 whatever the
weights are stored in, so that a copy in bfloat16 finds the latents of its float32 twin up to the rounding of the
weights themselves. The module takes no part in autograd: the trainer writes its gradients out by hand.

Shapes: D width of the residual stream, F latents, K kept latents, P active latents of all rows, `..` any leading
dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae.activations import ACTIVATIONS, PROLU_PLAIN, Activation, Latents, check_activation, positive, topk
from sae.kernels import decode_pairs, decode_sparse
from sae.screen import MARGIN, MOST_TOKENS, Screen
from sae.screen import available as screening_available

if TYPE_CHECKING:
    from sae.checkpoint import Stats

__all__ = ["SAE", "Latents", "SAEConfig"]

LARGE = 1 << 23
"""Numbers from which on an encoder no longer fits a cache, so that reading it is what a token costs."""
_FEW = 8
"""Up to this many rows a CPU's product is quicker with the weight on the left: it is read once, by all threads."""

NORMALISE = ("none", "layer_norm", "unit_norm")
LAYER_NORM_EPS = 1e-5
"""Added to the standard deviation on the way in; the way out uses it as it is (Gao et al. 2024's code)."""


@dataclass(frozen=True)
class SAEConfig:
    d_in: int
    """width of the residual stream"""
    d_sae: int
    """number of latents"""
    activation: str = "topk"
    """a key of `sae.activations.ACTIVATIONS`"""
    k: int = 32
    """latents kept at each token, for `batchtopk` on average; 0 for an activation function that takes no k"""
    hook: str = ""
    """where in the model it reads, such as `blocks.4.hook_resid_post`"""
    normalise: str = "none"
    """per token: `layer_norm` by mean and standard deviation, `unit_norm` by mean and length"""
    prefixes: tuple[int, ...] = ()
    """numbers of first latents that were each trained to reconstruct alone (Matryoshka, Bussmann et al. 2025)"""
    prolu_plain: bool = False
    """for `prolu`: a plain ReLU where the bias is not negative"""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise ValueError(f"an SAE cannot have {self.d_sae} latents on a width of {self.d_in}")
        if fault := check_activation(self.activation, self.k, self.d_sae):
            raise ValueError(f"the SAE has a bad activation function: {fault}")
        if self.normalise not in NORMALISE:
            raise ValueError(f"the SAE normalises by {self.normalise!r} (known: {', '.join(NORMALISE)})")
        if self.normalise != "none" and self.d_in < 2:
            raise ValueError(f"the SAE normalises by {self.normalise}, which takes a width of at least 2")
        if list(self.prefixes) != sorted({prefix for prefix in self.prefixes if 1 <= prefix <= self.d_sae}):
            raise ValueError(f"the SAE's prefixes {list(self.prefixes)} do not rise from at least 1 to {self.d_sae}")
        if self.prolu_plain and self.activation != "prolu":
            raise ValueError(f"the SAE has prolu_plain, but its activation function is {self.activation}")

    @property
    def function(self) -> Activation:
        """Its activation function."""
        return PROLU_PLAIN if self.prolu_plain else ACTIVATIONS[self.activation]

    @property
    def kind(self) -> str:
        """How it is spoken of: `topk-32`, `jumprelu`."""
        return f"{self.activation}-{self.k}" if self.k else self.activation


class SAE(nn.Module):
    """An SAE with its statistics (`stats`, None if unmeasured) and the manifest of its making (`manifest`)."""

    threshold_F: nn.Parameter
    """of `batchtopk` and `jumprelu` only"""
    r_mag_F: nn.Parameter
    """of `gated` only, as `b_mag_F`"""
    b_mag_F: nn.Parameter

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
        for name in config.function.extra:
            setattr(self, f"{name}_F", weight(config.d_sae))

    @classmethod
    def of(cls, config: SAEConfig, weights: dict[str, Tensor]) -> SAE:
        """The SAE with these weights, by their names on disk; the tensors are used where they lie, not copied."""
        sae = cls(config, device="meta")
        for name, held in sae.weights.items():
            assert weights[name].shape == held.shape, f"{name} is {tuple(weights[name].shape)}, not {tuple(held.shape)}"
            suffix = {"W_enc": "FD", "W_dec": "FD", "b_dec": "D"}.get(name, "F")
            setattr(sae, f"{name}_{suffix}", nn.Parameter(weights[name], requires_grad=False))
        return sae

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters by their names on disk: `W_enc`, `b_enc`, `W_dec`, `b_dec`, and what its activation has."""
        extra = {name: self.get_parameter(f"{name}_F") for name in self.config.function.extra}
        return {"W_enc": self.W_enc_FD, "b_enc": self.b_enc_F, "W_dec": self.W_dec_FD, "b_dec": self.b_dec_D} | extra

    def pre_activations(self, x: Tensor) -> Tensor:
        """`..F` in float32, what the activation function takes, for `x` (`..D`) of any float dtype: with `b_enc`, but
        for gated and prolu, which have other uses for it, without."""
        centred, weight = self._centred(x), self.W_enc_FD.float()
        bias = self.b_enc_F.float() if self.config.function.biased else None
        rows_RD = centred.reshape(-1, self.config.d_in)
        if len(rows_RD) == 1:  # read at the speed of the memory
            pre_F = torch.mv(weight, rows_RD[0]) if bias is None else torch.addmv(bias, weight, rows_RD[0])
            return pre_F.view(*x.shape[:-1], -1)
        if 1 < len(rows_RD) <= _FEW and not x.is_cuda:
            pre_FR = weight @ rows_RD.t() if bias is None else torch.addmm(bias[:, None], weight, rows_RD.t())
            return pre_FR.t().reshape(*x.shape[:-1], -1)
        return nn.functional.linear(centred, weight, bias)

    def activate(self, pre: Tensor) -> Latents:
        """The latents that pre-activations `..F` leave on."""
        if self.config.activation == "topk":
            return topk(pre, self.config.k)
        return positive(self.config.function.values(pre, self._per_latent()))

    def encode(self, x: Tensor) -> Latents:
        """The latents that are on at each position of `x` (`..D`), strongest first. K is the config's k for topk, else
        the largest number of active latents at any position."""
        if self._screen is not None and x.shape[:-1].numel() <= MOST_TOKENS:
            x_BD, k = self._centred(x).reshape(-1, self.config.d_in), self.config.k
            if (found := self._screen.topk(x_BD, self.W_enc_FD, self.b_enc_F, k)) is not None:
                return Latents(found[0].view(*x.shape[:-1], k), found[1].relu().view(*x.shape[:-1], k))
        return self.activate(self.pre_activations(x))

    def read(self, x: Tensor, latent: int) -> Tensor:
        """What the encoder reads of one latent at each position of `x`, `..`; for topk before the race for k places."""
        function, of = self.config.function, self._per_latent(latent)
        pre = self._centred(x) @ self.W_enc_FD[latent].float()
        return function.values(pre + of["b_enc"] if function.biased else pre, of)

    def prepare(self) -> None:
        """Make reading one token at a time quick, with the weights as they are now: a big TopK encoder gets a `Screen`.

        Latents stay the same, activations up to the order of float32 sums. It takes a quarter of the encoder's memory.
        """
        weight = self.W_enc_FD
        fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and self.config.activation == "topk"
        if fits and weight.numel() >= LARGE and self.config.k + MARGIN < self.config.d_sae and screening_available():
            self._screen = Screen(weight)

    def decode(self, latents: Latents, x: Tensor | None = None) -> Tensor:
        """The reconstruction `..D` in float32. An SAE that normalises per token needs the `x` (`..D`) that was encoded,
        whose mean and size the reconstruction gets."""
        k, weight = latents.indices.shape[-1], self.W_dec_FD.float()
        indices_BK, values_BK = latents.indices.reshape(-1, k), latents.values.reshape(-1, k)
        if self.config.activation == "topk":
            y_BD = decode_sparse(indices_BK, values_BK, weight)
        else:  # one position with many active latents must not make all others wide
            on_BK = values_BK != 0
            count_B = on_BK.sum(1)
            y_BD = decode_pairs(indices_BK[on_BK], values_BK[on_BK], count_B.cumsum(0) - count_B, weight)
        y = y_BD.view(*latents.indices.shape[:-1], self.config.d_in) + self.b_dec_D.float()
        if self.config.normalise == "none":
            return y
        assert x is not None, f"an SAE with {self.config.normalise} decodes beside the x it encoded"
        return y * self.scale(x) + x.float().mean(-1, keepdim=True)

    def scale(self, x: Tensor) -> Tensor | float:
        """What a position's output is multiplied by, `..1`: the size of its `x` (`..D`), or 1 without normalisation."""
        if self.config.normalise == "none":
            return 1.0
        x = x.float()
        if self.config.normalise == "layer_norm":
            return x.std(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True).sqrt()

    def scale_at(self, norm: float) -> float:
        """The scale at a position whose `x` has this norm and mean 0."""
        sizes = {"none": 1.0, "layer_norm": norm / math.sqrt(max(self.config.d_in - 1, 1)), "unit_norm": norm}
        return sizes[self.config.normalise]

    def decoder_direction(self, latent: int) -> Tensor:
        """Row `latent` of the decoder, (D,), in float32. The trainer leaves it at length 1."""
        if not 0 <= latent < self.config.d_sae:
            raise ValueError(f"there is no latent {latent}; this SAE has latents 0 to {self.config.d_sae - 1}")
        return self.W_dec_FD[latent].float()

    def _centred(self, x: Tensor) -> Tensor:
        """What the encoder's weights are multiplied with, `..D` in float32: `x`, normalised, less `b_dec`."""
        x = x.float()
        if self.config.normalise != "none":
            size = self.scale(x)
            size = (
                size + LAYER_NORM_EPS if self.config.normalise == "layer_norm" else torch.as_tensor(size).clamp(1e-30)
            )
            x = (x - x.mean(-1, keepdim=True)) / size
        return x - self.b_dec_D.float()

    def _per_latent(self, latent: int | slice = slice(None)) -> dict[str, Tensor]:
        return {name: self.weights[name][latent].float() for name in ("b_enc", *self.config.function.extra)}
