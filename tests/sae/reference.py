"""SAEs of every kind with random weights, and what they do to one vector, in float64 by plain loops."""

import math
import statistics
from dataclasses import dataclass

import torch

from sae.model import SAE, SAEConfig

KINDS = ("topk", "batchtopk", "relu", "jumprelu", "gated", "prolu", "prolu_plain")
NORMALISE = ("none", "layer_norm", "unit_norm")
D, F, K = 12, 40, 5
Vector = list[float]


def make_sae(kind: str = "topk", normalise: str = "none", seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    k = K if kind in ("topk", "batchtopk") else 0
    plain = kind == "prolu_plain"
    activation = "prolu" if plain else kind
    sae = SAE(SAEConfig(D, F, activation, k, "blocks.0.hook_resid_post", normalise, prolu_plain=plain))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sae.W_dec_FD.copy_(torch.nn.functional.normalize(draw(F, D), dim=1))
    sae.W_enc_FD.copy_((sae.W_dec_FD + 0.1 * draw(F, D)) * (4 if normalise == "unit_norm" else 1))
    sae.b_enc_F.copy_(0.3 * draw(F))
    sae.b_dec_D.copy_(draw(D) * (1 if normalise == "none" else 0.1))
    for name in sae.config.function.extra:
        sae.weights[name].copy_(draw(F).abs() if name == "threshold" else 0.4 * draw(F))
    return sae


@dataclass
class Encoded:
    f: Vector
    gap: float
    """How far the nearest pre-activation is from where its value would jump."""


class Reference:
    """An SAE in float64."""

    def __init__(self, sae: SAE) -> None:
        self.config = sae.config
        self.w = {name: weight.double().tolist() for name, weight in sae.weights.items()}

    def moments(self, x: Vector) -> tuple[float, float]:
        """(mean, scale) of a vector as its SAE sees them."""
        if self.config.normalise == "none":
            return 0.0, 1.0
        mean = statistics.fmean(x)
        if self.config.normalise == "layer_norm":
            return mean, statistics.stdev(x)
        return mean, math.sqrt(sum((each - mean) ** 2 for each in x))

    def encode(self, x: Vector, push: tuple[int, float] = (0, 0.0)) -> Encoded:
        """The latents of x, with a number added to the pre-activation of one of them."""
        w, (mean, scale) = self.w, self.moments(x)
        if self.config.normalise == "layer_norm":
            scale += 1e-5
        x = [(each - mean) / scale for each in x]
        m = [sum(a * (b - c) for a, b, c in zip(row, x, w["b_dec"], strict=True)) for row in w["W_enc"]]
        m[push[0]] += push[1]
        h = [a + b for a, b in zip(m, w["b_enc"], strict=True)]
        latents = range(len(h))
        match self.config.activation:
            case "topk":
                order = sorted(latents, key=lambda i: -h[i])
                kept = set(order[: self.config.k])
                gap = h[order[self.config.k - 1]] - h[order[self.config.k]]
                return Encoded([max(h[i], 0.0) if i in kept else 0.0 for i in latents], gap)
            case "relu":
                return Encoded([max(each, 0.0) for each in h], 1.0)
            case "batchtopk" | "jumprelu":
                t = w["threshold"]
                f = [max(h[i], 0.0) if h[i] > t[i] else 0.0 for i in latents]
                return Encoded(f, min(abs(h[i] - t[i]) for i in latents))
            case "gated":
                size = [max(math.exp(w["r_mag"][i]) * m[i] + w["b_mag"][i], 0.0) for i in latents]
                return Encoded([size[i] if h[i] > 0 else 0.0 for i in latents], min(map(abs, h)))
            case "prolu":
                plain = [self.config.prolu_plain and b >= 0 for b in w["b_enc"]]
                f = [max(h[i], 0.0) if plain[i] else m[i] if m[i] > 0 and h[i] > 0 else 0.0 for i in latents]
                return Encoded(f, min(min(abs(m[i]), abs(h[i])) for i in latents))
        raise AssertionError(self.config.activation)

    def decode(self, f: Vector, x: Vector) -> Vector:
        mean, scale = self.moments(x)
        y = list(self.w["b_dec"])
        for value, row in zip(f, self.w["W_dec"], strict=True):
            y = [a + value * b for a, b in zip(y, row, strict=True)]
        return [each * scale + mean for each in y]
