"""A cache brought up to date above a kept residual equals one read anew; long prompts in chunks equal whole ones."""

import pytest
import torch
from torch import Tensor

from llama_3.cache import KVCache
from llama_3.generate import rerun, stream_steps
from llama_3.hooks import SITES, HookPoint, Hooks, Span
from llama_3.model import Transformer
from llama_3.sampling import Sampling
from tests.llama_3.test_generate import run, tokens_of
from tests.llama_3.test_model import recorder
from tests.tiny import tiny_config, tiny_model

torch.set_num_threads(1)

TOKENS = [256, *range(60, 90)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(11, tiny_config(n_layers=4, n_heads=4, head_dim=10))


def pushing(model: Transformer, point: HookPoint, size: float) -> Hooks:
    push_D = torch.randn(point.width(model.config), generator=torch.Generator().manual_seed(2)) * size
    hooks = Hooks()
    hooks.add(point, lambda x_BTD, span: x_BTD + push_D)
    return hooks


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def read(model: Transformer, hooks: Hooks, keep: HookPoint | None, tokens: list[int]) -> KVCache:
    cache = model.new_cache(1, 64)
    if keep is not None:
        cache.keep(keep)
    model(torch.tensor([tokens]), cache=cache, hooks=hooks)
    return cache


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("start", [0, 13])
def test_rerun_equals_reading_everything_anew(model: Transformer, site: str, start: int) -> None:
    point = HookPoint(2, site)
    before, after = pushing(model, point, 0.3), pushing(model, point, -0.7)
    cache = read(model, before, point, TOKENS)
    # Positions below `start` keep what `before` did: the oracle reads them under it, the rest under `after`.
    oracle = model.new_cache(1, 64)
    if start:
        model(torch.tensor([TOKENS[:start]]), cache=oracle, hooks=before)
    model(torch.tensor([TOKENS[start:]]), cache=oracle, hooks=after)
    passes = list(rerun(model, cache, TOKENS, start, prompt_length=len(TOKENS), hooks=after, chunk=7))
    assert len(passes) == -(-(len(TOKENS) - start) // 7)
    assert cache.lengths == oracle.lengths == [len(TOKENS)]
    for token in (5, 9, 200):
        one = torch.tensor([[token]])
        assert close(model(one, cache=cache, hooks=after), model(one, cache=oracle, hooks=after))


def test_rerun_runs_only_the_layers_above_and_can_be_repeated(model: Transformer) -> None:
    point = HookPoint(1, "resid_post")
    cache = read(model, Hooks(), point, TOKENS)
    for size in (0.5, -0.5, 0.0):
        hooks, below, above = pushing(model, point, size), list[Span](), list[Span]()
        hooks.add(HookPoint(1, "mlp_out"), recorder(below))
        hooks.add(HookPoint(2, "resid_pre"), recorder(above))
        list(rerun(model, cache, TOKENS, 4, prompt_length=20, hooks=hooks))
        assert below == []
        assert [span.positions_BT[0].tolist() for span in above] == [list(range(4, len(TOKENS)))]
        assert above[0].prompt_lengths_B.tolist() == [20]
    one = torch.tensor([[7]])
    assert close(model(one, cache=cache), model(one, cache=read(model, Hooks(), None, TOKENS)))


def test_a_kept_residual_survives_fork_and_select_and_grows_with_decoding(model: Transformer) -> None:
    point = HookPoint(3, "resid_pre")
    cache = model.new_cache(2, 40)
    cache.keep(point)
    both = torch.tensor([TOKENS[:20], TOKENS[10:30]])
    model(both, cache=cache)
    model(torch.tensor([[1], [2]]), cache=cache)
    cache.select([1])
    cache = cache.fork(0, 1, capacity=50)
    tokens = [*TOKENS[10:30], 2]
    hooks = pushing(model, point, 1.0)
    list(rerun(model, cache, tokens, 0, prompt_length=20, hooks=hooks))
    one = torch.tensor([[7]])
    assert close(model(one, cache=cache, hooks=hooks), model(one, cache=read(model, hooks, None, tokens), hooks=hooks))


def test_rows_of_different_lengths_rerun_together(model: Transformer) -> None:
    point = HookPoint(2, "resid_post")
    cache = model.new_cache(2, 40)
    cache.keep(point)
    padded = torch.tensor([TOKENS[:20], TOKENS[:12] + [0] * 8])
    model(padded, lengths_B=[20, 12], cache=cache)
    hooks = pushing(model, point, 1.0)
    cache.truncate(9, row=0)
    cache.truncate(6, row=1)
    tail = torch.tensor([TOKENS[9:20], TOKENS[6:12] + [0] * 5])
    together = model(tail, lengths_B=[11, 6], cache=cache, hooks=hooks, last_only=True, rerun=True)
    for row, (start, end) in enumerate([(9, 20), (6, 12)]):
        alone = model.new_cache(1, 40)
        model(torch.tensor([TOKENS[:start]]), cache=alone)
        expected = model(torch.tensor([TOKENS[start:end]]), cache=alone, hooks=hooks, last_only=True)
        assert close(together[row], expected[0])


@pytest.mark.parametrize("chunk", [1, 5, 8, 100])
def test_long_prompts_read_in_chunks_give_the_same_tokens(model: Transformer, chunk: int) -> None:
    prompts = [TOKENS, TOKENS[:3], TOKENS[:17]]
    whole = run(model, prompts, sampling=Sampling(0.0), alternatives=3)
    spans, hooks = list[Span](), Hooks()
    hooks.add(HookPoint(0, "resid_pre"), recorder(spans))
    parts = run(model, prompts, sampling=Sampling(0.0), alternatives=3, chunk=chunk, hooks=hooks)
    for ours, theirs in zip(parts, whole, strict=True):
        assert tokens_of(ours) == tokens_of(theirs)
        assert [step.logprob for step in ours] == pytest.approx([step.logprob for step in theirs], rel=1e-4)
    for row, prompt in enumerate(prompts):  # every token was shown once, in order
        shown = [
            token
            for span in spans
            for token, place in zip(span.tokens_BT[row].tolist(), span.positions_BT[row].tolist(), strict=True)
            if place >= 0
        ]
        assert shown[: len(prompt)] == prompt


def test_a_pass_that_only_reads_yields_nothing_and_the_stop_flag_is_seen_between_chunks(model: Transformer) -> None:
    options = dict(sampling=Sampling(0.0), seeds=[0], max_tokens=2, stop_ids=())
    counts = [len(steps) for steps in stream_steps(model, [TOKENS], chunk=10, **options)]  # type: ignore[arg-type]
    assert counts == [0, 0, 0, 1, 1]
