"""The one matrix product of the model, in the form that is quick for the number of rows at hand.

`Linear` is `nn.Linear` without a bias and without the cost of drawing weights that a checkpoint overwrites. `project`
does its work and knows three cases besides torch's own product:

- One row is a matrix times a vector: `mv` reads the weight at the speed of the memory.
- bf16 and float16 on a CPU that has no instructions for them: torch falls back on one pass over the weight per row
  (64 rows on a 16,384 x 2,048 weight: 200 ms). Here blocks of the weight are made float32 while they are in the cache
  and multiplied at float32 speed, every sum rounded once at the end (35 ms; 512 rows: 230 ms).
- A few rows in float32 on such a CPU: the product is quicker with the weight on the left, which is then read once and
  by all threads (4 rows: 12 ms against 39).

Sums are taken in float32 in every case. Where a gradient is wanted, all of this is left to torch's own product.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW = 4
"""From this many rows on blocks of float32 are quicker than torch's product in half precision."""
_LEFT = 64
"""Up to this many rows a float32 weight stands on the left of the product, a bf16 one up to twice as many."""
_BLOCK = 2**21
"""Numbers of the weight that are float32 at one time: 8 MB, so that they are still in the cache when multiplied."""


class Linear(nn.Linear):
    """`x @ weight.T`, weight (n_out, n_in) uninitialised."""

    def __init__(self, n_in: int, n_out: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would fill the weight with random numbers
        self.in_features, self.out_features = n_in, n_out
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` over the last dimension: (..., n_in) times (n_out, n_in) gives (..., n_out) in the dtype of x."""
    rows = x.numel() // weight.shape[1]
    if rows == 1:
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    if not rows or not slow_here(x.device, x.dtype) or _wants_grad(x, weight):
        return F.linear(x, weight)
    x_RD = x.reshape(rows, -1)
    if x.dtype != torch.float32:
        return F.linear(x, weight) if rows < _FEW else _in_blocks(x_RD, weight).view(*x.shape[:-1], -1)
    if rows <= _LEFT:
        return torch.mm(weight, x_RD.t()).t().contiguous().view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def _in_blocks(x_RD: Tensor, weight_ND: Tensor) -> Tensor:
    """The product (R, N) with the weight made float32 block by block; R rows, D numbers in, N out."""
    rows, (n_out, n_in) = len(x_RD), weight_ND.shape
    size = min(n_out, max(1, _BLOCK // n_in))
    x_DR = x_RD.float().t()
    out_RN, buffer = x_RD.new_empty(rows, n_out), x_DR.new_empty(size, n_in)
    for start in range(0, n_out, size):
        block = buffer[: n_out - start].copy_(weight_ND[start : start + size])
        left = rows <= 2 * _LEFT
        out_RN[:, start : start + size] = torch.mm(block, x_DR).t() if left else torch.mm(x_DR.t(), block.t())
    return out_RN


def _wants_grad(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def slow_here(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's product of a few rows is known to be slow: x86 without AVX-512, so without bf16 instructions."""
    return device.type == "cpu" and dtype in _SLOW


def _slow_dtypes() -> frozenset[torch.dtype]:
    """What this CPU has no quick product for; nothing on anything but x86, where nobody has measured it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    slow = set()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        slow |= {torch.bfloat16, torch.float32}
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        slow.add(torch.float16)
    return frozenset(slow)


_SLOW = _slow_dtypes()
