"""A reply measured against the unsteered model on the same text, and two replies beside each other."""

import math

import pytest
import torch

from llama_3.hooks import HookPoint, Hooks
from llama_3.model import plan_span
from sae.intervene import Steerer
from steer.compare import compare, repeated
from steer.edits import SteeringSet
from steer.engine import Engine
from steer.events import LatentHit, TokenEvent
from steer.guard import STEP, WAIT, Guard
from steer.session import Prompt
from tests.steer.test_engine import ASK, HOOK, end, run, steering, tiny_sae, tokens
from tests.tiny import byte_tokenizer, tiny_model

PUSH = steering("5 +6 on generated", "clamp 9 3 on prompt")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model(), byte_tokenizer(), tiny_sae())


def events_of(events: list[object], row: int) -> list[TokenEvent]:
    return [event for event in events if isinstance(event, TokenEvent) and event.row == row]


def logprobs(engine: Engine, text: list[int], prompt: int, used: SteeringSet) -> torch.Tensor:
    """Log-probabilities (T, V) after each token of a text that is read at once."""
    tokens_BT = torch.tensor([text])
    hooks, point = Hooks(), HookPoint.parse(HOOK)
    compiled = engine.compile(used)
    if compiled:
        hooks.add(point, Steerer(engine.sae, engine.tokenizer.special_ids, sets={0: compiled[point]}))
    span = plan_span(tokens_BT, [0], [len(text)], prompt_lengths=[prompt])
    with torch.inference_mode():
        return engine.model.forward(tokens_BT, hooks=hooks, span=span)[0].float().log_softmax(-1)


def test_kl_and_surprisal_are_those_of_the_unsteered_model_on_the_steered_text(engine: Engine) -> None:
    events = run(engine, [ASK, ASK], [SteeringSet(), PUSH], seeds=[3, 3], watch=[0, 1])
    prompt = engine.tokenizer.encode(ASK.text or "", bos=True)
    for row, used in ((0, SteeringSet()), (1, PUSH)):
        reply = events_of(events, row)
        text = prompt + [event.token for event in reply]
        ours, theirs = (logprobs(engine, text, len(prompt), one) for one in (used, SteeringSet()))
        for event in reply:
            place = event.index - 1
            p, q = ours[place], theirs[place]
            assert event.logprob == pytest.approx(float(p[event.token]), abs=1e-4)
            assert event.surprisal == pytest.approx(-float(q[event.token]), abs=1e-4)
            assert event.expected == pytest.approx(-float((q.exp() * q).sum()), abs=1e-4)
            assert event.kl == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)
    assert max(event.kl or 0 for event in events_of(events, 0)) < 1e-6
    assert max(event.kl or 0 for event in events_of(events, 1)) > 0.01


@pytest.mark.parametrize("reuse", [False, True])
def test_a_reply_is_the_same_measured_or_not(engine: Engine, reuse: bool) -> None:
    for used in (SteeringSet(), PUSH, steering("3 4 when 5 > 0.1 ramp 3")):
        alone = run(engine, [ASK], lambda used=used: used, seeds=[3], reuse=reuse)
        watched = run(engine, [ASK], lambda used=used: used, seeds=[3], reuse=reuse, watch=[0])
        assert tokens(alone) == tokens(watched)
        for mine, other in zip(events_of(alone, 0), events_of(watched, 0), strict=True):
            assert mine.kl is None and other.kl is not None
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [hit.latent for hit in mine.hits] == [hit.latent for hit in other.hits]
        ours, theirs = end(alone).report, end(watched).report
        assert (ours.steps, ours.applied, ours.carried) == (theirs.steps, theirs.applied, theirs.carried)
        for a, b in zip(ours.edits, theirs.edits, strict=True):
            assert (a.text, a.positions) == (b.text, b.positions)
            assert a.before == pytest.approx(b.before, abs=1e-4) and a.after == pytest.approx(b.after, abs=1e-4)


def test_rows_of_one_prompt_equal_the_rows_alone(engine: Engine) -> None:
    """They share a reading of the prompt; each is what it would have been by itself."""
    sets = [SteeringSet(), PUSH, PUSH, steering("bias 4 3", "9 4 on 2..5"), SteeringSet(error="drop")]
    together = run(engine, [ASK] * 5, sets, seeds=[3, 3, 4, 3, 3])
    for row, (used, seed) in enumerate(zip(sets, [3, 3, 4, 3, 3], strict=True)):
        alone = run(engine, [ASK], [used], seeds=[seed])
        assert tokens(together, row) == tokens(alone)
        ours, theirs = end(together, row).report, end(alone).report
        assert (ours.steps, ours.applied, ours.first, ours.last) == (
            theirs.steps,
            theirs.applied,
            theirs.first,
            theirs.last,
        )
        for a, b in zip(ours.edits, theirs.edits, strict=True):
            assert (a.text, a.positions) == (b.text, b.positions)
            assert a.before == pytest.approx(b.before, abs=1e-4) and a.after == pytest.approx(b.after, abs=1e-4)


