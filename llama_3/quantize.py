"""Weights in 8 or 4 bits: decoding is bound by the bytes of the weights, so it takes a half or a quarter of the time.

`quantizer` makes the callback that replaces the four matrices of a block, block by block as they are loaded, so no
second model is ever in memory; `quantize_head` does the output matrix, the largest of a small model. Blocks below
`keep` stay as they are: what an SAE reads is then what it was trained on.

int8: one scale per output (round to nearest, +-127). On x86 the product is fbgemm's int8 kernel. It wants 8-bit inputs,
and one scale for a row with an outlier 300 times its neighbours, as residual streams have, would leave them nothing. So
each row is scaled by its own largest number and split into two parts of 7 bits that are fed as two rows: 14 bits of
input, an error below that of bf16 (1.7e-3 against 2.6e-3 on such rows) at half its time. 7 bits and not 8 because the
kernel adds pairs of products in int16 on CPUs without VNNI, and 127 * 127 * 2 just fits. Elsewhere torch's
`_weight_int8pack_mm`, or where that does not work either, blocks of the weight turned back into numbers.

int4: groups of 64 inputs with a scale and a zero each, torch's `_weight_int4pack_mm`, inputs in bf16. On x86 it is not
faster than int8 here; its worth is memory. For many rows blocks are turned back and multiplied whole.

torchao was weighed and left out: its CPU kernels for these schemes are the same torch operators, or need AVX-512.
Sums are float32 or int32, results in the dtype of the input, a row never depends on another. Gradients reach the
input, not the weight. Letters: N outputs, K inputs, R rows, G groups, S inputs of a group, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_3.errors import config_error
from llama_3.linear import slow_here
from llama_3.packed import MATRICES, PackedLinear, agrees, fbgemm

Scheme = Literal["int8", "int4"]

_GROUPS = (64, 32)
"""Inputs that share a scale in int4: the first that divides a matrix is taken."""
_BLOCK = 2**20
"""Numbers of a weight that are float32 at one time."""
_MANY = 32
"""From this many rows on an int4 weight is turned back into numbers rather than read once per row."""
_TINY = 1e-34
"""Below every number that matters and far enough from zero to divide by."""


class QuantizedLinear(PackedLinear):
    """A quantised weight."""

    def product(self, x_RK: Tensor) -> Tensor:
        """(R, N): rows times the weight. This one turns blocks of the weight back into numbers."""
        # Where bf16 is slow the block is multiplied as the float32 it is.
        dtype = torch.float32 if slow_here(x_RK.device, x_RK.dtype) else x_RK.dtype
        x, out_RN = x_RK.to(dtype), x_RK.new_empty(len(x_RK), self.out_features)
        for start, stop in _steps(self.out_features, self.in_features):
            out_RN[:, start:stop] = F.linear(x, self.dequantized(start, stop).to(dtype))
        return out_RN

    def dequantized(self, start: int, stop: int) -> Tensor:
        """float32 (stop - start, K): these rows of the weight as the product sees them."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Bytes that one product reads."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def weight(self) -> Tensor:
        """The whole weight (N, K) in the model's dtype, made anew at each access."""
        blocks = [self.dequantized(start, stop) for start, stop in _steps(self.out_features, self.in_features)]
        return torch.cat([block.to(self.dtype) for block in blocks])


