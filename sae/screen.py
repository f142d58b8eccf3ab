"""The latents of a few tokens through a big encoder, without reading all of it in float32.

At one token an encoder waits for memory, and an int8 copy is a quarter of it. The copy says which latents may be among
the k largest; only those are computed from the real weights. The result is that of the whole product: each estimate
carries a bound on its error, and where the bounds leave a latent in doubt the caller is told to compute all.

Rounding a row of weights to steps of s errs by s / sqrt(12) a number, so its product with x by that times |x|, a sum of
many independent errors: `SIGMAS` of those are allowed for. x itself is split into two parts of 7 bits, which the
kernel's int16 sums bear on every CPU.
Letters: B tokens, D width, F latents, C candidates, K kept latents.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from sae.kernels import gather_dot

SIGMAS = 6.0
MARGIN = 64
"""Candidates beyond k."""
MOST_TOKENS = 16
"""For more the whole product is as quick."""
_BLOCK = 4096
_STEPS = 63.0
"""Whole steps of the first part of x; the second divides each into twice as many."""


def available() -> bool:
    """Whether this machine has the kernel."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class Screen:
    """An int8 copy of an encoder's weights (F, D)."""

    def __init__(self, W_enc_FD: Tensor) -> None:
        d_sae, d_in = W_enc_FD.shape
        codes_FD = torch.empty(d_sae, d_in, dtype=torch.int8)
        self.step_F = torch.empty(d_sae)
        for start in range(0, d_sae, _BLOCK):
            rows_RD = W_enc_FD[start : start + _BLOCK].float()
            step_R = rows_RD.abs().amax(1).clamp_min(1e-30) / 127
            self.step_F[start : start + _BLOCK] = step_R
            codes_FD[start : start + _BLOCK] = (rows_RD / step_R[:, None]).round_().to(torch.int8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantised tensors are on their way out of torch, their kernels are not
            zeros_F = torch.zeros(d_sae, dtype=torch.int64)
            coded = torch._make_per_channel_quantized_tensor(codes_FD, self.step_F.double(), zeros_F, 0)
            engine = torch.backends.quantized.engine
            try:
                torch.backends.quantized.engine = "fbgemm"
                self._packed = torch.ops.quantized.linear_prepack(coded, None)
            finally:
                torch.backends.quantized.engine = engine

    def topk(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """Indices and pre-activations (B, K) of the k largest, largest first; None where the estimates cannot tell."""
        largest_B1 = x_BD.abs().amax(1, keepdim=True).clamp_min(1e-30)
        scaled_BD = x_BD * (_STEPS / largest_B1)
        whole_BD = scaled_BD.round()
        parts = torch.cat([whole_BD, (scaled_BD - whole_BD) * (2 * _STEPS)])
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            parts, 1.0, int(_STEPS), self._packed
        )
        whole_BF, rest_BF = product.chunk(2)
        estimate_BF = torch.add(whole_BF, rest_BF, alpha=1 / (2 * _STEPS)) * (largest_B1 / _STEPS) + b_enc_F
        # What rounding the weights errs, and what rounding x does: half a step of its second part, spread evenly.
        norm_B1 = x_BD.norm(dim=1, keepdim=True) + largest_B1 * math.sqrt(x_BD.shape[1]) * 0.02
        highest_BF = estimate_BF + (SIGMAS / math.sqrt(12)) * norm_B1 * self.step_F
        count = min(k + MARGIN, estimate_BF.shape[1] - 1)
        top = highest_BF.topk(count + 1, 1)
        found_BC = top.indices[:, :count]
        values_BC = gather_dot(x_BD, W_enc_FD, found_BC) + b_enc_F[found_BC]
        values_BK, order_BK = values_BC.topk(k, 1)
        if bool((values_BK[:, -1] < top.values[:, -1]).any()):
            return None
        return found_BC.gather(1, order_BK), values_BK
