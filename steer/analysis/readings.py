"""Ways to read an SAE otherwise than its folder says, and how well each one reconstructs what the model does.

A `Reading` is one such way: which residuals, which weights, what stands around the encoder. Each family holds the
mistakes that files in the wild come with: another hook, inputs that were normalised or scaled in training, weights laid
out otherwise, another k. All are tried on the same few tokens, and FVU decides.

Shapes: N tokens, D width of the residual stream, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llama_3.config import ModelConfig
from llama_3.hooks import SITES, HookPoint
from sae.losses import fvu, l0
from sae.model import NORMALISE, SAE

CHUNK = 1 << 25
"""Pre-activations computed at once."""


@dataclass(frozen=True)
class Reading:
    """One way to take an SAE."""

    family: str
    """The check that fails where this reading is the right one: hook, normalise, weights, k, bos, dtype."""
    name: str
    """What it is, after "this SAE fits"."""
    hint: str
    """What to change, so that the SAE is read in this way."""
    x_ND: Tensor
    """float32"""
    sae: SAE = field(repr=False)
    factor: Tensor | float = 1.0
    """What inputs are multiplied by and reconstructions divided by: a number, or (N, 1)."""


@dataclass(frozen=True)
class Fit:
    """How well a reading does on the tokens it was tried on; NaN where the residuals are no numbers."""

    fvu: float
    l0: float
    activation: float
    """Sum of a token's activations, mean over tokens."""


