"""One training step of a TopK SAE with all gradients written out, and the state it changes.

    f = topk(relu(W_enc (x - b_dec) + b_enc))      y = W_dec^T f + b_dec
    loss = |x - y|^2 / V + c * |(x - y) - W_dec^T f'|^2 / V'

V is the total variance of the data. f' keeps, of the dead latents alone, the `k_aux` largest; the second term, AuxK,
asks them to explain what the live ones missed, V' being the variance of that (Gao et al. 2024, appendix A.2). Decoder
rows have length 1: the part of their gradient along the row is taken away before Adam and the length is set after it.
Inputs are expected at a scale where their total variance is D, so that one learning rate fits any model.

Tokens are encoded chunk by chunk, weights updated range by range of latents: a range's gradient is made, used by Adam
and forgotten while it is in cache. Chunks and ranges are given to threads that each run torch on one core, so that
nothing waits inside an operation; their number changes no bit of the result.

Shapes: B tokens, C tokens of a chunk, D width of the residual stream, F latents, K kept latents, M dead latents, R a
range of latents.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sae.kernels import Encoder, TokensByLatent, decode_sparse, gather_dot, topk_indices
from sae.losses import normalise_rows_, project_gradient_, total_variance

A = TypeVar("A")
T = TypeVar("T")

RANGE = 512
"""Latents updated at a time."""

CHUNK = 256
"""Tokens encoded at a time."""


@dataclass(frozen=True)
class Recipe:
    """What a step must know, all of it constant over a run."""

    k: int
    k_aux: int
    aux_coefficient: float
    dead_after: int
    """tokens without activity after which a latent counts as dead"""
    variance: float
    """V, of the data at the scale of the inputs"""
    screen: torch.dtype = torch.float32
    """precision in which candidates for the k are found; they are scored in float32"""


@dataclass(frozen=True)
class AuxGradient:
    """AuxK of a batch: the dead latents, what each did and how the loss changes with its pre-activation."""

    dead_M: Tensor
    acts_BM: Tensor
    d_pre_BM: Tensor
    miss_BD: Tensor
    """gradient by the reconstruction of what the live latents missed"""


@dataclass(frozen=True)
class Gradient:
    """The gradient of a batch in factored form: weight gradients come range by range from `weights`."""

    by_latent: TokensByLatent
    acts: Tensor
    """kept activations times 2 / (B V), in the order of `by_latent`"""
    d_acts: Tensor
    """gradient by the kept activations"""
    error_BD: Tensor
    """y - x"""
    centred_BD: Tensor
    aux: AuxGradient | None
    b_enc_F: Tensor
    b_dec_D: Tensor

    def weights(self, first: int, low: int, high: int, out_enc_RD: Tensor, out_dec_RD: Tensor) -> None:
        """Writes the gradients of both matrices for the range that begins at `first`; low and high as from `edges`."""
        self.by_latent.product(self.acts, self.error_BD, first, out_dec_RD, low, high)
        self.by_latent.product(self.d_acts, self.centred_BD, first, out_enc_RD, low, high)
        if self.aux is not None:
            bounds = torch.tensor([first, first + len(out_enc_RD)])
            begin, end = torch.searchsorted(self.aux.dead_M, bounds).tolist()
            rows = self.aux.dead_M[begin:end] - first
            out_enc_RD.index_add_(0, rows, self.aux.d_pre_BM[:, begin:end].t() @ self.centred_BD)
            out_dec_RD.index_add_(0, rows, self.aux.acts_BM[:, begin:end].t() @ self.aux.miss_BD)


class SparseStep:
    """Weights, Adam moments and activity counters of an SAE in training. Use as a context manager: it owns threads."""

    def __init__(self, weights: dict[str, Tensor], recipe: Recipe, threads: int = 1):
        self.weights, self.recipe, self.threads = weights, recipe, threads
        self.first_moments = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second_moments = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.updates = torch.zeros(())
        self.d_sae, self.d_in = weights["W_enc"].shape
        self.silent_F = torch.zeros(self.d_sae, dtype=torch.int64)
        """tokens since each latent was last active"""
        self.encoder = Encoder(weights["W_enc"], weights["b_enc"], screen=recipe.screen)

    @classmethod
    def begin(cls, d_sae: int, mean_D: Tensor, recipe: Recipe, seed: int, threads: int = 1) -> "SparseStep":
        """A fresh start: random directions of length 1 shared by encoder and decoder, `b_dec` at the data's mean."""
        generator = torch.Generator().manual_seed(seed)
        directions_FD = normalise_rows_(torch.randn(d_sae, len(mean_D), generator=generator))
        weights = {"W_enc": directions_FD, "W_dec": directions_FD.clone()}
        return cls(weights | {"b_enc": torch.zeros(d_sae), "b_dec": mean_D.clone()}, recipe, threads)

    def __enter__(self) -> "SparseStep":
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads_before)

    def state(self) -> dict[str, Tensor]:
        """Everything a later step depends on, for a checkpoint."""
        moments = {f"first.{name}": m for name, m in self.first_moments.items()}
        moments |= {f"second.{name}": m for name, m in self.second_moments.items()}
        return self.weights | moments | {"updates": self.updates, "silent": self.silent_F}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        for name, own in self.state().items():
            own.copy_(state[name])
        self.encoder.refresh(0, self.d_sae)

    def encode(self, centred_CD: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, activations), each (C, K), unordered, of inputs from which `b_dec` is already taken."""
        indices_CK, pre_CK = self.encoder.topk(centred_CD, self.recipe.k)
        return indices_CK, pre_CK.relu_()

    def reconstruct(self, indices_CK: Tensor, acts_CK: Tensor) -> Tensor:
        """The reconstruction (C, D), without `b_dec`."""
        return decode_sparse(indices_CK, acts_CK, self.weights["W_dec"])

    def for_chunks(self, work: Callable[[slice], T], tokens: int) -> list[T]:
        """The results of `work` on each chunk of `tokens` tokens, in order."""
        return self._each(work, [slice(i, min(i + CHUNK, tokens)) for i in range(0, tokens, CHUNK)])

    def _each(self, work: Callable[[A], T], items: Iterable[A]) -> list[T]:
        return list(self._pool.map(work, items))

    def gradient(self, x_BD: Tensor) -> Gradient:
        """The gradient of the loss on a batch. Changes nothing."""
        w, k, batch = self.weights, self.recipe.k, len(x_BD)
        scale = 2 / (batch * self.recipe.variance)
        centred_BD, error_BD = torch.empty_like(x_BD), torch.empty_like(x_BD)
        indices_BK = torch.empty(batch, k, dtype=torch.int64)
        acts_BK, d_acts_BK = torch.empty(batch, k), torch.empty(batch, k)

        def run(chunk: slice) -> None:
            torch.sub(x_BD[chunk], w["b_dec"], out=centred_BD[chunk])
            indices_BK[chunk], acts_BK[chunk] = self.encode(centred_BD[chunk])
            y_CD = self.reconstruct(indices_BK[chunk], acts_BK[chunk])
            torch.sub(y_CD, centred_BD[chunk], out=error_BD[chunk])
            d_acts_BK[chunk] = gather_dot(error_BD[chunk], w["W_dec"], indices_BK[chunk]).mul_(acts_BK[chunk] > 0)

        self.for_chunks(run, batch)
        d_acts_BK.mul_(scale)
        flat = indices_BK.view(-1)
        d_b_enc_F = torch.bincount(flat, weights=d_acts_BK.view(-1), minlength=self.d_sae).float()
        aux = self._aux_gradient(centred_BD, error_BD)
        if aux is not None:
            d_b_enc_F.index_add_(0, aux.dead_M, aux.d_pre_BM.sum(0))
        d_b_dec_D = error_BD.sum(0).mul_(scale).sub_(d_b_enc_F @ w["W_enc"])
        by_latent = TokensByLatent(indices_BK, self.d_sae)
        acts, d_acts = by_latent.sort(acts_BK), by_latent.sort(d_acts_BK)
        return Gradient(by_latent, acts.mul_(scale), d_acts, error_BD, centred_BD, aux, d_b_enc_F, d_b_dec_D)

    def _aux_gradient(self, centred_BD: Tensor, error_BD: Tensor) -> AuxGradient | None:
        dead_M = (self.silent_F >= self.recipe.dead_after).nonzero().squeeze(1)
        if not len(dead_M) or not self.recipe.aux_coefficient:
            return None
        W_enc_MD, W_dec_MD = self.weights["W_enc"][dead_M], self.weights["W_dec"][dead_M]
        b_enc_M, k_aux = self.weights["b_enc"][dead_M], min(self.recipe.k_aux, len(dead_M))
        scale = 2 * self.recipe.aux_coefficient / (len(centred_BD) * float(total_variance(error_BD)))
        acts_BM, d_pre_BM = torch.zeros(2, len(centred_BD), len(dead_M))
        miss_BD = torch.empty_like(error_BD)

        def run(chunk: slice) -> None:
            pre_CM = torch.addmm(b_enc_M, centred_BD[chunk], W_enc_MD.t())
            kept_CK = topk_indices(pre_CM, k_aux)
            acts_CM = acts_BM[chunk].scatter_(1, kept_CK, pre_CM.gather(1, kept_CK).relu_())
            miss_CD = torch.addmm(error_BD[chunk], acts_CM, W_dec_MD).mul_(scale)  # the target is -error
            torch.mm(miss_CD, W_dec_MD.t(), out=d_pre_BM[chunk]).mul_(acts_CM > 0)
            miss_BD[chunk] = miss_CD

        self.for_chunks(run, len(centred_BD))
        return AuxGradient(dead_M, acts_BM, d_pre_BM, miss_BD)

    def update(self, gradient: Gradient, lr: float) -> None:
        """One step of Adam on all weights, and the count of silent tokens."""
        self.updates.add_(1)
        self.silent_F.add_(len(gradient.error_BD))
        self.silent_F[gradient.by_latent.latents(gradient.acts > 0)] = 0
        self._adam({"b_enc": gradient.b_enc_F, "b_dec": gradient.b_dec_D}, lr, slice(None))
        edges = gradient.by_latent.edges(RANGE)

        def run(number: int) -> None:
            rows = slice(number * RANGE, min((number + 1) * RANGE, self.d_sae))
            W_dec_RD = self.weights["W_dec"][rows]
            grad_enc_RD, grad_dec_RD = torch.empty_like(W_dec_RD), torch.empty_like(W_dec_RD)
            gradient.weights(rows.start, edges[number], edges[number + 1], grad_enc_RD, grad_dec_RD)
            project_gradient_(grad_dec_RD, W_dec_RD)
            self._adam({"W_enc": grad_enc_RD, "W_dec": grad_dec_RD}, lr, rows)
            normalise_rows_(W_dec_RD)
            self.encoder.refresh(rows.start, rows.stop)

        self._each(run, range(len(edges) - 1))

    def _adam(self, gradients: dict[str, Tensor], lr: float, rows: slice) -> None:
        def taken(tensors: dict[str, Tensor]) -> list[Tensor]:
            return [tensors[name][rows] for name in gradients]

        torch._fused_adam_(
            taken(self.weights),
            list(gradients.values()),
            taken(self.first_moments),
            taken(self.second_moments),
            [],
            [self.updates] * len(gradients),
            lr=lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=6.25e-10,  # of Gao et al.: their gradients, like these, are far below the usual 1e-8
            amsgrad=False,
            maximize=False,
        )
