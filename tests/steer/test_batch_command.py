"""`steer batch` on a tiny model and SAE: what a result holds, and that it is the same however the run went."""

import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from labels.index import LabelIndex
from sae.checkpoint import save_sae
from steer.batch import Row, write
from steer.cli import main
from steer.cli.batch import Told
from steer.edits import Edit, SteeringSet
from steer.engine import Engine
from steer.events import Event, Finished, PromptRead, TokenEvent
from steer.requests import Request
from steer.session import Prompt, Sampling
from tests.steer.killing_batch import count, kill_at, write_requests
from tests.steer.test_engine import tiny_sae
from tests.tiny import byte_tokenizer, tiny_config, tiny_model, write_tiny_checkpoint

LATENTS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("batch")
    write_tiny_checkpoint(folder / "model")
    save_sae(folder / "sae", tiny_sae(), tiny_sae().stats)
    return folder


Steer = Callable[..., tuple[int, str]]


@pytest.fixture
def steer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Steer:
    """Runs a command on the tiny model; its exit code and what it said."""
    monkeypatch.setenv("STEER_HOME", str(folder / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        code = main([*arguments, *options(folder)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out + err

    return run


def options(folder: Path) -> list[str]:
    return ["--model", str(folder / "model"), "--sae", str(folder / "sae"), "--threads", "1"]


def ask(path: Path, *lines: dict[str, Any] | str) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def results(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- continuous batching --------------------------------------------------------------------------------------------

EDITS = ((), ("5 +3",), ("3 +4 ramp 8",), ("clamp 4 5 when 7 > 0.1 decay 6",), ("bias 3 2 on generated",))


@pytest.fixture(scope="module")
def engine() -> Engine:
    """In float64, so that what rounds differently does not become another token."""
    return Engine(tiny_model().double(), byte_tokenizer(), tiny_sae())


def some_rows(count: int) -> list[Row]:
    draw, rows = random.Random(4), []
    for line in range(count):
        text = "".join(draw.choices("abcd ", k=draw.randint(1, 40)))
        steering = SteeringSet(tuple(Edit.parse(edit) for edit in draw.choice(EDITS)))
        sampling = draw.choice([Sampling(0.0), Sampling(1.0, top_k=5), Sampling(0.8, repetition_penalty=1.3)])
        request = Request(line, {"id": line}, Prompt(text=text), steering, sampling, line, draw.randint(1, 24))
        rows.append(Row(request, steering, len(text) + 1 + request.max_tokens))
    return rows


def alone(engine: Engine, row: Row, hits: bool) -> list[Event]:
    one = row.request
    return list(
        engine.stream(
            [one.prompt], [row.steering], sampling=one.sampling, seeds=[one.seed], max_tokens=one.max_tokens, hits=hits,
            alternatives=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("hits", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_a_row_is_what_it_is_alone_whoever_shares_its_batch(engine: Engine, size: int, hits: bool) -> None:
    rows = some_rows(24)
    replies = dict(write(engine, rows, size, threading.Event(), hits=hits))
    assert sorted(replies) == list(range(24))
    for place, row in enumerate(rows):
        single = alone(engine, row, hits)
        own = [event for event in single if isinstance(event, TokenEvent)]
        mine, end = replies[place].events, replies[place].finished
        assert [event.token for event in mine] == [event.token for event in own]
        assert [event.text for event in mine] == [event.text for event in own]
        assert [event.index for event in mine] == [event.index for event in own]
        assert [event.logprob for event in mine] == pytest.approx([event.logprob for event in own], rel=1e-5)
        assert [len(event.hits) for event in mine] == [len(event.hits) for event in own]
        for event, other in zip(mine, own, strict=True):
            assert {hit.latent for hit in event.hits} == {hit.latent for hit in other.hits}
        last = single[-1]
        assert end is not None and isinstance(last, Finished)
        assert (end.finish, end.seed, end.text) == (last.finish, last.seed, last.text)
        ours, theirs = end.report, last.report
        assert (ours.steps, ours.applied, ours.first, ours.last) == (
            theirs.steps, theirs.applied, theirs.first, theirs.last,
        )  # fmt: skip
        assert ours.carried == theirs.carried
        for edit, other_edit in zip(ours.edits, theirs.edits, strict=True):
            assert (edit.text, edit.positions, edit.lost) == (other_edit.text, other_edit.positions, other_edit.lost)
            assert (edit.before, edit.after) == pytest.approx((other_edit.before, other_edit.after), rel=1e-4, abs=1e-5)


def test_rows_of_one_prompt_keep_the_timing_of_their_edits(engine: Engine) -> None:
    steering = [SteeringSet((Edit.parse(edit),)) for edit in ("3 +4 ramp 30", "5 +3 decay 9", "3 +4 for 12 tokens")]
    asks = [Prompt(text="Once upon a time")] * 3
    events = list(engine.stream(asks, steering, sampling=Sampling(0.0), seeds=[0] * 3, max_tokens=20))
    for row, one in enumerate(steering):
        single = list(engine.stream(asks[:1], [one], sampling=Sampling(0.0), seeds=[0], max_tokens=20))
        own = [event for event in events if isinstance(event, TokenEvent) and event.row == row]
        other = [event for event in single if isinstance(event, TokenEvent)]
        assert [event.token for event in own] == [event.token for event in other]
        assert [event.logprob for event in own] == pytest.approx([event.logprob for event in other], rel=1e-5)


def test_no_more_rows_run_than_there_are_places_and_few_stay_empty(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, int]] = []
    forward = engine.model.forward

    def noted(tokens: torch.Tensor, **given: Any) -> Any:
        ran.append((tokens.shape[0], tokens.shape[1]))
        return forward(tokens, **given)

    monkeypatch.setattr(engine.model, "forward", noted)
    rows = some_rows(64)
    list(write(engine, rows, 8, threading.Event()))
    assert max(batch for batch, _ in ran) == 8
    writing = [batch for batch, tokens in ran if tokens == 1]
    made = sum(row.request.max_tokens for row in rows)  # some stop earlier
    assert len(writing) < 1.4 * made / 8
    reading = [(batch, tokens) for batch, tokens in ran if tokens > 1]
    padded, real = (
        sum(batch * tokens for batch, tokens in reading),
        sum(len(row.request.prompt.text or "") + 1 for row in rows),
    )
    assert padded < 1.35 * real


def test_long_prompts_are_read_in_parts_beside_rows_that_are_written(engine: Engine) -> None:
    wide = Engine(tiny_model(config=tiny_config(max_context=1400)).double(), byte_tokenizer(), tiny_sae())
    prompts = [Prompt(text="ab " * size) for size in (3, 300, 200, 400, 5)]
    steering = [SteeringSet((Edit.parse("5 +2 ramp 4 on generated"),))] * 5
    events = list(
        wide.stream(prompts, steering, sampling=Sampling(0.0), seeds=[0] * 5, max_tokens=[9, 5, 30, 4, 6], places=2)
    )
    for row, prompt in enumerate(prompts):
        own = [event for event in events if event.row == row]  # type: ignore[union-attr]  # none has failed
        limit = [9, 5, 30, 4, 6][row]
        single = list(wide.stream([prompt], steering[:1], sampling=Sampling(0.0), seeds=[0], max_tokens=limit))
        assert [type(event) for event in own] == [type(event) for event in single]
        assert isinstance(own[0], PromptRead) and len(own[0].tokens) == len(prompt.text or "") + 1
        tokens = [[event.token for event in run if isinstance(event, TokenEvent)] for run in (own, single)]
        assert tokens[0] == tokens[1]


# -- results --------------------------------------------------------------------------------------------------------


def test_a_result_is_what_complete_gives_for_its_line(steer: Steer, tmp_path: Path) -> None:
    ask(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "Once", "edits": ["5 +3"], "seed": 4, "max_tokens": 7, "temperature": 0.8},
        {"id": "b", "prompt": "The cat"},
    )
    code, said = steer("batch", "in.jsonl", "out.jsonl", "--seed", "9", "--max-tokens", "5", "--hits", "2", "--json")
    assert code == 0, said
    first, second = results(tmp_path / "out.jsonl")
    assert json.loads(said.splitlines()[0]) == {
        "lines": 2, "failed": 0, "tokens": len(first["tokens"]) + len(second["tokens"]),
    }  # fmt: skip
    for result, arguments in (
        (first, ["Once", "--edit", "5 +3", "--seed", "4", "--max-tokens", "7", "--temperature", "0.8"]),
        (second, ["The cat", "--seed", "9", "--max-tokens", "5"]),
    ):
        code, said = steer("complete", *arguments, "--json", "--hits", "2")
        single = json.loads(said.splitlines()[0])
        for key in ("text", "tokens", "finish", "seed"):
            assert result[key] == single[key], key
        for own, other in zip(result["hits"], single["hits"], strict=True):
            assert [hit["latent"] for hit in own] == [hit["latent"] for hit in other]
            assert [hit["activation"] for hit in own] == pytest.approx([hit["activation"] for hit in other], rel=1e-4)
        for key in ("steps", "applied", "steered", "first", "last"):
            assert result["report"][key] == single["report"][key], key
    assert first["report"]["steered"] and not second["report"]["steered"]


def test_mistakes_are_said_on_their_lines_and_the_others_run(steer: Steer, tmp_path: Path) -> None:
    ask(
        tmp_path / "in.jsonl",
        "{broken",
        {"id": "latent", "prompt": "a", "edits": ["64 +1"]},
        {"id": "hook", "prompt": "a", "edits": ["3 +1 at blocks.1.hook_resid_post"]},
        {"id": "long", "prompt": "a" * 300},
        {"id": "dialog", "messages": [{"role": "user", "content": "a" * 300}]},
        {"id": "old", "messages": [{"role": "user", "content": "a" * 99}, {"role": "assistant", "content": "b" * 99},
                                   {"role": "user", "content": "c"}]},
        {"id": "token", "prompt": "a", "logit_bias": {"9999": 1}},
        {"id": "tokens", "prompt": "a", "max_tokens": 1000},
        {"id": "twice", "prompt": "a", "max_tokens": 2},
        {"id": "twice", "prompt": "a", "max_tokens": 2},
    )  # fmt: skip
    code, said = steer("batch", "in.jsonl", "out.jsonl")
    assert code == 0 and "all 10 lines are in out.jsonl, 8 of them with an error" in said
    assert "1 line has the id of an earlier one: line 10 that of line 9\n" in said
    found = {result["id"]: result for result in results(tmp_path / "out.jsonl")}
    assert found[None]["line"] == 1 and "not JSON" in found[None]["error"]
    for name, why in (
        ("latent", "there is no latent 64"),
        ("hook", "needs an SAE at blocks.1.hook_resid_post"),
        ("long", "the prompt has 301 tokens, the model holds 256"),
        ("dialog", "the last message is"),
        ("old", "do not fit: the model holds 256"),
        ("token", "logit_bias names token 9999"),
        ("tokens", "a reply of 1000 tokens does not fit"),
    ):
        assert why in found[name]["error"] and "text" not in found[name], name
    assert len(found["twice"]["tokens"]) <= 2


def test_a_baseline_is_the_same_request_without_its_edits(steer: Steer, tmp_path: Path) -> None:
    ask(
        tmp_path / "in.jsonl",
        {"id": "steered", "prompt": "Once", "seed": 1},
        {"id": "plain", "prompt": "Once", "seed": 1, "edits": []},
        {"id": "wrong", "prompt": 1},
    )
    options = ("--max-tokens", "12", "--baseline", "--logprobs", "--edit", "5 +8")
    assert steer("batch", "in.jsonl", "out.jsonl", *options)[0] == 0
    steered, plain, wrong = results(tmp_path / "out.jsonl")
    assert steered["report"]["steered"] and not steered["baseline"]["report"]["applied"]
    assert steered["baseline"]["tokens"] == plain["tokens"] != steered["tokens"]
    assert plain["baseline"] == {key: plain[key] for key in plain["baseline"]}
    assert "baseline" not in wrong
    for reply in (steered, steered["baseline"], plain):
        assert len(reply["logprobs"]) == len(reply["tokens"]) and all(value < 0 for value in reply["logprobs"])


def test_a_stop_text_ends_each_reply_before_it(steer: Steer, tmp_path: Path) -> None:
    ask(tmp_path / "in.jsonl", *({"id": line, "prompt": "Once" * (line + 1), "seed": line} for line in range(12)))
    options = ("--max-tokens", "40", "--temperature", "0", "--batch-size", "3", "--logit-bias", "97=40")
    assert steer("batch", "in.jsonl", "free.jsonl", *options)[0] == 0
    assert all("aa" in result["text"] for result in results(tmp_path / "free.jsonl"))
    assert steer("batch", "in.jsonl", "out.jsonl", *options, "--stop", "aa")[0] == 0
    for free, result in zip(results(tmp_path / "free.jsonl"), results(tmp_path / "out.jsonl"), strict=True):
        assert result["finish"] == "stop" and result["text"] == free["text"].partition("aa")[0]


def test_what_is_wrong_with_all_lines_is_said_once(steer: Steer, tmp_path: Path) -> None:
    ask(tmp_path / "in.jsonl", {"id": 1, "prompt": "a"})
    for arguments, why in (
        (("--edit", "64 +1"), "there is no latent 64"),
        (("--edit", "x"), "is no edit"),
        (("--stop", ""), "--stop is empty"),
        (("--max-tokens", "999"), "a reply of 999 tokens does not fit"),
    ):
        code, said = steer("batch", "in.jsonl", "out.jsonl", *arguments)
        assert code == 1 and why in said
        assert not (tmp_path / "out.jsonl").exists() or not results(tmp_path / "out.jsonl")
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
    assert steer("batch", "in.jsonl", "out.jsonl", "--batch-size", "0")[0] == 2
    ask(tmp_path / "none.jsonl")
    code, said = steer("batch", "none.jsonl", "out.jsonl")
    assert code == 0 and (tmp_path / "out.jsonl").read_bytes() == b""


# -- stopped and killed ---------------------------------------------------------------------------------------------

MANY = ("--seed", "3", "--batch-size", "2", "--baseline", "--hits", "3", "--logprobs")


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_requests(tmp_path / "in.jsonl", 40, LATENTS, longest=6)
    assert steer("batch", "in.jsonl", "whole.jsonl", *MANY)[0] == 0

    class Late(threading.Event):
        """Set after some passes, as by a key."""

        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked > 60

    @contextmanager
    def interrupted() -> Iterator[threading.Event]:
        yield Late()

    with monkeypatch.context() as patch:
        patch.setattr("steer.cli.engines.interruptible", interrupted)
        code, said = steer("batch", "in.jsonl", "out.jsonl", *MANY)
    assert code == 130 and "of 40 lines are in out.jsonl: the same command goes on" in said
    assert 0 < count(tmp_path / "out.jsonl") < 40
    code, said = steer("batch", "in.jsonl", "out.jsonl", *MANY)
    assert code == 0 and ": going on" in said
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    code, said = steer("batch", "in.jsonl", "out.jsonl", *MANY)
    assert code == 0 and "all 40 lines are in out.jsonl, 3 of them with an error" in said


def test_progress_tells_speed_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("steer.cli.batch.time.monotonic", lambda: now[0])
    told = Told(total=100, before=40, _began=now[0], _last=now[0])
    told.add(10, 300)
    now[0] += 120
    assert told.line() == "50 of 100 lines, 2 tokens/s, 0:10:00 left"
    told.add(50, 0)
    assert told.line() == "100 of 100 lines, 2 tokens/s"


def test_another_sae_at_the_same_place_is_not_gone_on_with(steer: Steer, folder: Path, tmp_path: Path) -> None:
    ask(tmp_path / "in.jsonl", {"id": 1, "prompt": "a", "max_tokens": 2})
    assert steer("batch", "in.jsonl", "out.jsonl")[0] == 0
    weights = folder / "sae" / "sae.safetensors"
    os.utime(weights, (weights.stat().st_atime, weights.stat().st_mtime + 5))
    code, said = steer("batch", "in.jsonl", "out.jsonl")
    assert code == 1 and f"was begun with the state of {folder / 'sae'}" in said and "delete out.jsonl" in said


def test_labels_count_only_where_results_hold_them(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def relabelled(text: str) -> None:
        with LabelIndex(tmp_path / "labels.db") as index:
            index.add_label(5, text, "me")
        later = (tmp_path / "labels.db").stat().st_mtime + 5
        os.utime(tmp_path / "labels.db", (later, later))

    LabelIndex.create(tmp_path / "labels.db", {"d_sae": "64"}).close()
    monkeypatch.setattr("steer.engine.check_labels", lambda folder, index: None)
    ask(tmp_path / "in.jsonl", {"id": 1, "prompt": "a", "max_tokens": 2})
    plain = ("batch", "in.jsonl", "out.jsonl", "--labels", "labels.db")
    shown = ("batch", "in.jsonl", "hits.jsonl", "--labels", "labels.db", "--hits", "2")
    relabelled("one")
    assert (steer(*plain)[0], steer(*shown)[0]) == (0, 0)
    later = (tmp_path / "labels.db").stat().st_mtime + 5
    os.utime(tmp_path / "labels.db", (later, later))  # as a migration, or `steer calibrate`, leaves it
    assert (steer(*plain)[0], steer(*shown)[0]) == (0, 0)
    relabelled("two")
    assert steer(*plain)[0] == 0
    code, said = steer(*shown)
    assert code == 1 and "was begun with the labels in it" in said


def test_a_killed_run_goes_on_to_the_same_file(steer: Steer, folder: Path, tmp_path: Path) -> None:
    source, whole, killed = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "killed.jsonl"))
    write_requests(source, 60, LATENTS, longest=12)
    assert steer("batch", str(source), str(whole), *MANY)[0] == 0
    draw, left = random.SystemRandom(), 0
    for target in (1, 30):
        left = kill_at(source, killed, [*MANY, *options(folder)], target, draw.uniform(0, 0.4))
    assert left >= 30
    assert steer("batch", str(source), str(killed), *MANY)[0] == 0
    assert killed.read_bytes() == whole.read_bytes()
