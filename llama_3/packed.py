"""Weights that only a kernel can read, and the kernel for bf16 on a CPU that has no instructions for it.

`PackedLinear` stands in the place of a `Linear` whose weight is stored in some kernel's own order: it multiplies, gives
the weight back as numbers when asked, and passes gradients to its input. Quantised weights (`quantize.py`) are such.

`HalfLinear` is no quantisation. torch's bf16 product on x86 without AVX-512 turns the weight into float32 once for
every row of inputs. fbgemm's float16 kernel reads it once for up to six rows, with the conversion that such CPUs do
have, and sums in float32 like all of our products: on a 16,384 x 2,048 weight and two cores 2.1 ms for one row against
3.3, 2.5 for three against 9.6. A bf16 number is a float16 number as long as its exponent fits (`_LEAST`), so
results differ from torch's product by the order of the float32 sums, and by at most 2^-25 a weight: only an output
whose weights are all thousands of times smaller than the matrix's largest feels that.

Letters: N outputs, K inputs, R rows.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_3.linear import Linear, project, slow_here

MATRICES = (("attention", "qkv"), ("attention", "out"), ("feed_forward", "gate_up"), ("feed_forward", "down"))
"""The four of a block."""
_PIECE = 2**26
"""Numbers of a weight that are float32 at one time while it is packed."""
_LEAST, _MOST = 2.0**-4, 2.0**15
"""A weight whose largest number lies between these is packed as it is: of a bf16 number under 2^-17 float16 drops what
is less than 2^-25, no more than rounding takes from a float32 sum of such products. Others are scaled to `_MOST`."""
_engine_lock = threading.Lock()
_times = torch.ops.quantized.linear_dynamic_fp16.default


class PackedLinear(nn.Module):
    """`x @ weight.T` in the dtype of x. A subclass stores the weight and knows how to multiply by it.

    It stays on the device it was made for: what is stored has the order that this device's kernel wants.
    """

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = n_in, n_out, dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]  # torch's own is not typed
            return product
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """(..., N): x times the weight, without a gradient."""
        return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def product(self, x_RK: Tensor) -> Tensor:
        """(R, N): rows times the weight."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """(N, K) in the model's dtype, made anew at each access."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """The product of a `PackedLinear`, with the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return project(grads[0], ctx.layer.weight.t().to(grads[0].dtype)), None


class HalfLinear(PackedLinear):
    """A bf16 or float16 weight as float16 in fbgemm's order; one of small numbers times a power of two."""

    def __init__(self, weight_NK: Tensor) -> None:
        n_out, n_in = weight_NK.shape
        super().__init__(n_in, n_out, weight_NK.dtype)
        with torch.inference_mode(False), torch.no_grad():
            largest = float(torch.stack(weight_NK.aminmax()).abs().max())
            usual = _LEAST <= largest < _MOST or not largest
            self._factor = 1.0 if usual else _MOST / 2.0 ** math.frexp(largest)[1]
            self._packed = [self._pack(part) for part in _pieces(weight_NK)]

    def _pack(self, part_NK: Tensor) -> Any:
        scaled_NK = part_NK.float() if self._factor == 1.0 else part_NK.float() * self._factor
        return torch.ops.quantized.linear_prepack_fp16(scaled_NK, None)

    def multiply(self, x: Tensor) -> Tensor:
        scaled = x.float() if self._factor == 1.0 else x.float() / self._factor
        if len(self._packed) == 1:
            out: Tensor = _times(scaled, self._packed[0])
            return out.to(x.dtype)
        return torch.cat([_times(scaled, packed) for packed in self._packed], -1).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        parts = (torch.ops.quantized.linear_unpack_fp16(packed)[0] for packed in self._packed)
        return torch.cat([(part / self._factor).to(self.dtype) for part in parts])


@contextmanager
def fbgemm() -> Iterator[None]:
    """fbgemm as torch's engine for what is packed within; what is packed remembers it."""
    with warnings.catch_warnings(), _engine_lock:  # the engine is the whole process's
        warnings.simplefilter("ignore")  # these kernels are to leave torch one day; `agrees` will notice
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            yield
        finally:
            torch.backends.quantized.engine = engine


def agrees(kind: Callable[[Tensor], PackedLinear], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel runs on this device and gives what its own weight gives."""
    weight = torch.linspace(-1, 1, 128 * 128, device=device).view(128, 128).roll(37, 1).to(dtype)
    x = torch.linspace(-1, 2, 128, device=device)[None].to(dtype)
    try:
        layer = kind(weight)
        y, plain = layer(x).float(), F.linear(x.float(), layer.weight.float())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool(((y - plain).norm() < 0.02 * plain.norm()).all())


def pack_block(block: nn.Module) -> None:
    """Pack the matrices of a loaded block in place, where that is quicker here."""
    parents = [(getattr(block, part), name) for part, name in MATRICES]
    plain = [(parent, name) for parent, name in parents if _plain(getattr(parent, name))]
    with fbgemm(), ThreadPoolExecutor() as threads:  # one takes 11 ns a number
        packed = threads.map(HalfLinear, [getattr(parent, name).weight for parent, name in plain])
        for (parent, name), layer in zip(plain, packed, strict=True):
            setattr(parent, name, layer)


def pack_head(model: nn.Module) -> None:
    """Give `model` a packed output projection, where that is quicker here. A tied embedding stays beside it to look
    tokens up in."""
    head: nn.Module | None = getattr(model, "head", None)
    weight: Any = getattr(model, "embedding_VD", None) if head is None else head.weight
    if (head is None or _plain(head)) and quicker(weight.device, weight.dtype):
        with fbgemm():
            setattr(model, "head", HalfLinear(weight))  # noqa: B010 (a Module knows no such attribute)


def pack_model(model: nn.Module) -> None:
    """Pack a loaded model in place, where that is quicker here."""
    for block in model.get_submodule("blocks").children():
        pack_block(block)
    pack_head(model)


def _plain(layer: nn.Module) -> bool:
    return isinstance(layer, Linear) and quicker(layer.weight.device, layer.weight.dtype)


def quicker(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed weights of this dtype are quicker here: torch's own product is slow, and the kernel is there."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and slow_here(device, dtype) and _has_half_kernel()


@cache
def _has_half_kernel() -> bool:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    with fbgemm():
        return agrees(HalfLinear, torch.device("cpu"), torch.bfloat16)


def _pieces(weight_NK: Tensor) -> tuple[Tensor, ...]:
    """Runs of outputs of at most `_PIECE` numbers."""
    return torch.split(weight_NK, max(1, _PIECE // weight_NK.shape[1]))
