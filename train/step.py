"""One training step of an SAE with all gradients written out, and the state it changes.

    y = W_dec^T f + b_dec      loss = mean over tokens of |x - y|^2 / V  +  sparsity term  +  what revives dead latents

V is the total variance of the data; f and the sparsity term are those of `train.objectives`, the rest of
`train.revival`. With Matryoshka prefixes (Bussmann et al. 2025, arXiv 2503.17547) the first term is the mean over the
prefixes of the dictionary, each reconstructing alone. Decoder rows have length 1: the part of their gradient along the
row is taken away before Adam and the length is set after it.

Tokens are encoded chunk by chunk, weights updated range by range of latents: a range's gradient is made, used by Adam
and forgotten while it is in cache. Chunks and ranges are given to threads that each run torch on one core, so that
nothing waits inside an operation; their number changes no bit of the result. Gradients stay factored, as pairs of token
and latent, until then; several batches may be kept and updated from at once, as if they had been one.

Shapes: B tokens, C tokens of a chunk, D width of the residual stream, F latents (of this process), G prefixes, P pairs,
N = G * B rows of errors, R a range of latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from sae.kernels import Encoder
from sae.losses import normalise_rows_, project_gradient_
from train.distributed import ALONE, Team
from train.gradient import Gradient, batch_gradient
from train.objectives import MEMORY, BatchTopK, Objective, objective_of
from train.recipe import Recipe
from train.revival import restart, revival_factor
from train.start import first_weights, screening_dtype

A = TypeVar("A")
T = TypeVar("T")

CHUNK, RANGE = 256, 512
"""Tokens encoded and latents updated at a time: what fits a core's cache."""
GPU_CHUNK, GPU_RANGE = 1 << 14, 1 << 15
"""The same on a GPU: what fills it."""
TOGETHER = 16
"""Ranges whose gradients several processes sum at a time."""
FOLLOW = 0.9
"""Decay of the running L0 by which a coefficient is steered."""
GAIN, SWAY = 0.01, 2.0
"""Steering an L1: largest relative step of the coefficient that is kept; exponent of the running L0 over the one asked
for, by which the coefficient in use leads it."""
LEAN, PULL = 0.001, 20.0
"""Steering an L0, where thresholds answer slowly and come down only when pulled: what each whole ratio above 1 adds to
the coefficient that is kept, at every step, and to that in use, in units of `sparsity`."""


