"""The reconstruction error of an SAE that is dropped: where, with which SAEs, and what the report says of it."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_3.hooks import HookPoint, Hooks
from sae.model import SAE
from steer.cli.complete import report_lines
from steer.edits import SteeringSet
from steer.engine import Engine
from steer.errors import SteerError
from steer.events import Report, TokenEvent
from steer.session import Reply, Session
from steer.store import Store
from steer.tui.status import reply_status
from tests.steer.test_engine import ASK, HOOK, end, run, steering, tiny_sae, tokens
from tests.steer.test_reuse import LETTERS
from tests.tiny import byte_tokenizer, tiny_model

DROP = SteeringSet(error="drop")
LATER = "blocks.1.hook_resid_post"


def engine_of(*hooks: str, wrong: str = "") -> Engine:
    torch.set_num_threads(1)
    doubts = {HookPoint.parse(wrong): "it fits nothing"} if wrong else None
    return Engine(tiny_model(), byte_tokenizer(), [tiny_sae(hook=hook) for hook in hooks], doubts=doubts)


def by_hand(engine: Engine, places: dict[str, SAE]) -> float:
    """Log-probability of the likeliest first token where hand-written hooks put in what SAEs decode."""
    hooks = Hooks()
    for hook, sae in places.items():

        def splice(x_BTD: torch.Tensor, span: object, sae: SAE = sae) -> torch.Tensor:
            y_BTD = x_BTD.clone()
            y_BTD[:, 1:] = sae.decode(sae.encode(x_BTD[:, 1:]), x_BTD[:, 1:])
            return y_BTD

        hooks.add(HookPoint.parse(hook), splice)
    ids = engine.tokenizer.encode(ASK.text or "", bos=True)
    return float(engine.model.forward(torch.tensor([ids]), hooks=hooks)[0, -1].log_softmax(-1).max())


def greedy(engine: Engine, one: SteeringSet) -> float:
    events = run(engine, [ASK], [one], sampling=replace(engine.defaults, temperature=0.0), max_tokens=1)
    return next(event.logprob for event in events if isinstance(event, TokenEvent) and event.logprob is not None)


def test_the_error_is_dropped_at_every_sae_edited_or_not() -> None:
    engine = engine_of(HOOK, LATER)
    saes = {str(hook): sae for hook, sae in engine.saes.items()}
    assert greedy(engine, SteeringSet()) == pytest.approx(by_hand(engine, {}), abs=1e-4)
    assert greedy(engine, DROP) == pytest.approx(by_hand(engine, saes), abs=1e-4)
    assert abs(by_hand(engine, saes) - by_hand(engine, {HOOK: saes[HOOK]})) > 0.01
    assert {hook for hook, one in engine.compile(DROP).items() if one.drop_error} == set(engine.saes)
    assert not engine.compile(replace(DROP, bypass=True))


def test_without_an_sae_there_is_no_error_to_drop() -> None:
    with pytest.raises(SteerError, match="no SAE whose error could be dropped"):
        run(engine_of(), [ASK], [DROP])
    run(engine_of(), [ASK], [replace(DROP, bypass=True)])


@pytest.mark.parametrize("wrong", [HOOK, LATER])
def test_an_sae_that_cannot_be_right_is_not_spliced_in(wrong: str) -> None:
    engine = engine_of(HOOK, LATER, wrong=wrong)
    with pytest.raises(SteerError, match="nothing is steered with a wrong SAE: it fits nothing"):
        run(engine, [ASK], [DROP])
    assert tokens(run(engine, [ASK], [SteeringSet()]))


@pytest.mark.parametrize("hooks", [(HOOK,), (LATER, HOOK)])
@pytest.mark.parametrize("reuse", [False, True])
def test_the_report_says_where_the_error_was_dropped(hooks: tuple[str, ...], reuse: bool) -> None:
    engine = engine_of(*hooks)

    def report(one: SteeringSet) -> Report:
        letters = replace(engine.defaults, logit_bias=LETTERS)
        return end(run(engine, [ASK], lambda: one, reuse=reuse, sampling=letters)).report

    plain, dropped = report(SteeringSet()), report(DROP)
    assert (plain.dropped, plain.steered, plain.first) == (0, False, None)
    read = len(engine.tokenizer.encode(ASK.text or "", bos=True)) + dropped.steps - 1
    assert dropped.steered and dropped.edits == ()
    assert (dropped.dropped, dropped.first, dropped.last) == (read - 1, 1, read - 1)  # all but BOS
    assert "  the error was dropped at" in report_lines(dropped)[1]
    special = report(replace(DROP, special_tokens=True))
    assert (special.dropped, special.first) == (dropped.dropped + 1, 0)
    edited = report(replace(steering("3 +1 on 2..4"), error="drop"))
    assert (edited.dropped, edited.first, edited.edits[0].positions) == (dropped.dropped, 1, 3)
    again = report(SteeringSet())
    assert (again.dropped, again.steered) == (0, False)


def test_rows_tell_only_of_their_own_error() -> None:
    events = run(engine_of(HOOK), [ASK] * 3, [SteeringSet(), DROP, steering("3 +1")], seeds=[1] * 3)
    assert [end(events, row).report.dropped > 0 for row in range(3)] == [False, True, False]


def test_a_session_keeps_what_the_report_says(tmp_path: Path) -> None:
    session, store = Session(engine_of(HOOK), max_tokens=5), Store(tmp_path)
    session.change(DROP)
    session.say("hi")
    list(session.reply(threading.Event()))
    store.save(session, "mine")
    fresh = Session(session.engine)
    store.restore("mine", fresh)
    before, after = session.turns[-1].reply, fresh.turns[-1].reply
    assert isinstance(before, Reply) and before.finished and before.finished.report.dropped
    assert isinstance(after, Reply) and after.finished and after.finished.report == before.finished.report
    assert reply_status(after).startswith("steered, error dropped  ")
