"""Quantised layers against float64, and quantised models against the plain one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_3 import packed, quantize
from llama_3.hooks import HookPoint, Hooks, Span
from llama_3.linear import Linear
from llama_3.quantize import (
    CudaInt4Linear,
    Int4Linear,
    Int8Linear,
    PackedInt4Linear,
    QuantizedLinear,
    Scheme,
    SplitInt8Linear,
    kl_cost,
    quantization_cost,
    quantize_head,
    quantize_model,
    quantized,
    quantizer,
)  # fmt: skip
from tests.tiny import tiny_config, tiny_model, write_tiny_checkpoint

CPU = torch.device("cpu")
SCHEMES: tuple[Scheme, ...] = ("int8", "int4")
KINDS = [
    Int8Linear,
    Int4Linear,
    pytest.param(SplitInt8Linear, marks=pytest.mark.skipif(not quantize._has_fbgemm(), reason="no fbgemm here")),
    pytest.param(
        PackedInt4Linear, marks=pytest.mark.skipif(not quantize._has_int4_kernel(CPU), reason="no int4 kernel here")
    ),
]
ROWS = (1, 2, 3, 9, 31, 32, 70)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers(rows: int, width: int) -> Tensor:
    """Rows as residual streams have them: one number is 300 times the others."""
    x = draw(rows, width, seed=rows)
    x[:, 5] *= 300
    return x


def off(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_that_of_its_own_weight(kind: type[QuantizedLinear], dtype: torch.dtype, rows: int) -> None:
    layer = kind(draw(192, 256).mul_(0.1).to(torch.float32))
    x = outliers(rows, 256).to(dtype)
    exact = x.double() @ layer.weight.double().T
    y = layer(x.view(rows, 1, 256))
    assert y.dtype == dtype and y.shape == (rows, 1, 192)
    # bf16 itself is off by 1.7e-3 (the result rounded) to 2.5e-3 (inputs rounded too); two parts of 7 bits by 6e-4.
    rounds_input = kind is PackedInt4Linear and rows < 32
    bound = {torch.float32: 3e-3 if rounds_input else 1e-3, torch.float16: 3e-3 if rounds_input else 1.1e-3}
    assert off(y.view(rows, 192), exact) < bound.get(dtype, 3e-3)


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.008), ("int4", 0.1)])
@pytest.mark.parametrize("shape", [(192, 256), (96, 96), (31, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_close_and_the_original_is_left_alone(
    scheme: Scheme, bound: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = draw(*shape).to(dtype)
    before = weight.clone()
    layer = quantized(weight, scheme)
    assert layer is not None and weight.equal(before)
    assert layer.weight.dtype == dtype and off(layer.weight, weight.double()) < bound
    assert (layer.in_features, layer.out_features) == (shape[1], shape[0])
    assert layer.stored_bytes < (1.2 if scheme == "int8" else 0.65) * weight.numel()
    assert not layer.state_dict() and not list(layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_a_scheme_holds_the_same_numbers(kind: type[QuantizedLinear]) -> None:
    weight = draw(128, 192)
    plain = Int8Linear if kind in (Int8Linear, SplitInt8Linear) else Int4Linear
    torch.testing.assert_close(kind(weight).weight, plain(weight).weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(kind(weight).dequantized(64, 128), plain(weight).weight[64:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 9, 31, 70])
def test_a_row_takes_nothing_from_its_neighbours(kind: type[QuantizedLinear], rows: int) -> None:
    layer = kind(draw(128, 192))
    x = draw(rows, 192).bfloat16()
    y = layer(x)
    loud = x.clone()
    loud[1:] *= 1e4
    assert layer(loud)[0].equal(y[0])
    loud[1:] = torch.nan
    assert layer(loud)[0].equal(y[0])
    # Alone the same sums are taken, if not always in the same order.
    assert off(layer(x[:1]), y[:1].double()) < 4e-3


@pytest.mark.parametrize("kind", KINDS)
def test_odd_rows(kind: type[QuantizedLinear]) -> None:
    layer = kind(draw(128, 192))
    x = draw(6, 192)
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, 3] = torch.inf
    x[3] *= 1e-30
    x[4] *= 1e30
    for y in (layer(x), torch.cat([layer(row[None]) for row in x])):
        assert (y[0] == 0).all()
        assert not y[1].isfinite().any() and not y[2].isfinite().any()
        for i in (3, 4, 5):
            assert off(y[i : i + 1], x[i : i + 1].double() @ layer.weight.double().T) < 4e-3
    assert layer(x[:0]).shape == (0, 128)


def test_a_weight_of_zeros_and_one_of_an_outlier() -> None:
    weight = torch.zeros(64, 64)
    weight[3, 7] = 1000.0
    for scheme in SCHEMES:
        layer = quantized(weight, scheme)
        assert layer is not None
        torch.testing.assert_close(layer.weight, weight, rtol=0.01, atol=1e-20)
        torch.testing.assert_close(layer(torch.eye(64)).T, weight, rtol=0.01, atol=1e-20)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_input_is_that_of_the_weight(kind: type[QuantizedLinear]) -> None:
    layer = kind(draw(128, 192))
    x = draw(5, 192).requires_grad_()
    other = x.detach().clone().requires_grad_()
    push = draw(5, 128, seed=1)
    y = layer(x)
    assert y.equal(layer(x.detach()))
    (y * push).sum().backward()
    (other @ layer.weight.T * push).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_int4_leaves_a_matrix_whose_inputs_do_not_divide() -> None:
    assert quantized(draw(64, 48), "int4") is None
    model = tiny_model(config=tiny_config(d_ff=80))
    quantize_model(model, "int4")
    feed_forward = model.blocks[0].get_submodule("feed_forward")
    assert isinstance(feed_forward.down, Linear) and isinstance(feed_forward.gate_up, Int4Linear)


def test_a_machine_without_the_kernels_gets_the_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> bool:
        return False

    monkeypatch.setattr(quantize, "_has_fbgemm", missing)
    monkeypatch.setattr(quantize, "_has_int4_kernel", missing)
    monkeypatch.setattr(quantize, "_has_int8_kernel", missing)
    assert type(quantized(draw(64, 64), "int8")) is Int8Linear
    assert type(quantized(draw(64, 64), "int4")) is Int4Linear
    layer = Int8Linear(draw(64, 64))
    x = draw(1, 64)
    assert off(layer(x), x.double() @ layer.weight.double().T) < 1e-5


def test_a_kernel_that_is_wrong_or_raises_is_not_used() -> None:
    class Wrong(Int8Linear):
        def multiply(self, x_RK: Tensor) -> Tensor:
            return 2 * super().multiply(x_RK)

    class Missing(Int8Linear):
        def multiply(self, x_RK: Tensor) -> Tensor:
            raise NotImplementedError("no kernel")

    assert packed.agrees(Int8Linear, CPU, torch.float32)
    assert not packed.agrees(Wrong, CPU, torch.float32)
    assert not packed.agrees(Missing, CPU, torch.float32)


def test_packing_leaves_the_engine_of_the_process_as_it_was() -> None:
    before = torch.backends.quantized.engine
    quantized(draw(64, 64), "int8")
    assert torch.backends.quantized.engine == before


# -- models -----------------------------------------------------------------------------------------------------------


def tokens(count: int = 60, rows: int = 1) -> Tensor:
    return torch.randint(0, 256, (rows, count), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("scheme", "mean", "largest"), [("int8", 1e-3, 5e-3), ("int4", 0.1, 0.6)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_model_stays_close(scheme: Scheme, mean: float, largest: float, tied: bool) -> None:
    model = tiny_model(config=tiny_config(tied=tied))
    with torch.inference_mode():
        plain = model(tokens())[0]
        quantize_model(model, scheme)
        cost = kl_cost(plain, model(tokens())[0])
    assert 0 < cost[0] < mean and cost[0] < cost[1] < largest
    assert isinstance(model.head, QuantizedLinear)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kept_blocks_are_untouched(scheme: Scheme) -> None:
    model, other = tiny_model(config=tiny_config(n_layers=3)), tiny_model(config=tiny_config(n_layers=3))
    finish = quantizer(scheme, keep=2)
    for layer, block in enumerate(model.blocks):
        finish(block, layer)
    kinds = [{type(part) for part in block.modules() if hasattr(part, "in_features")} for block in model.blocks]
    assert kinds[:2] == [{Linear}, {Linear}] and all(issubclass(kind, QuantizedLinear) for kind in kinds[2])
    assert model.head is None
    point = HookPoint(1, "resid_post")
    with torch.inference_mode():
        assert model(tokens(), stop_after=point).equal(other(tokens(), stop_after=point))
        assert not model(tokens()).equal(other(tokens()))


def test_the_head_of_an_untied_model_and_of_a_tied_one() -> None:
    for tied in (True, False):
        model = tiny_model(config=tiny_config(tied=tied))
        embedding, before = model.embedding_VD.clone(), model.unembedding_VD.clone()
        quantize_head(model)
        assert isinstance(model.head, QuantizedLinear) and model.embedding_VD.equal(embedding)
        assert off(model.head.weight, before.double()) < 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hooks_prefill_decode_and_batches_work_and_repeat(scheme: Scheme) -> None:
    model = tiny_model()
    quantize_model(model, scheme)
    seen: list[int] = []

    def push(x_BTD: Tensor, span: Span) -> Tensor:
        seen.append(x_BTD.shape[1])
        return x_BTD + 1

    hooks = Hooks()
    hooks.add(HookPoint(0, "resid_post"), push)
    text = tokens(12, rows=3)

    def run(hooks: Hooks | None, parts: int) -> Tensor:
        cache = model.new_cache(3, 16)
        with torch.inference_mode():
            outs = [
                model(part, cache=cache, hooks=hooks)
                for part in text.tensor_split([12 - parts, *range(13 - parts, 12)], 1)
            ]
        return torch.cat(outs, 1)

    assert run(hooks, 3).equal(run(hooks, 3)) and seen[:4] == [9, 1, 1, 1]
    whole, stepwise = run(None, 0), run(None, 3)
    assert kl_cost(whole[0], stepwise[0])[1] < 1e-3  # the same model whichever way the tokens come
    assert kl_cost(whole[0], run(hooks, 3)[0])[1] > 1e-3


def test_a_scheme_that_is_none() -> None:
    with pytest.raises(ValueError, match="'int3' is no quantisation scheme") as caught:
        quantizer("int3")  # type: ignore[arg-type]
    assert "int8" in caught.value.hint  # type: ignore[attr-defined]


def test_the_cost_is_that_of_two_distributions() -> None:
    plain, other = draw(70, 50), draw(70, 50, seed=1)
    p, q = plain.double().softmax(-1), other.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    mean, largest = kl_cost(plain, other)
    assert mean == pytest.approx(float(kl.mean()), rel=1e-4) and largest == pytest.approx(float(kl.max()), rel=1e-4)
    assert kl_cost(plain, plain) == (0.0, 0.0)


def test_the_cost_of_a_checkpoint(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path)
    text = tokens()[0].tolist()
    cost = quantization_cost(tmp_path, "int8", 0, text)
    assert 0 < cost.mean_kl < 1e-3 and cost.mean_kl < cost.max_kl and 0.9 < cost.same_top <= 1
    kept = quantization_cost(tmp_path, "int4", model.config.n_layers, text)
    assert 0 < kept.mean_kl < quantization_cost(tmp_path, "int4", 0, text).mean_kl  # only the head is rounded


DEMO = Path(__file__).parents[2] / "steer" / "demo" / "model"


@pytest.mark.parametrize(("scheme", "mean", "same"), [("int8", 2e-3, 0.95), ("int4", 0.15, 0.8)])
def test_the_shipped_model_keeps_what_it_says(scheme: Scheme, mean: float, same: float) -> None:
    from llama_3.tokenizer import load_tokenizer

    text = "Once upon a time there was a little girl who had a red ball. She liked to play with it in the park. " * 2
    ids = load_tokenizer(DEMO).encode(text, bos=True)
    cost = quantization_cost(DEMO, scheme, 0, ids, dtype=torch.float32)
    assert cost.mean_kl < mean and cost.same_top > same


def test_every_matrix_of_a_block_is_replaced() -> None:
    model = tiny_model()
    quantize_model(model, "int8")
    kinds = [module for module in model.modules() if isinstance(module, QuantizedLinear | Linear)]
    assert len(kinds) == 4 * model.config.n_layers + 1
    assert all(isinstance(module, QuantizedLinear) for module in kinds)


# -- other devices ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 8, 70])
def test_on_a_gpu(scheme: Scheme, rows: int) -> None:
    weight, x = draw(256, 256).bfloat16().cuda(), draw(rows, 256).bfloat16().cuda()
    layer = quantized(weight, scheme)
    assert layer is not None
    if scheme == "int4" and quantize._has_int4_kernel(weight.device):
        assert isinstance(layer, CudaInt4Linear)
    assert off(layer(x).cpu(), x.double().cpu() @ layer.weight.double().cpu().T) < 5e-3
    assert off(layer.weight.cpu(), weight.double().cpu()) < (0.008 if scheme == "int8" else 0.1)