def test_a_prompt_of_several_rows_is_read_once(engine: Engine) -> None:
    counts: list[tuple[int, int]] = []
    block = engine.model.blocks[0]
    handle = block.register_forward_hook(lambda module, inputs, output: counts.append(tuple(output.shape[:2])))
    run(engine, [Prompt(text="abcdefgh")] * 2, [SteeringSet(), PUSH], seeds=[3, 3], watch=[1], max_tokens=1, hits=False)
    handle.remove()
    assert counts == [(1, 8), (3, 1)]  # the last token of the prompt is read by both and the shadow


def event(token: int, *hits: tuple[int, float], **facts: float) -> TokenEvent:
    active = tuple(LatentHit(latent, activation) for latent, activation in hits)
    return TokenEvent(0, 0, token, "x", False, -1.0, hits=active, **facts)


def test_a_comparison_counts_what_differs() -> None:
    baseline = [event(1, (7, 2.0)), event(2, (7, 4.0)), event(3)]
    steered = [event(1, (7, 2.0), kl=0.0, surprisal=1.0), event(9, (8, 3.0), kl=2.0, surprisal=math.log(4) * 2 - 1)]
    found = compare(baseline, steered)
    assert (found.first_difference, found.same) == (1, 1)
    assert found.kl == pytest.approx(1.0)
    assert found.perplexity == pytest.approx(4.0)
    assert found.baseline_perplexity == pytest.approx(math.e)
    assert [(change.latent, change.difference) for change in found.changed] == [(8, 1.5), (7, -1.0)]
    assert compare(baseline, baseline).first_difference is None
    assert compare(baseline, baseline[:2]).first_difference == 2
    assert compare([], []).changed == ()


def test_repeats_are_four_grams_that_were_there_before() -> None:
    assert repeated([1, 2, 3]) == 0
    assert repeated([1] * 7) == pytest.approx(3 / 4)
    assert repeated([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6)


def test_a_guard_backs_off_only_when_told_to_and_not_at_once() -> None:
    quiet, firm = Guard(), Guard(backs_off=True)
    factors = []
    for n in range(3 * WAIT):
        for guard in (quiet, firm):
            guard.see(event(n, kl=5.0, surprisal=1.0, expected=1.0))
        factors.append(firm.factor)
    assert quiet.factor == 1.0 and quiet.meter is not None and quiet.meter.word == "over the line"
    assert factors == [1.0] * (WAIT - 1) + [STEP] * WAIT + [STEP**2] * WAIT + [STEP**3]
    for broken in (math.nan, math.inf):
        for figures in ((broken, 1.0), (0.0, broken)):
            lost = Guard(backs_off=True)
            for n in range(WAIT):
                lost.see(event(n, kl=figures[0], surprisal=figures[1], expected=1.0))
            assert lost.factor == STEP and lost.meter is not None and lost.meter.word == "over the line"
            assert (
                lost.summary.startswith("surprise " if figures[0] == 0 else "KL ") and "over the line" in lost.summary
            )
    calm = Guard(backs_off=True)
    for n in range(50):
        calm.see(event(n, kl=0.1, surprisal=1.1, expected=1.0))
    assert calm.factor == 1.0 and calm.meter is not None and calm.meter.word == "calm"
    for _ in range(50):
        calm.see(event(4, kl=0.1, surprisal=1.0, expected=1.0))
    assert calm.meter.repetition == 1.0 and calm.factor < 1.0


def test_a_guard_names_the_figure_that_is_nearest_its_line() -> None:
    told = []
    for written, kl, surprisal in ((range(12), 0.5, 1.0), (range(12), 0.0, 1.7), ((1, 2, 3, 4, 5, 6) * 2, 0.0, 1.0)):
        guard = Guard()
        for token in written:
            guard.see(event(token, kl=kl, surprisal=surprisal, expected=1.0))
        told.append(guard.summary)
    assert told == ["KL 0.5, calm", "surprise 0.7, strained", "repeats 33%, strained"]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_guard_backs_off_from_what_is_no_number(broken: float) -> None:
    guard = Guard(backs_off=True)
    for n in range(WAIT):
        guard.see(event(n, kl=broken, surprisal=1.0, expected=1.0))
    assert guard.factor == STEP and guard.meter is not None and guard.meter.word == "over the line"
