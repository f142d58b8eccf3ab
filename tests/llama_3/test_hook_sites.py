"""Every hook site against the inputs and outputs of transformers' modules, read and edited, one by one and in rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_3.hooks import SITES, HookPoint, Hooks, Span
from llama_3.model import Transformer
from tests.llama_3.test_model import oracle, random_tokens
from tests.tiny import tiny_config

torch.set_num_threads(1)

LAYER = 1
# head_dim is not d_model / heads, so that the width of attn_z differs from that of the stream
CONFIG = dict(n_layers=3, head_dim=12, n_heads=4, n_kv_heads=2, tied=False)

Change = Callable[[Tensor], Tensor]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def attach(theirs: Any, site: str, change: Change) -> list[Any]:
    """Hook transformers' module at the place that `site` names; `change` sees and replaces the tensor."""
    block = theirs.model.layers[LAYER]
    takes_input = {"resid_pre": block, "attn_z": block.self_attn.o_proj, "resid_mid": block.post_attention_layernorm}
    gives_output = {
        "attn_norm": block.input_layernorm,
        "attn_out": block.self_attn.o_proj,
        "mlp_norm": block.post_attention_layernorm,
        "mlp_out": block.mlp,
        "resid_post": block,
    }
    if site in takes_input:

        def before(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return [takes_input[site].register_forward_pre_hook(before, with_kwargs=True)]

    def after(module: Any, args: Any, output: Any) -> Any:
        changed = change(first(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return [gives_output[site].register_forward_hook(after)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Any]:
    return oracle(Path(tmp_path_factory.mktemp("sites")), tiny_config(**CONFIG))


@pytest.mark.parametrize("site", SITES)
def test_each_site_is_that_tensor_in_prefill_decode_and_batch(models: tuple[Transformer, Any], site: str) -> None:
    model, theirs = models
    point, tokens_BT = HookPoint(LAYER, site), random_tokens(3, 11)
    ours, seen = list[Tensor](), list[Tensor]()

    def look(x_BTD: Tensor, span: Span) -> Tensor:
        ours.append(x_BTD)
        return x_BTD

    hooks = Hooks()
    hooks.add(point, look)
    handles = attach(theirs, site, lambda x: seen.append(x) or x)  # type: ignore[func-returns-value]
    cache = model.new_cache(3, 16)
    with torch.no_grad():
        model(tokens_BT[:, :8], cache=cache, hooks=hooks)
        read = theirs(tokens_BT[:, :8], use_cache=True)
        for step in range(8, 11):
            model(tokens_BT[:, step : step + 1], cache=cache, hooks=hooks)
            read = theirs(tokens_BT[:, step : step + 1], past_key_values=read.past_key_values, use_cache=True)
    for handle in handles:
        handle.remove()
    assert len(ours) == len(seen) == 4
    for mine, other in zip(ours, seen, strict=True):
        assert mine.shape == other.shape and mine.shape[-1] == point.width(model.config)
        assert (mine - other).abs().max() <= 2e-5 * other.abs().max()


@pytest.mark.parametrize("site", SITES)
def test_an_edit_at_each_site_does_what_it_does_in_transformers(models: tuple[Transformer, Any], site: str) -> None:
    """The edit reaches the block's other half at `resid_mid`, which transformers adds to unhooked, so there ours is
    compared at `mlp_norm`'s reading of it."""
    model, theirs = models
    point, tokens_BT = HookPoint(LAYER, site), random_tokens(2, 9)
    push_D = torch.randn(point.width(model.config), generator=torch.Generator().manual_seed(5))

    hooks = Hooks()
    hooks.add(point, lambda x_BTD, span: x_BTD * 0.5 + push_D)
    handles = attach(theirs, site, lambda x: x * 0.5 + push_D)
    cache = model.new_cache(2, 9)
    at = HookPoint(LAYER, "mlp_norm") if site == "resid_mid" else None
    seen: list[Tensor] = []
    handles += attach(theirs, "mlp_norm", lambda x: seen.append(x) or x) if at else []  # type: ignore[func-returns-value]
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        if at is not None:
            ours, expected = model(tokens_BT, hooks=hooks, stop_after=at), seen[0]
        else:
            head = model(tokens_BT[:, :6], cache=cache, hooks=hooks)
            steps = [model(tokens_BT[:, i : i + 1], cache=cache, hooks=hooks) for i in range(6, 9)]
            ours = torch.cat([head, *steps], 1)
    for handle in handles:
        handle.remove()
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    with torch.no_grad():
        plain = theirs(tokens_BT).logits if at is None else model(tokens_BT, stop_after=at)
    assert (plain - expected).abs().max() > 0.01 * expected.abs().max()