def fit(reading: Reading) -> Fit:
    """FVU, L0 and summed activations of a reading."""
    sae, parts, x_ND = reading.sae, [], reading.x_ND * reading.factor
    if not bool(reading.x_ND.isfinite().all()):
        return Fit(math.nan, math.nan, math.nan)
    sums = []
    with torch.inference_mode():
        for part_ND in torch.split(x_ND, max(1, CHUNK // sae.config.d_sae)):
            latents = sae.encode(part_ND)
            parts.append(sae.decode(latents, part_ND))
            l0_mean, activation = float(l0(latents.values)), float(latents.values.sum(-1).mean())
            sums.append((l0_mean * len(part_ND), activation * len(part_ND)))
        y_ND = torch.cat(parts) / reading.factor
        l0_mean, activation = (sum(column) / len(x_ND) for column in zip(*sums, strict=True))
        return Fit(float(fvu(reading.x_ND.double(), y_ND.double())), l0_mean, activation)


def places(config: ModelConfig, named: HookPoint, width: int) -> tuple[HookPoint, ...]:
    """Where else the SAE may stand, `named` first: all sites of its layer and the two beside it, its own site and what
    leaves the block in every layer. A block's input is not listed beside the same tensor, the output of the one
    before."""
    near = range(max(0, named.layer - 1), min(config.n_layers, named.layer + 2))
    found = [named]
    found += [HookPoint(layer, site) for layer in near for site in SITES]
    found += [HookPoint(layer, site) for site in (named.site, "resid_post") for layer in range(config.n_layers)]
    found.append(HookPoint(0, "resid_pre"))
    seen, kept = set[HookPoint](), []
    for point in found:
        same = HookPoint(point.layer - 1, "resid_post") if point.site == "resid_pre" and point.layer else point
        if same not in seen and point.width(config) == width:
            seen.add(same)
            kept.append(point)
    return tuple(kept)


def hook_readings(sae: SAE, at: Mapping[HookPoint, Tensor], named: HookPoint) -> Iterator[Reading]:
    """The SAE at each other place, `at` holding what is there (N, D)."""
    for point, x_ND in at.items():
        if point != named:
            hint = f"write `{point}` as `hook` in its cfg.json"
            yield Reading("hook", str(point), hint, x_ND, sae)


def normalise_readings(sae: SAE, x_ND: Tensor) -> Iterator[Reading]:
    """Inputs normalised per token, and inputs scaled as a whole by the usual conventions and by powers of two."""
    written, d_in = sae.config.normalise, sae.config.d_in
    for mode in NORMALISE:
        if mode != written and d_in > 1:
            name = "inputs that are not normalised" if mode == "none" else f"inputs normalised by {mode}"
            hint = f'write `"normalise": "{mode}"` in its cfg.json'
            yield Reading("normalise", name, hint, x_ND, _with(sae, normalise=mode))
    plain = _with(sae, normalise="none")
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True).clamp(min=1e-30)
    why = "its folder cannot say so: train it again, or on rows without that normalisation"
    root = math.sqrt(d_in)
    yield Reading("normalise", f"each input brought to the length {root:.3g}", why, x_ND, plain, root / norm_N1)
    mean, spread = float(norm_N1.mean()), float(x_ND.var(0, correction=0).mean().sqrt())
    factors = {
        f"inputs scaled to a mean length of sqrt({d_in})": root / mean,
        "inputs scaled to a mean length of 1": 1 / mean,
        "inputs scaled to a variance of 1": 1 / max(spread, 1e-30),
    }
    factors |= {f"inputs scaled by {2.0**power:g}": 2.0**power for power in range(-7, 8) if power}
    for name, factor in factors.items():
        if abs(math.log2(factor)) > 0.2:  # nearer to 1 it is what the folder says
            hint = f"multiply W_enc by {factor:.4g} and divide W_dec and b_dec by it"
            yield Reading("normalise", f"{name} (times {factor:.3g})", hint, x_ND, plain, factor)


def weight_readings(sae: SAE, x_ND: Tensor) -> Iterator[Reading]:
    """Matrices laid out the other way round, exchanged, and biases used by another convention.

    A matrix (D, F) that was taken for (F, D) has its numbers in the wrong order: reading it as (D, F) again and
    transposing puts them right, and is the plain transpose where F is D.
    """
    W_enc_FD, W_dec_FD, b_dec_D = sae.W_enc_FD.float(), sae.W_dec_FD.float(), sae.b_dec_D.float()
    layouts = {
        "with its encoder transposed": {"W_enc": _relaid(W_enc_FD)},
        "with its decoder transposed": {"W_dec": _relaid(W_dec_FD)},
        "with both its matrices transposed": {"W_enc": _relaid(W_enc_FD), "W_dec": _relaid(W_dec_FD)},
        "with encoder and decoder exchanged": {"W_enc": W_dec_FD, "W_dec": W_enc_FD},
        "with b_dec not taken off its inputs": {"b_enc": sae.b_enc_F.float() + W_enc_FD @ b_dec_D},
        "without b_dec": {"b_dec": torch.zeros_like(b_dec_D)},
    }
    if not sae.config.function.biased:
        del layouts["with b_dec not taken off its inputs"]
    for name, weights in layouts.items():
        hint = f"write {' and '.join(weights)} of its sae.safetensors anew, or convert the SAE again"
        yield Reading("weights", name, hint, x_ND, _with(sae, weights))


def k_readings(sae: SAE, x_ND: Tensor) -> Iterator[Reading]:
    """Other numbers of latents for an SAE that keeps the k largest."""
    if sae.config.activation != "topk":
        return
    k = sae.config.k
    others = [k // 2**power for power in range(5, 0, -1)] + [k * 2**power for power in range(1, 6)]
    for other in sorted({other for other in others if 0 < other <= sae.config.d_sae}):
        hint = f'write `"k": {other}` in its cfg.json'
        yield Reading("k", f"with k {other}", hint, x_ND, _with(sae, k=other))


def agreement(sae: SAE) -> float:
    """Cosine of a latent's encoder and decoder rows, mean over (at most 4,096) latents: far from 0 in trained SAEs."""
    rows_F = torch.linspace(0, sae.config.d_sae - 1, min(4096, sae.config.d_sae)).long()
    encoder, decoder = (weight[rows_F.to(weight.device)].float() for weight in (sae.W_enc_FD, sae.W_dec_FD))
    return float(torch.cosine_similarity(encoder, decoder, dim=1).mean())


def _relaid(weight_FD: Tensor) -> Tensor:
    latents, width = weight_FD.shape
    return weight_FD.reshape(width, latents).t().contiguous()


def _with(sae: SAE, weights: Mapping[str, Tensor] | None = None, **changes: object) -> SAE:
    """The SAE with some weights or settings changed; the others are shared."""
    config = replace(sae.config, **changes)  # type: ignore[arg-type]  # fields of the config, by name
    return SAE.of(config, {name: weight.data for name, weight in sae.weights.items()} | dict(weights or {}))
