"""Sampling and the generation loop: rows that do not disturb one another, ends of replies, counts of passes."""

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_3.generate import ReplyText, Step, StopText, stream_steps
from llama_3.hooks import HookPoint, Hooks, Span
from llama_3.model import Transformer
from llama_3.sampling import Sampling, sample
from tests.llama_3.test_model import recorder
from tests.tiny import byte_tokenizer, tiny_config, tiny_model

torch.set_num_threads(1)

PROMPTS = [[256, 72, 105], [256, 1, 2, 3, 4, 5, 6, 7], [256], [256, 9, 9, 9, 9]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(7)


def run(model: Transformer, prompts: list[list[int]], **options: Any) -> list[list[Step]]:
    """The steps of each row."""
    settings: dict[str, Any] = dict(sampling=Sampling(), seeds=range(len(prompts)), max_tokens=12, stop_ids=())
    rows: list[list[Step]] = [[] for _ in prompts]
    for steps in stream_steps(model, prompts, **{**settings, **options}):
        for step in steps:
            rows[step.row].append(step)
    return rows


def tokens_of(steps: list[Step]) -> list[int]:
    return [step.token for step in steps]


# Sampling


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, 0.95),
        Sampling(1.3, 1.0),
        Sampling(1.0, 0.4),
        Sampling(0.9, 1.0, top_k=5),
        Sampling(0.9, 0.8, top_k=7),
        Sampling(1.0, 1.0, min_p=0.2),
        Sampling(1.5, 0.9, top_k=20, min_p=0.05, repetition_penalty=1.4),
        Sampling(1.0, 0.999, repetition_penalty=0.8),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers(sampling: Sampling) -> None:
    logits_V = torch.randn(400, generator=torch.Generator().manual_seed(3)) * 2.5
    history = [5, 5, 17, 200]
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    expected_V = chain(torch.LongTensor([history]), logits_V[None].clone()).softmax(-1)[0]
    n = 4000
    generator = generators(0)[0]
    drawn = sample(logits_V.expand(n, -1), [sampling] * n, [generator] * n, [history] * n).tokens_B
    counts_V = torch.bincount(drawn, minlength=400)
    assert not counts_V[expected_V == 0].any()
    error_V = (counts_V / n - expected_V).abs()
    assert (error_V <= 5 * (expected_V * (1 - expected_V) / n).sqrt() + 1e-3).all()


def test_what_is_reported_is_the_models_own_distribution() -> None:
    logits_BV = torch.randn(2, 50, generator=generators(1)[0])
    drawn = sample(logits_BV, [Sampling(0.1, 0.5), Sampling(0.0)], generators(0, 0), alternatives=3)
    logprobs_BV = logits_BV.log_softmax(-1)
    for row in range(2):
        assert drawn.logprobs_B[row] == logprobs_BV[row, drawn.tokens_B[row]]
    torch.testing.assert_close(drawn.entropy_B, -(logprobs_BV.exp() * logprobs_BV).sum(-1))
    top = logprobs_BV.exp().topk(3)
    assert torch.equal(drawn.alternatives_BA, top.indices) and torch.equal(drawn.probabilities_BA, top.values)


def test_a_logit_of_minus_infinity_has_no_share_in_the_entropy() -> None:
    logits_BV = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert sample(logits_BV, [Sampling()], generators(0)).entropy_B.item() == pytest.approx(math.log(2))


def test_temperature_zero_is_greedy_and_tiny_ones_do_not_overflow() -> None:
    logits_BV = torch.randn(3, 300, generator=generators(2)[0]) * 50
    for sampling in (Sampling(0.0), Sampling(1e-6), Sampling(1e-6, 1.0), Sampling(1.0, 1.0, top_k=1)):
        drawn = sample(logits_BV, [sampling] * 3, generators(0, 1, 2))
        assert torch.equal(drawn.tokens_B, logits_BV.argmax(-1))


def test_a_flat_distribution_is_sampled_whole() -> None:
    n = 3000
    drawn = sample(torch.zeros(n, 600), [Sampling(1.0, 0.999)] * n, generators(0) * n).tokens_B
    assert len(set(drawn.tolist())) > 560  # more than the candidates of the first look


