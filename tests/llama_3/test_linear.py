"""`project` against float64, for every number of rows at which it changes its way, and what it must leave alone."""

import pytest
import torch
import torch.nn.functional as F

from llama_3 import linear
from llama_3.linear import Linear, project

EPS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=["as this machine is", "without bf16 instructions", "with them"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as this machine is":
        slow = frozenset(EPS) if request.param.startswith("without") else frozenset()
        monkeypatch.setattr(linear, "_SLOW", slow)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 16, 17, 64, 65, 128, 129, 200])
def test_each_number_of_rows_is_rounded_once(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_BLOCK", 48 * 20)  # 20 rows of the weight a block: three whole ones and a rest
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 48, generator=generator).to(dtype)
    weight = torch.randn(70, 48, generator=generator).to(dtype)
    y = project(x, weight)
    exact = x.double() @ weight.double().T
    assert y.dtype == dtype and y.shape == (rows, 70) and y.is_contiguous()
    # Half a unit in the last place of the result, and the float32 sum's own error, which is relative to its terms.
    terms = x.double().abs() @ weight.double().abs().T
    assert ((y.double() - exact).abs() <= EPS[dtype] * exact.abs() + 4e-6 * terms).all()


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("shape", [(48,), (1, 1, 48), (5, 1, 48), (2, 40, 48)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(70, 48)
    torch.testing.assert_close(project(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_takes_nothing_from_its_neighbours(dtype: torch.dtype) -> None:
    x, weight = torch.randn(40, 48).to(dtype), torch.randn(70, 48).to(dtype)
    y = project(x, weight)
    x[1:] = torch.nan
    assert project(x, weight)[0].equal(y[0])


def test_gradients_are_those_of_a_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_SLOW", frozenset(EPS))
    layer = Linear(48, 70)
    torch.nn.init.normal_(layer.weight)
    for rows in (1, 8, 200):
        x = torch.randn(rows, 48, requires_grad=True)
        layer(x).square().sum().backward()
        other = x.detach().clone().requires_grad_()
        weight = layer.weight.detach().clone().requires_grad_()
        F.linear(other, weight).square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad)
        torch.testing.assert_close(layer.weight.grad, weight.grad)
        layer.weight.grad = None


def test_a_layer_is_a_torch_linear_without_bias_and_draws_no_numbers() -> None:
    state = torch.random.get_rng_state()
    layer = Linear(48, 70)
    assert isinstance(layer, torch.nn.Linear) and layer.bias is None
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (48, 70, (70, 48))
    assert list(layer.state_dict()) == ["weight"]
    assert torch.random.get_rng_state().equal(state)
    assert repr(layer) == "Linear(in_features=48, out_features=70, bias=False)"