class SparseStep:
    """Weights, Adam moments and activity counters of an SAE in training. Use as a context manager: it owns threads."""

    def __init__(
        self, weights: dict[str, Tensor], recipe: Recipe, variance: float, *, threads: int = 1, team: Team = ALONE
    ):
        self.weights, self.recipe, self.variance = weights, recipe, variance
        self.threads, self.team = threads, team
        self.objective: Objective = objective_of(recipe, variance)
        self.learned = ["W_enc", "W_dec"] + [name for name in self.objective.extra if name != "threshold"]
        self.learned += ["b_enc"] * recipe.learn_b_enc + ["b_dec"] * recipe.learn_b_dec
        self.first_moments = {name: torch.zeros_like(weights[name]) for name in self.learned}
        self.second_moments = {name: torch.zeros_like(weights[name]) for name in self.learned}
        self.mean_weights = {name: w.clone() for name, w in weights.items()} if recipe.ema else {}
        self.updates = torch.zeros((), device=self.device)
        first = 0.0 if recipe.l0_target and self.objective.penalty == "l0" else recipe.sparsity
        self.coefficient = torch.tensor([first, recipe.l0_target], dtype=torch.float64)
        """coefficient of the sparsity term, and the running L0 by which it is steered"""
        self.d_sae, self.d_in = weights["W_enc"].shape
        self.latents = int(team.sum_(torch.tensor(self.d_sae), "shards"))
        """of all processes"""
        self.silent_F = torch.zeros(self.d_sae, dtype=torch.int64, device=self.device)
        """tokens since each latent was last active"""
        self.fired_F = torch.zeros(self.d_sae, dtype=torch.int64, device=self.device)
        """tokens on which each latent was active since somebody set this to 0"""
        self.encoder = Encoder(weights["W_enc"], weights["b_enc"], screen=screening_dtype(recipe, weights["W_enc"]))
        first = team.part(self.latents).start
        edges = torch.tensor(recipe.prefixes or (self.latents,))
        self.prefixes = len(edges)
        numbers_F = torch.arange(first, first + self.d_sae)
        self.prefix_of_F = torch.bucketize(numbers_F, edges, right=True).to(self.device)
        self.k_aux = recipe.k_aux or max(1, self.d_in // 2)
        gpu = self.device.type == "cuda"
        self.chunk, self.range = (GPU_CHUNK, GPU_RANGE) if gpu else (CHUNK, RANGE)
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def begin(
        cls,
        d_sae: int,
        mean_D: Tensor,
        recipe: Recipe,
        seed: int,
        *,
        variance: float,
        threads: int = 1,
        team: Team = ALONE,
        sample_ND: Tensor | None = None,
        device: str = "cpu",
    ) -> SparseStep:
        """A fresh start: decoder rows as `recipe.directions` says, `b_dec` at `mean_D`. With `sample_ND` the kinds
        without k begin with about `recipe.initial_l0` latents on at a token, each as often as any other."""
        weights = first_weights(d_sae, mean_D, recipe, seed, variance, team, sample_ND, device)
        return cls(weights, recipe, variance, threads=threads, team=team)

    @property
    def device(self) -> torch.device:
        return self.weights["W_enc"].device

    def __enter__(self) -> SparseStep:
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.threads)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)
        self._pool = None
        torch.set_num_threads(self._threads_before)

    def state(self) -> dict[str, Tensor]:
        """Everything a later step depends on, for a checkpoint; under `latents`, of this process's slice."""
        moments = {f"first.{name}": m for name, m in self.first_moments.items()}
        moments |= {f"second.{name}": m for name, m in self.second_moments.items()}
        moments |= {f"mean.{name}": m for name, m in self.mean_weights.items()}
        counters = {"updates": self.updates, "coefficient": self.coefficient}
        return self.weights | moments | counters | {"silent": self.silent_F, "fired": self.fired_F}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        for name, own in self.state().items():
            own.copy_(state[name])
        self.encoder.refresh(0, self.d_sae)

    def final_weights(self) -> dict[str, Tensor]:
        """The weights of the finished SAE, the running mean where there is one; jumprelu with its `threshold`."""
        weights = dict(self.mean_weights or self.weights)
        if self.mean_weights and self.recipe.unit_norm:  # the mean of unit rows is a little shorter
            weights["W_dec"] = normalise_rows_(weights["W_dec"].clone())
        if "log_threshold" in weights:
            weights["threshold"] = weights.pop("log_threshold").exp()
        return weights

    def for_chunks(self, work: Callable[[slice], T], tokens: int) -> list[T]:
        """The results of `work` on each chunk of `tokens` tokens, in order."""
        return self.each(work, [slice(i, min(i + self.chunk, tokens)) for i in range(0, tokens, self.chunk)])

    def each(self, work: Callable[[A], T], items: Iterable[A]) -> list[T]:
        assert self._pool is not None, "a step works inside `with`"
        return list(self._pool.map(work, items))

    def gradient(self, x_BD: Tensor, *, k: int | None = None, coefficient: float | None = None) -> Gradient:
        """The gradient of the loss on the rows of this process. `k` and `coefficient` stand in for the recipe's.

        Changes no state. Raises `LossError` where the loss is not finite."""
        strength = self.strength if coefficient is None else coefficient
        return batch_gradient(self, x_BD, self.recipe.k if k is None else k, strength)

    def update(self, gradients: Gradient | Sequence[Gradient], lr: float) -> float:
        """One step of Adam on all weights and the count of silent tokens; the norm of the gradient.

        Several gradients count as one of all their tokens (for batchtopk but for the choice made in each).
        """
        parts = [gradients] if isinstance(gradients, Gradient) else list(gradients)
        tokens = sum(part.tokens for part in parts) * self.team.readers
        scale = 2 / (tokens * self.variance)
        revivals = [part.revival for part in parts if part.revival is not None]
        aux, aux_loss = revival_factor(self.recipe, revivals, self.variance, self.team) if revivals else (0.0, 0.0)
        if revivals:
            parts[0].losses["aux"] = aux_loss
        small = self._small_gradients(parts, aux, scale)
        self._count(parts, tokens)
        self.updates.add_(1)
        edges = [part.by_latent.edges(self.range) for part in parts]
        ranges = range(len(edges[0]) - 1)
        norms: list[Tensor] = []

        def weigh(number: int) -> tuple[Tensor, Tensor]:
            rows = slice(number * self.range, min((number + 1) * self.range, self.d_sae))
            enc_RD, dec_RD = self.weights["W_enc"].new_zeros(2, rows.stop - rows.start, self.d_in)
            for part, edge in zip(parts, edges, strict=True):
                low, high, pairs = edge[number], edge[number + 1], part.by_latent
                pairs.add_product(part.f_P, part.errors_ND, rows.start, dec_RD, low, high, part.column_P)
                pairs.add_product(part.product_P, part.centred_BD, rows.start, enc_RD, low, high, pairs.token_P)
                if part.revival is not None:
                    part.revival.add_weights(rows.start, aux, part.centred_BD, enc_RD, dec_RD)
            return enc_RD.mul_(scale), dec_RD.mul_(scale)

        def project(number: int, grads: tuple[Tensor, Tensor]) -> Tensor:
            rows = slice(number * self.range, number * self.range + len(grads[0]))
            if self.recipe.project:
                project_gradient_(grads[1], self.weights["W_dec"][rows])
            return sum((torch.linalg.vector_norm(grad).double().pow(2) for grad in grads), torch.zeros(()))

        def apply(number: int, grads: tuple[Tensor, Tensor]) -> None:
            rows = slice(number * self.range, number * self.range + len(grads[0]))
            self._adam({"W_enc": grads[0], "W_dec": grads[1]}, lr, rows)
            if self.recipe.unit_norm:
                normalise_rows_(self.weights["W_dec"][rows])
            self.encoder.refresh(rows.start, rows.stop)
            for name in ("W_enc", "W_dec") if self.mean_weights else ():
                self.mean_weights[name][rows].lerp_(self.weights[name][rows], 1 - self._memory(self.recipe.ema))

        def at_once(number: int) -> Tensor:
            grads = weigh(number)
            square = project(number, grads)
            apply(number, grads)
            return square

        others = sum(float(grad.double().pow(2).sum()) for name, grad in small.items() if name != "b_dec")
        if self.team.readers == 1 and not self.recipe.clip:
            self._adam_small(small, lr)
            norms = self.each(at_once, ranges)
        else:
            kept: list[tuple[Tensor, Tensor]] = []
            for start in range(0, len(ranges), TOGETHER):
                some = self.each(weigh, ranges[start : start + TOGETHER])
                for grads in some:
                    self.team.sum_(grads[0], "readers")
                    self.team.sum_(grads[1], "readers")
                numbers = list(ranges[start : start + TOGETHER])
                norms += self.each(lambda pair: project(*pair), zip(numbers, some, strict=True))
                if self.recipe.clip:
                    kept += some
                else:
                    self.each(lambda pair: apply(*pair), zip(numbers, some, strict=True))
            norm = self._norm(norms, others, small)
            if self.recipe.clip:
                shrink = min(1.0, self.recipe.clip / max(norm, 1e-30))
                for grad in (*small.values(), *(grad for grads in kept for grad in grads)):
                    grad.mul_(shrink)
                self.each(lambda pair: apply(*pair), zip(ranges, kept, strict=True))
            self._adam_small(small, lr)
            self.encoder.refresh(0, self.d_sae)
            return norm
        return self._norm(norms, others, small)

    def _norm(self, norms: list[Tensor], others: float, small: dict[str, Tensor]) -> float:
        """Length of the whole gradient."""
        squares = self.team.sum_(torch.stack(norms).sum() + others, "shards")
        b_dec = float(small["b_dec"].double().pow(2).sum()) if "b_dec" in small else 0.0
        return math.sqrt(float(squares) + b_dec)

    def _small_gradients(self, parts: list[Gradient], aux: float, scale: float) -> dict[str, Tensor]:
        """Gradients of the vectors among the weights."""
        b_enc_F = torch.stack([part.b_enc_F for part in parts]).sum(0)
        product_F = torch.zeros_like(b_enc_F)
        for part in parts:
            product_F.index_add_(0, part.by_latent.latent_P.long(), part.product_P)
            if part.revival is not None:
                silent_M = part.revival.found.bias() * aux
                b_enc_F.index_add_(0, part.revival.dead_M, silent_M)
                product_F.index_add_(0, part.revival.dead_M, silent_M)
        small = {name: torch.stack([part.extra[name] for part in parts]).sum(0) for name in parts[0].extra}
        if self.recipe.learn_b_enc:
            small["b_enc"] = b_enc_F
        for grad_F in small.values():
            self.team.sum_(grad_F, "readers")
        if self.recipe.learn_b_dec:
            error_D = torch.stack([part.errors_ND[: part.tokens].sum(0) for part in parts]).sum(0)
            through_D = self.team.sum_(product_F @ self.weights["W_enc"], "shards")
            small["b_dec"] = self.team.sum_(error_D - through_D, "readers")
        return {name: grad.mul_(scale) for name, grad in small.items()}

    def _adam_small(self, small: dict[str, Tensor], lr: float) -> None:
        if small:
            self._adam(small, lr, slice(None))
        for name, mean in self.mean_weights.items():
            if name not in ("W_enc", "W_dec"):
                mean.lerp_(self.weights[name], 1 - self._memory(self.recipe.ema))

    def _memory(self, decay: float) -> float:
        """Decay of a running mean, shorter in the first steps so that the start is soon forgotten."""
        done = float(self.updates)
        return min(decay, done / (9 + done))

    def _count(self, parts: list[Gradient], tokens: int) -> None:
        """Activity of the latents, batchtopk's threshold, and the coefficient that is steered to an L0."""
        counts_F = torch.zeros_like(self.fired_F)
        for part in parts:
            counts_F += torch.bincount(part.by_latent.latent_P[part.f_P > 0], minlength=self.d_sae)
        self.team.sum_(counts_F, "readers")
        self.fired_F += counts_F
        self.silent_F.add_(tokens).masked_fill_(counts_F > 0, 0)
        if isinstance(self.objective, BatchTopK):
            on = [part.f_P[part.f_P > 0] for part in parts]
            smallest = torch.cat([*on, on[0].new_full((1,), math.inf)]).min()
            self.objective.follow(self.weights, self.team.gather(smallest[None]).min(), self._memory(MEMORY))
        if self.recipe.l0_target:
            self._steer(sum(part.active for part in parts) / tokens)

    @property
    def strength(self) -> float:
        """The coefficient of the sparsity term in use; of an L0 it may be negative, so that thresholds come down."""
        kept, running = float(self.coefficient[0]), float(self.coefficient[1])
        if not self.recipe.l0_target:
            return kept
        ratio = running / self.recipe.l0_target
        if self.objective.penalty == "l0":
            return kept + PULL * self.recipe.sparsity * (ratio - 1)
        return kept * float(ratio**SWAY)

    def _steer(self, l0: float) -> None:
        """Moves the coefficient towards the L0 asked for: up while more latents are on, down while fewer."""
        kept, running = self.coefficient.tolist()
        running = FOLLOW * running + (1 - FOLLOW) * min(l0, 2 * self.recipe.l0_target)
        ratio = max(running, 1e-3) / self.recipe.l0_target
        if self.objective.penalty == "l0":
            kept += LEAN * self.recipe.sparsity * (ratio - 1)
        else:
            kept *= math.exp(GAIN * max(-1.0, min(1.0, math.log(ratio))))
        self.coefficient[0], self.coefficient[1] = kept, running

    def resample(self, x_BD: Tensor, seed: int) -> int:
        """Starts dead latents again at rows of x that are badly reconstructed; how many (`train.revival.restart`)."""
        gradient = self.gradient(x_BD)
        dead_F = self.silent_F >= self.recipe.dead_after
        moments = [self.first_moments, self.second_moments]
        count = restart(self.weights, moments, dead_F, gradient.centred_BD, gradient.error_BD, seed, self.team)
        self.silent_F.masked_fill_(dead_F, 0)
        self.encoder.refresh(0, self.d_sae)
        return count

    def _adam(self, gradients: dict[str, Tensor], lr: float, rows: slice) -> None:
        def taken(tensors: dict[str, Tensor]) -> list[Tensor]:
            return [tensors[name][rows] for name in gradients]

        recipe = self.recipe
        fused = torch._fused_adamw_ if recipe.weight_decay else torch._fused_adam_
        fused(
            taken(self.weights),
            list(gradients.values()),
            taken(self.first_moments),
            taken(self.second_moments),
            [],
            [self.updates] * len(gradients),
            lr=lr,
            beta1=recipe.beta1,
            beta2=recipe.beta2,
            weight_decay=recipe.weight_decay,
            eps=recipe.eps,
            amsgrad=False,
            maximize=False,
        )