def _steps(n_out: int, n_in: int) -> list[tuple[int, int]]:
    """Row ranges of a weight, each about `_BLOCK` numbers and, but for the last, a multiple of 64 rows."""
    size = max(64, _BLOCK // n_in // 64 * 64)
    return [(start, min(start + size, n_out)) for start in range(0, n_out, size)]


class Int8Linear(QuantizedLinear):
    """int8 weight and a scale per output, as plain tensors; through `_weight_int8pack_mm` where that works."""

    int8_NK: Tensor
    scale_N: Tensor

    def __init__(self, weight_NK: Tensor) -> None:
        n_out, n_in = weight_NK.shape
        super().__init__(n_in, n_out, weight_NK.dtype)
        int8_NK = torch.empty(n_out, n_in, dtype=torch.int8, device=weight_NK.device)
        self.register_buffer("scale_N", _fill_int8(weight_NK, int8_NK), persistent=False)
        self.register_buffer("int8_NK", int8_NK, persistent=False)

    def product(self, x_RK: Tensor) -> Tensor:
        if len(x_RK) < _MANY and _has_int8_kernel(x_RK.device, x_RK.dtype):
            return torch._weight_int8pack_mm(x_RK.contiguous(), self.int8_NK, self.scale_N.to(x_RK.dtype))
        return super().product(x_RK)

    def dequantized(self, start: int, stop: int) -> Tensor:
        return self.int8_NK[start:stop] * self.scale_N[start:stop, None]


class SplitInt8Linear(QuantizedLinear):
    """int8 weight in fbgemm's order; rows are split into two parts of 7 bits."""

    def __init__(self, weight_NK: Tensor) -> None:
        n_out, n_in = weight_NK.shape
        super().__init__(n_in, n_out, weight_NK.dtype)
        self._packed = _pack_fbgemm(weight_NK)
        # Rows of 1 and 126 numbers of the kernel's unit, and how much each counts in the result.
        self._units = torch.tensor([[63.0], [63.0 * 126.0]])
        self._shares = torch.tensor([[1 / 63.0, 1 / (63.0 * 126.0)]])
        self._at_once = max(16, 2**21 // n_out)

    def product(self, x_RK: Tensor) -> Tensor:
        if len(x_RK) == 1:
            largest = x_RK.abs().max().float().clamp_min_(_TINY)
            parts = x_RK * (self._units / largest)
            high, low = parts.unbind(0)
            low.sub_(high.round_(), alpha=126.0)
            return torch.mm(self._shares * largest, _fbgemm(parts, 1.0, 64, self._packed)).to(x_RK.dtype)
        if len(x_RK) > self._at_once:
            return torch.cat([self.product(some) for some in torch.split(x_RK, self._at_once)])
        return self._split(x_RK)

    def _split(self, x_RK: Tensor) -> Tensor:
        largest_R1 = x_RK.abs().amax(-1, keepdim=True).float().clamp_min_(_TINY)
        scaled = x_RK * (63.0 / largest_R1)
        high = scaled.round()
        parts = torch.cat([high, scaled.sub_(high).mul_(126.0)])
        product: Tensor = _fbgemm(parts, 1.0, 64, self._packed)
        high, low = product.chunk(2)
        return high.add_(low, alpha=1 / 126.0).mul_(largest_R1 / 63.0).to(x_RK.dtype)

    def dequantized(self, start: int, stop: int) -> Tensor:
        whole: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0]
        return whole[start:stop].dequantize()

    @property
    def stored_bytes(self) -> int:
        return self.out_features * (self.in_features + 8)  # and per output a scale and the sum of its weights

    @property
    def weight(self) -> Tensor:
        whole: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0]
        return torch.cat([whole[a:b].dequantize().to(self.dtype) for a, b in _steps(*whole.shape)])


def _fill_int8(weight_NK: Tensor, out_NK: Tensor) -> Tensor:
    """Write the rounded weight to an int8 tensor; the scales come back, float32 (N,)."""
    scale_N = torch.empty(len(weight_NK), device=weight_NK.device)
    for start, stop in _steps(*weight_NK.shape):
        block = weight_NK[start:stop].float()
        scale_N[start:stop] = scale = (block.abs().amax(1) / 127).clamp_min_(_TINY)
        out_NK[start:stop] = (block / scale[:, None]).round_()
    return scale_N


_fbgemm = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


def _pack_fbgemm(weight_NK: Tensor) -> Any:
    """The weight as fbgemm keeps it. Besides it and the original there is one int8 copy for the time of packing."""
    n_out, n_in = weight_NK.shape
    with torch.inference_mode(False), torch.no_grad(), fbgemm():
        int8_NK = torch.empty(n_out, n_in, dtype=torch.int8)
        scale_N = _fill_int8(weight_NK, int8_NK)
        zero_N = torch.zeros(n_out, dtype=torch.long)
        quantized = torch._make_per_channel_quantized_tensor(int8_NK, scale_N.double(), zero_N, 0)
        del int8_NK
        return torch.ops.quantized.linear_prepack(quantized, None)


@cache
def _has_fbgemm() -> bool:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    return agrees(SplitInt8Linear, torch.device("cpu"), torch.float32)


