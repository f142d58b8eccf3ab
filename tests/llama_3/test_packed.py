"""Packed half-precision weights: the product, the weight back, gradients, and what of a model is packed."""

import pytest
import torch

from llama_3 import packed
from llama_3.checkpoint import load_model
from llama_3.hooks import HookPoint, Hooks
from llama_3.linear import Linear
from llama_3.model import Transformer
from llama_3.packed import HalfLinear, pack_model, quicker
from llama_3.quantize import QuantizedLinear, quantize_model
from steer.config import DEMO_MODEL
from steer.engine import Engine
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not packed._has_half_kernel(), reason="this CPU or torch has no such kernel")

SPREADS = {"usual": 0.02, "tiny": 1e-9, "large": 1e6}


def weight_of(spread: float, dtype: torch.dtype, shape: tuple[int, int] = (96, 72)) -> torch.Tensor:
    """Numbers over many powers of two."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.randn(shape).abs() ** 3 * spread
    return weight.to(dtype)


@pytest.mark.parametrize("rows", (1, 2, 3, 6, 7, 40))
@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
def test_a_product_is_the_float64_one_rounded_once(rows: int, spread: float) -> None:
    weight = weight_of(spread, torch.bfloat16)
    layer, x = HalfLinear(weight), torch.randn(1, rows, 72).bfloat16()
    exact = x.double() @ weight.double().t()
    assert layer(x).dtype == torch.bfloat16
    room = exact.abs() * 2**-8 + exact.abs().max() * 1e-6
    assert ((layer(x).double() - exact).abs() <= room).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_weight_comes_back_to_its_last_relevant_bit(dtype: torch.dtype) -> None:
    for spread in (0.02, 1e-3 if dtype == torch.float16 else 1e-9):
        weight = weight_of(spread, dtype)
        back = HalfLinear(weight).weight
        assert back.dtype == dtype
        bound = 2.0**-25 if weight.abs().max() >= packed._LEAST else float(weight.abs().max()) * 2.0**-39
        assert (back.float() - weight.float()).abs().max() <= bound


def test_a_weight_of_many_pieces_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_of(0.02, torch.bfloat16), torch.randn(3, 72).bfloat16()
    whole = HalfLinear(weight)
    monkeypatch.setattr(packed, "_PIECE", 72 * 40)
    pieces = HalfLinear(weight)
    assert len(pieces._packed) == 3 and torch.equal(pieces(x), whole(x)) and torch.equal(pieces.weight, whole.weight)


def test_zeros_stay_zeros() -> None:
    layer = HalfLinear(torch.zeros(32, 16, dtype=torch.bfloat16))
    assert not layer(torch.ones(2, 16).bfloat16()).any() and not layer.weight.any()


def test_gradients_reach_the_input() -> None:
    weight = weight_of(0.02, torch.bfloat16)
    x = torch.randn(3, 72, requires_grad=True)
    HalfLinear(weight)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(3, -1), rtol=1e-3, atol=1e-4)


def test_a_packed_model_gives_the_plain_one_s_logits_and_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "quicker", lambda device, dtype: dtype == torch.bfloat16)
    model = tiny_model().to(torch.bfloat16)
    tokens, seen = torch.tensor([[1, 2, 3, 4, 5]]), {}
    hooks = Hooks()
    hooks.add(HookPoint.parse("blocks.1.hook_resid_post"), lambda x, span: seen.setdefault(len(seen), x))
    with torch.no_grad():
        plain = model(tokens, hooks=hooks).float()
        pack_model(model)
        other = model(tokens, hooks=hooks).float()
    assert all(isinstance(block.attention.qkv, HalfLinear) for block in model.blocks)
    assert isinstance(model.head, HalfLinear) and not isinstance(model.head, QuantizedLinear)
    assert (plain - other).abs().max() <= 0.02 * plain.abs().max()
    assert (seen[0].float() - seen[1].float()).abs().max() <= 0.02 * seen[0].float().abs().max()
    with torch.no_grad():
        quantize_model(model, "int8")
        assert (model(tokens).float() - plain).abs().max() <= 0.1 * plain.abs().max()


def test_float32_weights_are_left_alone() -> None:
    model = tiny_model()
    pack_model(model)
    assert not any(isinstance(part, HalfLinear) for part in model.modules())
    assert not quicker(torch.device("cpu"), torch.float32)
    assert not quicker(torch.device("cuda"), torch.bfloat16)


def test_the_demo_is_packed_where_that_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "quicker", lambda device, dtype: dtype == torch.bfloat16)
    packing = Engine.load(many=True).model
    assert sum(isinstance(part, HalfLinear) for part in packing.modules()) == 4 * packing.config.n_layers + 1
    assert sum(isinstance(part, Linear) for part in packing.modules()) == 0
    reference, tokens = load_model(DEMO_MODEL), torch.tensor([list(range(100, 140))])
    with torch.no_grad():
        ours, theirs = packing(tokens).float(), reference(tokens).float()
    assert (ours - theirs).norm() <= 0.01 * theirs.norm()


def test_one_reply_runs_from_the_weights_as_they_are() -> None:
    assert not any(isinstance(part, HalfLinear) for part in Engine.load().model.modules())


def test_what_is_compiled_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "quicker", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(Transformer, "compile_blocks", lambda self: None)
    monkeypatch.setattr("steer.engine._has_compiler", lambda: True)
    assert not any(isinstance(part, HalfLinear) for part in Engine.load(compile=True, many=True).model.modules())
