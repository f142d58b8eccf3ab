"""The model against transformers on tiny random weights, and against itself: cached, batched, stopped, hooked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from llama_3.config import ModelConfig, RopeScaling
from llama_3.hooks import SITES, Hook, HookPoint, Hooks, Span
from llama_3.model import Rope, Transformer
from tests.tiny import tiny_config, tiny_model, write_tiny_checkpoint

torch.set_num_threads(1)

SCALED = RopeScaling(8.0, 1.0, 4.0, 32)
CONFIGS: dict[str, dict[str, Any]] = {
    "groups of 2, tied": dict(),
    "groups of 1": dict(n_kv_heads=4, tied=False),
    "groups of 8": dict(n_heads=8, n_kv_heads=1, tied=False),
    "one head": dict(n_heads=1, n_kv_heads=1, head_dim=16),
    "wide heads": dict(head_dim=20, tied=False),
    "narrow heads, odd width": dict(d_model=40, head_dim=6, d_ff=51, vocab_size=277),
    "scaled rope": dict(rope_scaling=SCALED, rope_theta=500000.0, head_dim=16),
    "scaled rope, untied, eps": dict(rope_scaling=SCALED, tied=False, norm_eps=1e-3, n_layers=3),
}


def oracle(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Any]:
    model = write_tiny_checkpoint(folder, 1, config)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(dtype), theirs.train(False)


def recorder(spans: list[Span]) -> Hook:
    """A hook that changes nothing and keeps the spans it is told."""

    def record(x_BTD: Tensor, span: Span) -> Tensor:
        spans.append(span)
        return x_BTD

    return record


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    model, theirs = oracle(tmp_path, tiny_config(**changes))
    tokens_BT = random_tokens(2, 67)
    with torch.no_grad():
        expected = theirs(tokens_BT, output_hidden_states=True)
    logits_BTV = model(tokens_BT)
    assert (logits_BTV - expected.logits).abs().max() <= 2e-4 * expected.logits.abs().max()
    for layer in range(model.config.n_layers - 1):
        resid_BTD = model(tokens_BT, stop_after=HookPoint(layer, "resid_post"))
        torch.testing.assert_close(resid_BTD, expected.hidden_states[layer + 1], rtol=1e-4, atol=1e-5)


def test_bf16_logits_equal_transformers(tmp_path: Path) -> None:
    model, theirs = oracle(tmp_path, tiny_config(rope_scaling=SCALED), torch.bfloat16)
    tokens_BT = random_tokens(1, 40)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits.float()
    assert (model(tokens_BT).float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_cached_equals_uncached(changes: dict[str, Any]) -> None:
    model = tiny_model(2, tiny_config(**changes))
    tokens_BT = random_tokens(2, 33)
    whole = model(tokens_BT)
    cache = model.new_cache(2, 40)
    parts = [model(part, cache=cache) for part in torch.split(tokens_BT, [7, 1, 1, 13, 1, 10], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.lengths == [33, 33]


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_rows_of_different_lengths_equal_rows_alone(changes: dict[str, Any]) -> None:
    model = tiny_model(3, tiny_config(**changes))
    tokens_BT, lengths = random_tokens(3, 19), [19, 4, 11]
    cache = model.new_cache(3, 24)
    logits_BTV = model(tokens_BT, lengths_B=lengths, cache=cache)
    last_BV = model(tokens_BT, lengths_B=torch.tensor(lengths), last_only=True)[:, 0]
    more_BT, counts = random_tokens(3, 4, seed=1), [1, 4, 2]
    more_logits = model(more_BT, lengths_B=counts, cache=cache)
    step_logits = model(more_BT[:, :1], cache=cache)
    assert cache.lengths == [21, 9, 14]
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        parts = [tokens_BT[row : row + 1, :length], more_BT[row : row + 1, :count], more_BT[row : row + 1, :1]]
        alone = model(torch.cat(parts, 1))[0]
        torch.testing.assert_close(logits_BTV[row, :length], alone[:length], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last_BV[row], alone[length - 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(more_logits[row, :count], alone[length : length + count], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step_logits[row, 0], alone[-1], rtol=1e-5, atol=1e-5)


def test_padding_beyond_the_capacity_of_the_cache_is_not_written() -> None:
    model = tiny_model()
    cache, tokens_BT = model.new_cache(2, 10), random_tokens(2, 9)
    model(tokens_BT, lengths_B=[9, 3], cache=cache)
    logits_BTV = model(tokens_BT[:, :6], lengths_B=[1, 6], cache=cache)
    alone = model(torch.cat([tokens_BT[:1], tokens_BT[:1, :1]], 1))
    torch.testing.assert_close(logits_BTV[0, 0], alone[0, -1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="11 tokens do not fit a cache with room for 10"):
        model(tokens_BT[:, :1], cache=cache)


def test_forked_truncated_and_selected_rows_go_on_like_the_original() -> None:
    model = tiny_model()
    tokens_BT = random_tokens(1, 12)
    cache = model.new_cache(1, 16)
    model(tokens_BT, cache=cache)
    forked = cache.fork(0, 3, capacity=20)
    cache.truncate(5)
    again = model(tokens_BT[:, 5:], cache=cache)
    whole = model(tokens_BT)
    torch.testing.assert_close(again, whole[:, 5:], rtol=1e-5, atol=1e-5)
    model(random_tokens(3, 2), cache=forked)
    for rows in ([0, 2], [1, 0]):
        forked.select(rows)
        forked.truncate(12)
        tokens = random_tokens(1, 1, seed=4)
        row_logits = model(tokens.expand(2, 1), cache=forked)
        alone = model(torch.cat([tokens_BT, tokens], 1))[:, -1]
        torch.testing.assert_close(row_logits[:, 0], alone.expand(2, -1), rtol=1e-5, atol=1e-5)
        forked.truncate(12, row=1)


@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1], [1]])
def test_rows_selected_in_inference_mode_are_written_outside_of_it(rows: list[int]) -> None:
    model, point = tiny_model(), HookPoint(1, "resid_pre")
    with torch.inference_mode():
        cache = model.new_cache(2, 8)
        cache.keep(point)
        model(random_tokens(2, 3), cache=cache)
        cache.select(rows)
    model(random_tokens(len(rows), 2), cache=cache)
    assert cache.lengths == [5] * len(rows)


def test_select_moves_the_right_rows() -> None:
    model = tiny_model()
    tokens_BT = random_tokens(4, 9)
    cache = model.new_cache(4, 12)
    model(tokens_BT, lengths_B=[9, 5, 7, 6], cache=cache)
    cache.select([1, 3])
    assert cache.lengths == [5, 6] and cache.rows == 2
    step = model(tokens_BT[[1, 3], :1], cache=cache)
    cache.select([1])
    torch.testing.assert_close(
        step[1, 0], model(torch.cat([tokens_BT[3:4, :6], tokens_BT[3:4, :1]], 1))[0, -1], rtol=1e-5, atol=1e-5
    )
    assert cache.lengths == [7]


@pytest.mark.parametrize(
    ("head_dim", "factor", "expected"),
    [
        (128, 8, {29: 2.166570763503359e-3, 34: 1.7850781276799638e-4, 35: 9.556212353964683e-5}),
        (64, 32, {15: 1.290547928209264e-3, 17: 9.70828780262767e-5, 31: 9.418306725434911e-8}),
        (64, 8, {15: 1.3718935677611381e-3, 31: 3.7673226901739645e-7}),
        (128, 32, {31: 7.625412033563573e-4, 63: 7.672314972286278e-8}),
    ],
)
def test_scaled_rope_frequencies_are_those_of_the_released_models(
    head_dim: int, factor: int, expected: dict[int, float]
) -> None:
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    rope = Rope(tiny_config(head_dim=head_dim, rope_theta=500000.0, rope_scaling=scaling))
    frequencies = rope.frequencies()
    for index, value in expected.items():
        assert frequencies[index].item() == pytest.approx(value, rel=2e-6)


def test_unembedding_is_the_embedding_when_tied_and_the_head_otherwise() -> None:
    tied, untied = tiny_model(), tiny_model(0, tiny_config(tied=False))
    assert tied.unembedding_VD is tied.embedding_VD
    assert untied.head is not None and untied.unembedding_VD is untied.head.weight
    tokens_BT = random_tokens(1, 5)
    resid_BTD = untied(tokens_BT, stop_after=HookPoint(1, "resid_post"))
    assert torch.equal(untied.unembed(resid_BTD), untied(tokens_BT))


# Hooks


def test_hooks_that_return_their_argument_leave_logits_bit_identical() -> None:
    model, tokens_BT = tiny_model(), random_tokens(2, 9)
    hooks = Hooks()
    assert torch.equal(model(tokens_BT, hooks=hooks), model(tokens_BT))
    for layer in range(2):
        for site in SITES:
            hooks.add(HookPoint(layer, site), lambda x_BTD, span: x_BTD)
    assert torch.equal(model(tokens_BT, hooks=hooks), model(tokens_BT))


@pytest.mark.parametrize("site", SITES)
def test_stop_after_returns_exactly_what_the_hook_left(site: str) -> None:
    model, tokens_BT = tiny_model(), random_tokens(2, 9)
    seen: list[Tensor] = []

    def double(x_BTD: Tensor, span: Span) -> Tensor:
        seen.append(x_BTD * 2)
        return seen[-1]

    hooks, point = Hooks(), HookPoint(1, site)
    hooks.add(point, double)
    assert model(tokens_BT, hooks=hooks, stop_after=point) is seen[0]
    assert torch.equal(model(tokens_BT, stop_after=point) * 2, seen[0])


def test_sites_of_a_block_add_up() -> None:
    model, tokens_BT = tiny_model(), random_tokens(1, 9)
    at = {site: model(tokens_BT, stop_after=HookPoint(1, site)) for site in SITES}
    assert torch.equal(at["resid_pre"] + at["attn_out"], at["resid_mid"])
    assert torch.equal(at["resid_mid"] + at["mlp_out"], at["resid_post"])
    assert torch.equal(at["resid_pre"], model(tokens_BT, stop_after=HookPoint(0, "resid_post")))


def test_an_added_direction_reaches_only_later_positions() -> None:
    model, tokens_BT = tiny_model(), random_tokens(1, 9)

    def push(x_BTD: Tensor, span: Span) -> Tensor:
        return x_BTD + (span.positions_BT == 5)[..., None].float()

    hooks = Hooks()
    hooks.add(HookPoint(0, "resid_mid"), push)
    changed = (model(tokens_BT, hooks=hooks) != model(tokens_BT)).any(-1)[0]
    assert changed.tolist() == [False] * 5 + [True] * 4


def test_hooks_run_in_order_and_can_be_removed() -> None:
    hooks, point, order = Hooks(), HookPoint(0, "resid_post"), []

    def first(x_BTD: Tensor, span: Span) -> Tensor:
        order.append(1)
        return x_BTD

    def second(x_BTD: Tensor, span: Span) -> Tensor:
        order.append(2)
        return x_BTD

    hooks.add(point, first)
    hooks.add(point, second)
    hooks.add(HookPoint(0, "resid_pre"), second)
    assert hooks.points() == (HookPoint(0, "resid_pre"), point)
    tiny_model()(random_tokens(1, 2), hooks=hooks)
    assert order == [2, 1, 2]
    hooks.remove(point, first)
    hooks.remove(point, second)
    assert list(hooks) == [HookPoint(0, "resid_pre")]
    with pytest.raises(ValueError, match=r"not attached at blocks\.0\.hook_resid_post"):
        hooks.remove(point, first)


def test_the_span_tells_positions_padding_and_what_is_generated() -> None:
    model, spans = tiny_model(), list[Span]()
    hooks = Hooks()
    hooks.add(HookPoint(0, "resid_pre"), recorder(spans))
    cache, tokens_BT = model.new_cache(2, 9), random_tokens(2, 4)
    model(tokens_BT, lengths_B=[4, 2], cache=cache, hooks=hooks)
    model(tokens_BT[:, :1], cache=cache, hooks=hooks)
    assert spans[0].positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    assert spans[0].generated_BT.tolist() == [[False, False, False, True], [False, True, False, False]]
    assert torch.equal(spans[0].tokens_BT, tokens_BT)
    assert spans[1].positions_BT.tolist() == [[4], [2]] and spans[1].rows == (0, 1)


def test_hook_points_beyond_the_last_block_are_refused() -> None:
    model, hooks = tiny_model(), Hooks()
    hooks.add(HookPoint(2, "resid_post"), lambda x_BTD, span: x_BTD)
    for arguments in (dict(hooks=hooks), dict(stop_after=HookPoint(2, "resid_pre"))):
        with pytest.raises(ValueError, match="there is no block 2 in a model of 2 blocks"):
            model(random_tokens(1, 2), **arguments)


def test_gradients_reach_a_hooked_residual() -> None:
    model, tokens_BT = tiny_model(), random_tokens(1, 6)
    delta_D = torch.zeros(32, requires_grad=True)
    hooks = Hooks()
    hooks.add(HookPoint(0, "resid_post"), lambda x_BTD, span: x_BTD + delta_D)
    model(tokens_BT, hooks=hooks)[0, -1, 7].backward()
    assert delta_D.grad is not None and delta_D.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("blocks.19.hook_resid_post", HookPoint(19, "resid_post")),
        ("blocks.0.hook_resid_pre", HookPoint(0, "resid_pre")),
        ("blocks.3.hook_mlp_out", HookPoint(3, "mlp_out")),
        ("model.layers.19", HookPoint(19, "resid_post")),
        ("model.layers.19.output", HookPoint(19, "resid_post")),
        ("layers.7", HookPoint(7, "resid_post")),
        ("layers.7.mlp", HookPoint(7, "mlp_out")),
        ("layers.7.self_attn", HookPoint(7, "attn_out")),
        ("layer_7", HookPoint(7, "resid_pre")),
        ("embed_tokens", HookPoint(0, "resid_pre")),
        ("L15R", HookPoint(15, "resid_post")),
        ("L15A", HookPoint(15, "attn_out")),
        ("L15M", HookPoint(15, "mlp_out")),
        ("resid_post_layer_11", HookPoint(11, "resid_post")),
        ("Llama-3.1-8B-Instruct-SAE-l19", HookPoint(19, "resid_post")),
        ("20-llamascope-res-131k", HookPoint(20, "resid_post")),
        ("20-llamascope-mlp-32k", HookPoint(20, "mlp_out")),
        ("20-llamascope-att-32k", HookPoint(20, "attn_out")),
    ],
)
def test_hook_points_parse_what_others_write(text: str, point: HookPoint) -> None:
    assert HookPoint.parse(text) == point
    assert HookPoint.parse(str(point)) == point


@pytest.mark.parametrize(
    "text", ["", "blocks.x.hook_resid_post", "blocks.1.hook_resid", "blocks.-1.hook_resid_pre", "L15TC"]
)
def test_other_texts_are_no_hook_point(text: str) -> None:
    with pytest.raises(ValueError, match="is not a hook point"):
        HookPoint.parse(text)