@pytest.mark.parametrize(
    "wrong",
    [dict(temperature=-0.1), dict(temperature=math.nan), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1),
     dict(min_p=2.0), dict(repetition_penalty=0.0)],
)  # fmt: skip
def test_sampling_numbers_out_of_range_are_named(wrong: dict[str, float]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=f"{name} is .* and must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


# Generation


def test_greedy_steps_equal_repeated_forward_passes(model: Transformer) -> None:
    [steps] = run(model, [PROMPTS[0]], sampling=Sampling(0.0), alternatives=2)
    tokens = list(PROMPTS[0])
    for step in steps:
        logprobs_V = model(torch.tensor([tokens]))[0, -1].log_softmax(-1)
        assert step.token == logprobs_V.argmax()
        assert step.logprob == pytest.approx(logprobs_V.max().item(), abs=1e-4)
        assert step.alternatives[0].token == step.token
        assert step.alternatives[0].probability == pytest.approx(math.exp(step.logprob), rel=1e-4)
        tokens.append(step.token)
    assert [step.finish for step in steps] == [None] * 11 + ["length"]


def test_rows_in_a_batch_get_the_tokens_they_get_alone(model: Transformer) -> None:
    samplings = [Sampling(), Sampling(1.2, 0.8, top_k=30), Sampling(0.0), Sampling(1.0, 1.0, repetition_penalty=1.3)]
    seeds = [11, 12, 13, 14]
    together = run(model, PROMPTS, sampling=samplings, seeds=seeds, max_tokens=24, stop_ids=(3, 77, 130))
    for row, prompt in enumerate(PROMPTS):
        [alone] = run(
            model, [prompt], sampling=samplings[row], seeds=[seeds[row]], max_tokens=24, stop_ids=(3, 77, 130)
        )
        assert tokens_of(alone) == tokens_of(together[row])
        assert [step.finish for step in alone] == [step.finish for step in together[row]]


def test_the_same_seed_gives_the_same_reply_and_another_a_different_one(model: Transformer) -> None:
    hot = Sampling(1.5, 1.0)
    first, again, other = run(model, [PROMPTS[0]] * 3, sampling=hot, seeds=[5, 5, 6])
    assert tokens_of(first) == tokens_of(again) != tokens_of(other)


def test_a_stop_token_is_the_last_step(model: Transformer) -> None:
    [free] = run(model, [PROMPTS[1]])
    stop_id = free[4].token
    [stopped] = run(model, [PROMPTS[1]], stop_ids=(stop_id,))
    end = tokens_of(free).index(stop_id)
    assert tokens_of(stopped) == tokens_of(free)[: end + 1] and stopped[-1].finish == "stop"


def test_a_stop_string_ends_the_row_where_it_is_complete(model: Transformer) -> None:
    tokenizer = byte_tokenizer()
    hooks = Hooks()
    spelled = b"abcSTOPd"

    def spell(x_BTD: Tensor, span: Span) -> Tensor:
        """Turn the residual towards the next letter of a fixed text."""
        last = int(span.positions_BT[0, -1])
        letter = model.unembedding_VD[spelled[(last - 2) % len(spelled)]]
        return x_BTD * 0 + letter * 100

    hooks.add(HookPoint(1, "resid_post"), spell)
    texts = [ReplyText(tokenizer, ("xyz", "STOP"))]
    [steps] = run(model, [PROMPTS[0]], hooks=hooks, sampling=Sampling(0.0), texts=texts)
    assert bytes(tokens_of(steps)) == b"abcSTOP" and steps[-1].finish == "stop"
    assert [step.text for step in steps] == ["a", "b", "c", "", "", "", ""] and texts[0].flush() == ""


def test_the_context_ends_a_row_with_length() -> None:
    model = tiny_model(7, tiny_config(max_context=10))
    long, short = run(model, [PROMPTS[1], PROMPTS[0]], max_tokens=50, read_last=True)
    assert (len(long), len(short)) == (2, 7)
    assert long[-1].finish == short[-1].finish == "length"


@pytest.mark.parametrize(("read_last", "passes"), [(False, 4), (True, 5)])
def test_yields_count_forward_passes_and_read_last_adds_one(model: Transformer, read_last: bool, passes: int) -> None:
    spans, hooks = list[Span](), Hooks()
    hooks.add(HookPoint(1, "resid_post"), recorder(spans))
    cache = model.new_cache(1, 20)
    yields = list(
        stream_steps(model, [PROMPTS[0]], sampling=Sampling(), seeds=[0], max_tokens=4, stop_ids=(), hooks=hooks,
                     cache=cache, read_last=read_last)
    )  # fmt: skip
    assert len(yields) == len(spans) == passes
    assert [len(steps) for steps in yields] == [1, 1, 1, 1] + [0] * read_last
    made = [step.token for steps in yields for step in steps]
    assert torch.cat([span.tokens_BT[0] for span in spans]).tolist() == [*PROMPTS[0], *made[: passes - 1]]
    assert torch.cat([span.positions_BT[0] for span in spans]).tolist() == list(range(passes + 2))
    assert cache.lengths == [passes + 2]


def test_rows_keep_their_numbers_when_others_leave(model: Transformer) -> None:
    free = run(model, PROMPTS)
    stop_id = free[1][2].token
    spans, hooks = list[Span](), Hooks()
    hooks.add(HookPoint(0, "resid_pre"), recorder(spans))
    rows = run(model, PROMPTS, stop_ids=(stop_id,), hooks=hooks, read_last=True)
    for row, (steps, before) in enumerate(zip(rows, free, strict=True)):
        assert tokens_of(steps) == tokens_of(before)[: len(steps)]
        reads = len(steps) + (steps[-1].finish == "length")
        assert sum(row in span.rows for span in spans) == reads
        for span in spans[1:]:
            if row in span.rows:
                assert span.prompt_lengths_B[span.rows.index(row)] == len(PROMPTS[row])
                assert span.generated_BT[span.rows.index(row)].all()
    assert len(rows[1]) <= 3 and any(len(span.rows) < 4 for span in spans)


def test_a_cached_prefix_gives_the_same_reply(model: Transformer) -> None:
    [whole] = run(model, [PROMPTS[1]])
    cache = model.new_cache(1, 40)
    model(torch.tensor([PROMPTS[1][:5]]), cache=cache)
    spans, hooks = list[Span](), Hooks()
    hooks.add(HookPoint(0, "resid_pre"), recorder(spans))
    [rest] = run(model, [PROMPTS[1]], cache=cache, hooks=hooks)
    assert tokens_of(rest) == tokens_of(whole)
    assert spans[0].positions_BT.tolist() == [[5, 6, 7]] and spans[0].prompt_lengths_B.tolist() == [8]
    cache.truncate(3)  # a cache used in generation can still be written outside of it
    assert model(torch.tensor([[1]]), cache=cache).shape == (1, 1, 272)


def test_a_set_stop_flag_begins_no_further_pass(model: Transformer) -> None:
    flag = threading.Event()
    stream: Iterator[list[Step]] = stream_steps(
        model, [PROMPTS[0]], sampling=Sampling(), seeds=[0], max_tokens=50, stop_ids=(), stop=flag
    )
    assert len(next(stream)) == 1
    flag.set()
    assert list(stream) == []


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "the prompt is empty"),
        ([256, 272], "token id 272 lies outside the model's vocabulary of 272"),
        ([256] * 256, "the prompt is 256 tokens long and the model's context is 256"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompt: list[int], sentence: str, model: Transformer) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(model, [PROMPTS[0], prompt])
    with pytest.raises(ValueError, match="max_tokens is 0"):
        run(model, [PROMPTS[0]], max_tokens=0)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    text = StopText(["END", "\n\n"])
    assert [text.push(piece) for piece in ("a", "bE", "N", "x", "E", "", "\n")] == ["a", "b", "", "ENx", "", "", "E"]
    assert not text.found and text.flush() == "\n"
    text = StopText(["END", "\n\n"])
    assert [text.push(piece) for piece in ("say E", "N", "D more")] == ["say ", "", ""]
    assert text.found and text.flush() == ""
    assert StopText([]).push("anything") == "anything"
    assert StopText([""]).push("anything") == "anything"


