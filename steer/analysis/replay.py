"""The part of a model that lies above a hook point, as a function of the tensor there.

What an analysis asks of a model is a few runs over the same tokens that differ at one place. `Replay` runs the layers
below that place once, in the model's own dtype and through its own code, so that what stands there is what a reply
reads. The layers above it run in float32 from the same weights, whatever they are stored in: the effect of one latent
is often a thousandth, and bfloat16 logits differ by more than that from rounding alone. Weights become float32 one
block at a time, and a backward pass makes them again, so that no second model is ever in memory; those of a small model
are kept. A quantised weight counts as the numbers that it stands for.

Suffixes: B runs, T tokens, D width at the hook point, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from llama_3.checkpoint import parameter_count
from llama_3.hooks import HookPoint, Hooks, Span
from llama_3.model import Block, Reading, Tap, Transformer, plan_reading, plan_span

_BETWEEN = ("resid_pre", "resid_post")
"""Sites between two blocks: what stands there is all that the blocks above it read."""
_SMALL = 1 << 27
"""Numbers of a model whose blocks are kept in float32 for as long as a replay lives."""
_HEAD_ROWS = 1 << 14
"""Rows of the output matrix that are float32 at one time."""


def capture(model: Transformer, tokens: Sequence[int], points: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
    """What stands at each of `points`, float32 (T, D), when the model reads `tokens` from the start."""
    found: dict[HookPoint, Tensor] = {}
    hooks = Hooks()
    for point in dict.fromkeys(points):
        hooks.add(point, partial(_keep, found, point))
    last = hooks.points()[-1]
    with torch.no_grad():
        model.forward(torch.tensor([list(tokens)], device=model.device), hooks=hooks, stop_after=last)
    return {point: x_1TD[0].float() for point, x_1TD in found.items()}


def _keep(found: dict[HookPoint, Tensor], point: HookPoint, x_BTD: Tensor, _: Span) -> Tensor:
    found[point] = x_BTD
    return x_BTD


class Replay:
    """Everything above `start` for one sequence of tokens. `x_TD` is what stood at `start`, float32."""

    def __init__(
        self,
        model: Transformer,
        tokens: Sequence[int],
        start: HookPoint,
        end: HookPoint | None = None,
        captured: Mapping[HookPoint, Tensor] | None = None,
    ) -> None:
        """`end` is where to stop, by default after the last block; `captured` is what stood at `needs(start)`."""
        self.model, self.tokens, self.start, self.end = model, tuple(tokens), start, end
        found = captured or capture(model, tokens, self.needs(start))
        self.x_TD = found[start]
        self._base_TD = None if start.site in _BETWEEN else found[HookPoint(start.layer, "resid_pre")]
        self._first = start.layer + (start.site == "resid_post")
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._keeps = parameter_count(model.config) <= _SMALL

    @staticmethod
    def needs(start: HookPoint) -> tuple[HookPoint, ...]:
        """The points whose tensors a replay from `start` begins with."""
        return (start,) if start.site in _BETWEEN else (HookPoint(start.layer, "resid_pre"), start)

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """The residual (B, T, D) after the last block, or what stands at `end`, with `x_BTD` (float32) at `start`."""
        if self.end is None:
            return self.read(x_BTD)[0]
        return self.read(x_BTD, [self.end], self.end.layer + 1)[1][self.end]

    def read(
        self, x_BTD: Tensor, points: Sequence[HookPoint] = (), layers: int | None = None
    ) -> tuple[Tensor, dict[HookPoint, Tensor]]:
        """The residual (B, T, D) after the last block, or after the first `layers`, and what stands at `points`."""
        B, T, _ = x_BTD.shape
        resid_BTD = x_BTD if self._base_TD is None else self._base_TD.expand(B, -1, -1)
        reading = plan_reading(self.model.rope, [0] * B, [T] * B, T, resid_BTD, None)
        found: dict[HookPoint, Tensor] = {}
        hooks = Hooks()
        if self._base_TD is not None:
            hooks.add(self.start, lambda _, __: x_BTD)
        for point in dict.fromkeys(points):
            hooks.add(point, partial(_keep, found, point))
        tokens_BT = torch.tensor([self.tokens] * B, device=self.model.device)
        tap = Tap(hooks, plan_span(tokens_BT, [0] * B, [T] * B), None, None, reading.where)
        for layer in range(self._first, self.model.config.n_layers if layers is None else layers):
            own = tap if layer in hooks.layers else None
            run = partial(self._block, layer, reading, own)
            resid_BTD = run(resid_BTD) if own is not None else _forgetting(run, resid_BTD)
        return resid_BTD, found

    def _block(self, layer: int, reading: Reading, tap: Tap | None, resid_BTD: Tensor) -> Tensor:
        with torch.device("meta"):
            plain = Block(self.model.config, layer)
        out: Tensor = functional_call(plain, self._weights(layer, plain), (resid_BTD, reading, None, tap))
        return out

    def _weights(self, layer: int, plain: Block) -> dict[str, Tensor]:
        if layer in self._kept:
            return self._kept[layer]
        block = self.model.blocks[layer]
        weights = {name: attrgetter(name)(block).detach().float() for name, _ in plain.named_parameters()}
        if self._keeps:
            self._kept[layer] = weights
        return weights

    def logits(self, resid_RD: Tensor) -> Tensor:
        """Float32 logits (R, V) of residuals after the last block."""
        norm = self.model.norm
        normed_RD = F.rms_norm(resid_RD, norm.shape, norm.weight.detach().float(), norm.eps)
        parts = torch.split(self.model.unembedding_VD.detach(), _HEAD_ROWS)
        return torch.cat([_forgetting(partial(_project, part), normed_RD) for part in parts], -1)


def _project(weight_VD: Tensor, x_RD: Tensor) -> Tensor:
    return F.linear(x_RD, weight_VD.float())


class _Forgetting(torch.autograd.Function):
    """Runs a function and keeps nothing but its input; the gradient runs it again. Torch's own `checkpoint` does as
    much, and brings in a compiler that takes a second to import."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = (ctx.run(x) * grads[0]).sum()  # gradients given to `grad` would make it import sympy
        return torch.autograd.grad(loss, x)[0], None


def _forgetting(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out: Tensor = _Forgetting.apply(x, run)  # type: ignore[no-untyped-call]  # torch's own is not typed
    return out