@cache
def _has_int8_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cpu" and dtype == torch.float32:
        return False  # it exists and is slower than turning the weight back
    x, weight = torch.ones(1, 64, device=device, dtype=dtype), torch.ones(64, 64, device=device, dtype=torch.int8)
    try:
        y = torch._weight_int8pack_mm(x, weight, torch.ones(64, device=device, dtype=dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return bool((y == 64).all())


class Int4Linear(QuantizedLinear):
    """Two 4-bit weights a byte, inputs 2j (low half) and 2j + 1; a scale and a zero per group, (G, N, 2) in bf16."""

    nibbles_NJ: Tensor
    scale_zero_GN2: Tensor

    def __init__(self, weight_NK: Tensor) -> None:
        n_out, n_in = weight_NK.shape
        super().__init__(n_in, n_out, weight_NK.dtype)
        group = group_size(n_in)
        assert group is not None, f"{n_in} inputs do not divide into groups"
        self.group = group
        scale_zero_GN2 = weight_NK.new_empty(n_in // group, n_out, 2, dtype=torch.bfloat16)
        stored = []
        for start, stop in _steps(n_out, n_in):
            codes_NK, scale_zero_GN2[:, start:stop] = _round_int4(weight_NK[start:stop], group)
            stored.append(self.pack(codes_NK))
        self.register_buffer("nibbles_NJ", torch.cat(stored), persistent=False)
        self.register_buffer("scale_zero_GN2", scale_zero_GN2, persistent=False)

    def pack(self, codes_NK: Tensor) -> Tensor:
        """uint8 (N, K / 2) of codes 0 to 15."""
        return codes_NK[:, ::2] | codes_NK[:, 1::2] << 4

    def unpack(self, start: int, stop: int) -> Tensor:
        """The codes (stop - start, K) of these rows."""
        bytes_NJ = self.nibbles_NJ[start:stop]
        return torch.stack([bytes_NJ & 15, bytes_NJ >> 4], -1).view(stop - start, -1)

    def dequantized(self, start: int, stop: int) -> Tensor:
        scale, zero = self.scale_zero_GN2[:, start:stop].float().unbind(-1)
        codes_NGS = self.unpack(start, stop).view(stop - start, -1, self.group)
        return codes_NGS.float().sub_(8).mul_(scale.t()[..., None]).add_(zero.t()[..., None]).view(stop - start, -1)


class PackedInt4Linear(Int4Linear):
    """The same in the order of torch's CPU kernel, which takes rows of a multiple of 64 outputs one by one."""

    def pack(self, codes_NK: Tensor) -> Tensor:
        return torch._convert_weight_to_int4pack_for_cpu(codes_NK.int(), 1).view(len(codes_NK), -1)

    def product(self, x_RK: Tensor) -> Tensor:
        if len(x_RK) >= _MANY:
            return super().product(x_RK)
        x = x_RK.to(torch.bfloat16).contiguous()
        return torch._weight_int4pack_mm_for_cpu(x, self.nibbles_NJ, self.group, self.scale_zero_GN2).to(x_RK.dtype)

    def unpack(self, start: int, stop: int) -> Tensor:
        block, order = _cpu_order()
        bytes_BKJ = self.nibbles_NJ[start:stop].view(-1, self.in_features, block // 2)
        halves = torch.stack([bytes_BKJ & 15, bytes_BKJ >> 4], -1).view(len(bytes_BKJ), self.in_features, block)
        return halves[..., order].transpose(1, 2).reshape(stop - start, self.in_features)


class CudaInt4Linear(Int4Linear):
    """The same in the order of torch's CUDA kernel."""

    def pack(self, codes_NK: Tensor) -> Tensor:
        return torch._convert_weight_to_int4pack(codes_NK[:, ::2] << 4 | codes_NK[:, 1::2], 8)

    def product(self, x_RK: Tensor) -> Tensor:
        x = x_RK.to(torch.bfloat16).contiguous()
        return torch._weight_int4pack_mm(x, self.nibbles_NJ, self.group, self.scale_zero_GN2).to(x_RK.dtype)

    @property
    def weight(self) -> Tensor:
        eye = torch.eye(self.in_features, device=self.nibbles_NJ.device, dtype=torch.bfloat16)
        return self.product(eye).t().to(self.dtype)  # the kernel's order is its own: ask it for every input


def group_size(n_in: int) -> int | None:
    """Inputs to a group in int4; None where no group size divides the matrix, which then stays as it is."""
    return next((group for group in _GROUPS if n_in % group == 0), None)


def _round_int4(weight_NK: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """uint8 codes (N, K) and bf16 (G, N, 2): a weight is about `(code - 8) * scale + zero`."""
    w_NGS = weight_NK.float().view(len(weight_NK), -1, group)
    low, high = w_NGS.aminmax(dim=-1, keepdim=True)
    # Rounded before the codes are chosen, so that the codes make up for it.
    scale = ((high - low) / 15).clamp_min_(_TINY).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    codes = ((w_NGS - zero.float()) / scale.float()).round_().add_(8).clamp_(0, 15)
    pairs_NG2 = torch.cat([scale, zero], -1)
    return codes.to(torch.uint8).view(weight_NK.shape), pairs_NG2.transpose(0, 1)


@cache
def _cpu_order() -> tuple[int, Tensor]:
    """How the CPU kernel orders its halves of bytes, which differs between instruction sets: it is asked.

    A block of 32 or 64 outputs stands together, input by input; the indices put its halves into order again.
    """

    def halves(codes_NK: Tensor) -> Tensor:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes_NK.int(), 1).flatten()
        return torch.stack([packed & 15, packed >> 4], -1).flatten().long()

    outputs, inputs = torch.arange(64)[:, None].expand(64, 32), torch.arange(32)[None].expand(64, 32) % 16
    block = int((halves(inputs).diff() != 0).nonzero()[0]) + 1  # as long as the input stays the same
    place = halves(outputs % 16)[:block] + 16 * halves(outputs // 16)[:block]
    return block, place.argsort()


@cache
def _has_int4_kernel(device: torch.device) -> bool:
    return agrees(PackedInt4Linear if device.type == "cpu" else CudaInt4Linear, device, torch.bfloat16)


def quantized(weight_NK: Tensor, scheme: Scheme) -> QuantizedLinear | None:
    """A layer for this weight in the form that suits its device; None when int4 cannot hold a matrix of its size."""
    (n_out, n_in), device = weight_NK.shape, weight_NK.device
    with torch.no_grad():
        if scheme == "int8":
            return (SplitInt8Linear if device.type == "cpu" and _has_fbgemm() else Int8Linear)(weight_NK)
        if group_size(n_in) is None:
            return None
        fits = n_out % 64 == 0 and (device.type == "cpu" or (device.type == "cuda" and n_in % 128 == 0))
        if fits and _has_int4_kernel(device):
            return (PackedInt4Linear if device.type == "cpu" else CudaInt4Linear)(weight_NK)
        return Int4Linear(weight_NK)


def quantizer(scheme: Scheme, keep: int = 0) -> Callable[[nn.Module, int], None]:
    """A callback `(block, layer)` that quantises the matrices of a loaded block in place, unless `layer < keep`.

    ValueError for a scheme that is neither int8 nor int4.
    """
    _check(scheme)

    def finish(block: nn.Module, layer: int) -> None:
        if layer < keep:
            return
        for part, name in MATRICES:
            parent = getattr(block, part)
            layer_ = quantized(getattr(parent, name).weight, scheme)
            if layer_ is not None:
                setattr(parent, name, layer_)

    return finish


def quantize_head(model: nn.Module, scheme: Scheme = "int8") -> None:
    """Give `model` a quantised output projection. A tied embedding stays beside it to look tokens up in."""
    _check(scheme)
    head: nn.Module | None = getattr(model, "head", None)
    weight: Any = getattr(model, "embedding_VD", None) if head is None else head.weight
    layer = quantized(weight, scheme)
    if layer is not None:
        setattr(model, "head", layer)  # noqa: B010 (a Module knows no such attribute)


def quantize_model(model: nn.Module, scheme: Scheme, keep: int = 0) -> None:
    """Quantise a loaded model in place: the blocks from `keep` on, then the head in int8."""
    finish = quantizer(scheme, keep)
    for layer, block in enumerate(model.get_submodule("blocks").children()):
        finish(block, layer)
    quantize_head(model)


def _check(scheme: str) -> None:
    if scheme not in ("int8", "int4"):
        raise config_error(f"{scheme!r} is no quantisation scheme", "int8 and int4 are")


@dataclass(frozen=True)
class QuantizationCost:
    """How far a quantised model's next-token distributions are from the plain model's, over the tokens of a text."""

    mean_kl: float
    """KL(plain || quantised) in nats, mean over positions."""
    max_kl: float
    same_top: float
    """Share of positions at which both find the same token likeliest."""


def kl_cost(reference_logits_TV: Tensor, logits_TV: Tensor) -> tuple[float, float]:
    """Mean and largest KL(reference || other) in nats over T positions."""
    kl = [
        F.kl_div(other.float().log_softmax(-1), one.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for one, other in zip(torch.split(reference_logits_TV, 32), torch.split(logits_TV, 32), strict=True)
    ]
    kl_T = torch.cat(kl).clamp_min_(0.0)
    return float(kl_T.mean()), float(kl_T.max())


def quantization_cost(
    path: str | Path,
    scheme: Scheme,
    keep: int,
    tokens: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
) -> QuantizationCost:
    """Load the model in `path`, read `tokens` plain, quantise it in place and read them again."""
    from llama_3.checkpoint import load_model

    model = load_model(path, dtype, device)
    tokens_BT = torch.tensor([list(tokens)], device=model.device)
    with torch.inference_mode():
        plain_TV = model(tokens_BT)[0]
        quantize_model(model, scheme, keep)
        other_TV = model(tokens_BT)[0]
    same = (plain_TV.argmax(-1) == other_TV.argmax(-1)).double().mean()
    return QuantizationCost(*kl_cost(plain_TV, other_TV), float(same))
