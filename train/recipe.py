"""What a training step must know, all of it constant over a run: the kind of SAE, its loss, its optimiser. No torch.

`train.config.TrainConfig` holds these fields among those of a whole run; each says there what it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from train.errors import TrainError

Arch = Literal["topk", "batchtopk", "relu", "jumprelu", "gated", "prolu"]
Revival = Literal["auxk", "ghost", "resample", "none"]
COUNTED: tuple[Arch, ...] = ("topk", "batchtopk")
"""Kinds that keep k latents; the others are held sparse by a term of the loss."""


@dataclass(frozen=True)
class Recipe:
    """The loss and the optimiser of one SAE, for inputs at a scale where their total variance is about D."""

    arch: Arch = "topk"
    """kind of SAE; the papers are named in `train.objectives`"""
    k: int = 32
    """latents kept at each token (topk) or on average (batchtopk); the others have no use for it"""
    sparsity: float = 0.02
    """coefficient of the sparsity term: of the L1 norm over the root of the data's variance, for jumprelu of the L0"""
    l0_target: float = 0.0
    """L0 to which the coefficient is steered while training; 0 keeps the coefficient as it is"""
    initial_l0: float = 64.0
    """latents that are on at a token when a kind without k starts: biases or thresholds are set for it from a sample"""
    bandwidth: float = 0.003
    """jumprelu: width of the window in which thresholds get a gradient, in roots of the data's variance"""
    prolu_gradient: Literal["relu", "ste"] = "relu"
    """prolu: which of the two gradients its gate gets"""
    prolu_plain: bool = False
    """prolu: a latent whose bias is not negative is a plain ReLU"""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: the first so many latents must reconstruct alone as well; rising, the last one is all of them"""
    revival: Revival = "auxk"
    """what brings dead latents back"""
    k_aux: int = 0
    """AuxK: dead latents that explain a token's error together; 0 stands for half the width"""
    aux_coefficient: float = 1 / 32
    """weight of AuxK in the loss"""
    aux_min_dead: int = 0
    """AuxK and ghost gradients wait until so many latents are dead"""
    dead_after: int = 1_000_000
    """tokens without activity after which a latent counts as dead"""
    directions: Literal["random", "orthogonal"] = "random"
    """first decoder rows: random of length 1, or orthonormal in blocks as large as the width"""
    tied_start: bool = True
    """the encoder starts as the decoder, and is free afterwards"""
    scaled_start: bool = True
    """the encoder starts at the length with which the first activations reconstruct a sample best"""
    learn_b_enc: bool = True
    """off: the encoder's bias stays as it starts"""
    learn_b_dec: bool = True
    """off: the decoder's bias stays as it starts"""
    unit_norm: bool = True
    """decoder rows are set back to length 1 after each step"""
    project: bool = True
    """the decoder's gradient loses its part along each row before Adam sees it"""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    """of Adam; these gradients are far below the usual 1e-8"""
    weight_decay: float = 0.0
    """above 0: AdamW"""
    clip: float = 0.0
    """largest norm of the whole gradient; 0 is off. It costs a copy of both weights"""
    ema: float = 0.0
    """decay of a running mean of the weights, which then is the finished SAE; 0 is off"""
    screen: Literal["auto", "bfloat16", "float32"] = "auto"
    """precision in which a topk encoder finds candidates; they are scored with the weights as they are"""
    dtype: Literal["float32", "float64"] = "float32"
    """of weights, moments and arithmetic"""

    def check(self, latents: int) -> None:
        """Raises `TrainError` naming the first value that cannot be."""
        for name, kinds in (("arch", Arch), ("revival", Revival)):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise TrainError(f"{name} is {value!r}", f"known: {', '.join(get_args(kinds))}")
        choices = {
            "prolu_gradient": ("relu", "ste"),
            "directions": ("random", "orthogonal"),
            "screen": ("auto", "bfloat16", "float32"),
            "dtype": ("float32", "float64"),
        }
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise TrainError(f"{name} is {value!r}, but must be {' or '.join(known)}")
        if self.arch in COUNTED and not 1 <= self.k <= latents:
            raise TrainError(f"k is {self.k}, but must lie between 1 and the {latents} latents there are")
        if self.prefixes and (
            list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[0] < 1 or self.prefixes[-1] != latents
        ):
            raise TrainError(f"the prefixes are {self.prefixes}", f"they must rise, and end with all {latents} latents")
        if self.arch not in COUNTED and not self.unit_norm:
            raise TrainError(
                f"{self.arch} needs decoder rows of length 1", "else long rows would make small activations"
            )
        for name in ("sparsity", "l0_target", "aux_coefficient", "weight_decay", "clip", "aux_min_dead", "k_aux"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise TrainError(f"{name} is {value}, but must not be negative")
        for name in ("initial_l0", "bandwidth", "eps", "dead_after"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise TrainError(f"{name} is {value}, but must be above 0")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise TrainError(f"{name} is {value}, but must be at least 0 and below 1")
        if self.l0_target > latents:
            raise TrainError(f"l0_target is {self.l0_target}, more than the {latents} latents there are")
