"""The layers above a hook point: numbers and gradients of the whole model, whatever its weights are stored in."""

import copy

import pytest
import torch

from llama_3.hooks import SITES, HookPoint, Hooks
from llama_3.model import Transformer
from llama_3.quantize import quantize_model
from steer.analysis.replay import Replay
from tests.tiny import tiny_config, tiny_model

torch.set_num_threads(1)
TOKENS = [256, 10, 77, 3, 3, 140]
CONFIG = tiny_config(n_layers=3, head_dim=12, tied=False)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(2, CONFIG)


def expected(model: Transformer, point: HookPoint, change_TD: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of the whole model with a change at a point."""
    hooks = Hooks()
    hooks.add(point, lambda x_BTD, _: x_BTD + change_TD)
    logits: torch.Tensor = model(torch.tensor([TOKENS]), hooks=hooks)[0]
    return logits


@pytest.mark.parametrize("site", SITES)
def test_logits_and_gradients_are_those_of_the_whole_model(model: Transformer, site: str) -> None:
    point = HookPoint(1, site)
    replay = Replay(model, TOKENS, point)
    change_TD = 0.3 * torch.randn(replay.x_TD.shape, generator=torch.Generator().manual_seed(1))
    ours_TD, theirs_TD = change_TD.clone().requires_grad_(), change_TD.clone().requires_grad_()
    rows = torch.stack([replay.x_TD, replay.x_TD + ours_TD])
    plain_TV, changed_TV = (replay.logits(resid_TD) for resid_TD in replay(rows))
    wanted_TV = expected(model, point, theirs_TD)
    torch.testing.assert_close(plain_TV, expected(model, point, torch.zeros(1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed_TV, wanted_TV, rtol=1e-4, atol=1e-4)
    changed_TV[-1, 7].backward()
    wanted_TV[-1, 7].backward()
    assert ours_TD.grad is not None and theirs_TD.grad is not None and float(theirs_TD.grad.abs().max()) > 0
    torch.testing.assert_close(ours_TD.grad, theirs_TD.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "resid_post"])
def test_it_stops_at_a_later_point(model: Transformer, site: str) -> None:
    end = HookPoint(2, site)
    replay = Replay(model, TOKENS, HookPoint(0, "mlp_out"), end)
    wanted_BTD = model(torch.tensor([TOKENS]), stop_after=end)
    torch.testing.assert_close(replay(replay.x_TD[None]), wanted_BTD, rtol=1e-4, atol=1e-5)


def test_weights_in_bfloat16_are_run_in_float32(model: Transformer) -> None:
    half = copy.deepcopy(model).bfloat16()
    replay = Replay(half, TOKENS, HookPoint(0, "resid_pre"))
    assert replay.x_TD.dtype == torch.float32
    logits_TV = replay.logits(replay(replay.x_TD[None])[0])
    torch.testing.assert_close(logits_TV, copy.deepcopy(half).float()(torch.tensor([TOKENS]))[0], rtol=1e-4, atol=1e-4)
    at = HookPoint(1, "resid_post")
    below = half(torch.tensor([TOKENS]), stop_after=at)[0]
    assert torch.equal(Replay(half, TOKENS, at).x_TD, below.float()), "what a reply reads is what is explained"


def test_quantised_weights_count_as_the_numbers_they_stand_for(model: Transformer) -> None:
    small = copy.deepcopy(model)
    quantize_model(small, "int8", keep=1)
    replay = Replay(small, TOKENS, HookPoint(0, "resid_post"))
    x_BTD = replay.x_TD[None].clone().requires_grad_()
    logits_TV = replay.logits(replay(x_BTD)[0])
    torch.testing.assert_close(logits_TV, small(torch.tensor([TOKENS]))[0], rtol=0.02, atol=0.02)
    logits_TV[-1, 7].backward()
    assert x_BTD.grad is not None and float(x_BTD.grad.abs().max()) > 0


def test_no_weight_gets_a_gradient(model: Transformer) -> None:
    loose = copy.deepcopy(model).requires_grad_()
    replay = Replay(loose, TOKENS, HookPoint(0, "resid_post"))
    x_BTD = replay.x_TD[None].clone().requires_grad_()
    replay.logits(replay(x_BTD)[:, -1]).sum().backward()
    assert x_BTD.grad is not None and all(weight.grad is None for weight in loose.parameters())