def test_penalties_and_biases_change_the_draw_and_not_the_report() -> None:
    logits_1V = torch.tensor([[3.0, 2.0, 1.0, -1.0]])

    def draw(sampling: Sampling, history: list[int], made: int) -> tuple[int, float]:
        drawn = sample(logits_1V, [sampling], generators(0), [history], [made])
        return int(drawn.tokens_B), float(drawn.logprobs_B)

    logprobs = torch.log_softmax(logits_1V[0], -1)
    greedy = Sampling(0.0)
    assert draw(greedy, [0, 0], 1)[0] == 0
    for sampling, history, made, chosen in (
        (Sampling(0.0, logit_bias=((2, 2.5),)), [], 0, 2),
        (Sampling(0.0, logit_bias=((0, -math.inf), (1, -math.inf))), [], 0, 2),
        (Sampling(0.0, frequency_penalty=0.6), [0, 1, 0], 1, 0),  # once in the reply: 3 - 0.6
        (Sampling(0.0, frequency_penalty=0.6), [1, 0, 0], 2, 1),  # twice: 3 - 1.2 < 2
        (Sampling(0.0, repetition_penalty=4.0), [0], 0, 1),  # the prompt counts
        (Sampling(0.0, frequency_penalty=-9.0), [3], 1, 3),
    ):
        token, logprob = draw(sampling, history, made)
        assert token == chosen
        assert logprob == pytest.approx(float(logprobs[chosen]), rel=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1e-46),
        Sampling(1e-38, 1.0),
        Sampling(0.7, logit_bias=((2, 10**6),)),
        Sampling(0.7, frequency_penalty=-1e6),
        Sampling(0.7, 1.0, repetition_penalty=1e-6),
    ],
    ids=str,
)
def test_extremes_draw_the_token_they_point_at(sampling: Sampling) -> None:
    logits_1V = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    drawn = sample(logits_1V, [sampling], generators(0), [[2, 2]], [2])
    assert int(drawn.tokens_B) == 2


def test_a_bias_on_a_token_that_is_not_there_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="logit_bias names token 272, outside the model's vocabulary of 272"):
        run(model, [PROMPTS[0]], sampling=Sampling(logit_bias=((272, 1.0),)))


def test_a_cache_that_leaves_nothing_to_read_is_refused(model: Transformer) -> None:
    cache = model.new_cache(1, 40)
    model(torch.tensor([PROMPTS[1]]), cache=cache)
    with pytest.raises(ValueError, match="the cache holds 8 tokens, which leaves none of the prompt's 8 to read"):
        run(model, [PROMPTS[1]], cache=cache)
