"""Requests as lines of JSON, and the file of results: what is wrong with a line, and what no kill can spoil."""

import errno
import gzip
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steer.batch import ROOM, Results, Row, admit, groups, read_lines, survey, write
from steer.edits import Edit, SteeringSet
from steer.errors import SteerError
from steer.events import Event, Finished, Report, TokenEvent
from steer.requests import Defaults, Request, read_object, read_request
from steer.session import MAX_SEED, Prompt, Sampling

PLAIN = Defaults(Sampling(0.7, 0.9), seed=5, max_tokens=64)


def request(line: int = 1, defaults: Defaults = PLAIN, **entry: Any) -> Request:
    return read_request(read_object(json.dumps(entry).encode()), line, defaults)


# -- a line ---------------------------------------------------------------------------------------------------------


def test_a_line_that_says_only_its_prompt_runs_as_all_do() -> None:
    steering = SteeringSet((Edit.parse("5 +1"),))
    ask = request(3, Defaults(Sampling(0.7, 0.9), steering, seed=5, max_tokens=64), prompt="Once")
    assert ask == Request(3, {"id": None, "line": 3}, Prompt(text="Once"), steering, Sampling(0.7, 0.9), 5, 64)


def test_a_line_replaces_what_it_says() -> None:
    ask = request(
        id="x", prompt="Once", edits=["clamp 4 0 on generated", "7 +1.1x"], seed=9, max_tokens=3, temperature=1,
        top_p=1.0, top_k=4, min_p=0.1, repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={"7": -2},
        meta={"a": [1]},
        system=None,
    )  # fmt: skip
    assert ask.name == {"id": "x", "meta": {"a": [1]}}
    assert [str(edit) for edit in ask.steering.edits] == ["clamp 4 0 on generated", "7 +1.1x"]
    assert (ask.seed, ask.max_tokens) == (9, 3)
    assert ask.sampling == Sampling(1.0, 1.0, 4, 0.1, 1.5, 0.5, ((7, -2.0),))
    steered = Defaults(Sampling(), SteeringSet((Edit.parse("5 +1"),)))
    assert request(prompt="a", edits=[], defaults=steered).steering == SteeringSet()


def test_messages_and_prompts_of_a_chat_get_the_system_message() -> None:
    user = {"role": "user", "content": "hi"}
    chat = Defaults(Sampling(), seed=1, system="Be kind.", chat=True)
    assert request(messages=[user], system="Be brief.").prompt.messages == (("system", "Be brief."), ("user", "hi"))
    assert request(messages=[user], defaults=chat).prompt.messages == (("system", "Be kind."), ("user", "hi"))
    assert request(prompt="hi", defaults=chat).prompt.messages == (("system", "Be kind."), ("user", "hi"))
    own = [{"role": "system", "content": "Mine."}, user]
    assert request(messages=own, defaults=chat).prompt.messages == (("system", "Mine."), ("user", "hi"))


def test_without_a_seed_each_line_gets_one_that_stays_its_own() -> None:
    seeds = [request(line, Defaults(Sampling(), drawn=12), prompt="a").seed for line in range(1, 200)]
    assert seeds == [request(line, Defaults(Sampling(), drawn=12), prompt="a").seed for line in range(1, 200)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed <= MAX_SEED for seed in seeds)
    assert request(1, Defaults(Sampling(), drawn=13), prompt="a").seed != seeds[0]


USER = '{"role": "user", "content": "a"}'


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nope", "is not JSON"),
        ("[" * 20_000, "is not JSON"),
        ("[1]", "the line is a list, not an object"),
        ("null", "the line is null"),
        ("true", "the line is true or false"),
        ('{"id": 1}', "neither a prompt nor messages"),
        ('{"prompt": "a", "messages": []}', "both a prompt and messages"),
        ('{"prompt": 5}', "prompt is 5"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"prompt": "a", "promt": 1}', "`promt` is no key"),
        ('{"id": [1], "prompt": "a"}', "id is [1]"),
        ('{"id": true, "prompt": "a"}', "id is true"),
        ('{"prompt": "a", "system": "b"}', "goes with messages"),
        ('{"messages": []}', "messages are none"),
        (f'{{"messages": [{USER}, 7]}}', "messages[1] is 7"),
        ('{"messages": [{"role": "user"}]}', "messages[0] is"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', 'role "tool"'),
        ('{"messages": [{"role": "user", "content": 1}]}', "messages[0] content is 1"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "end with one of the assistant"),
        (f'{{"system": "a", "messages": [{{"role": "system", "content": "b"}}, {USER}]}}', "system message twice"),
        ('{"prompt": "a", "edits": "5 +1"}', 'edits is "5 +1"'),
        ('{"prompt": "a", "edits": [5]}', "edits is 5"),
        ('{"prompt": "a", "edits": ["boost 5 1"]}', "`boost 5 1` is no edit"),
        ('{"prompt": "a", "seed": -1}', "the seed is -1"),
        ('{"prompt": "a", "seed": 1.5}', "seed is 1.5"),
        ('{"prompt": "a", "max_tokens": 0}', "the most tokens of a reply is 0"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens is true"),
        ('{"prompt": "a", "temperature": "hot"}', 'temperature is "hot"'),
        ('{"prompt": "a", "temperature": NaN}', "temperature is nan"),
        ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", "temperature is 1000"),
        ('{"prompt": "a", "top_p": 0}', "top_p is 0"),
        ('{"prompt": "a", "top_k": 1.0}', "top_k is 1.0"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', 'the token "x"'),
        ('{"prompt": "a", "logit_bias": {"5": "x"}}', "logit_bias of 5"),
        ('{"prompt": "a", "logit_bias": [[5, 1]]}', "logit_bias is [[5, 1]]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_named(line: str, why: str) -> None:
    with pytest.raises(SteerError) as raised:
        read_request(read_object(line.encode()), 1, PLAIN)
    assert why in str(raised.value) and len(str(raised.value)) < 200


def test_bytes_that_are_no_text_are_named() -> None:
    with pytest.raises(SteerError, match="is not UTF-8 text"):
        read_object(b'{"id": "\xff"}')


# -- a file ---------------------------------------------------------------------------------------------------------


def test_an_input_is_read_packed_or_not_and_blank_lines_are_no_requests(tmp_path: Path) -> None:
    text = b'\xef\xbb\xbf{"id": 1}\n\n  \r\n{"id": 2}\r\nbroken'
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(text))
        lines = list(read_lines(tmp_path / name))
        assert [number for number, _ in lines] == [1, 4, 5]
        assert [line.strip() for _, line in lines] == [b'{"id": 1}', b'{"id": 2}', b"broken"]
    assert len({survey(tmp_path / name).sha256 for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz")}) == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz"])
def test_a_damaged_input_is_one_sentence(name: str, tmp_path: Path) -> None:
    pack = gzip.compress if name.endswith("gz") else lzma.compress
    (tmp_path / name).write_bytes(pack(os.urandom(5000))[:3000])
    with pytest.raises(SteerError, match="is damaged"):
        survey(tmp_path / name)
    with pytest.raises(SteerError, match="cannot be read: No such file"):
        survey(tmp_path / "none.jsonl")


def test_ids_that_are_there_twice_are_found(tmp_path: Path) -> None:
    ids: list[Any] = ["a", 1, "1", "a", None, None, [1], 1, "a"]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"id": each}) for each in ids) + "\nbroken\nbroken\n")
    seen = survey(tmp_path / "in.jsonl")
    assert (seen.lines, seen.repeated, seen.example) == (11, 3, (1, 4))
    (tmp_path / "below.jsonl").write_text('{"id": -1}\n{"id": -2}\n')
    assert survey(tmp_path / "below.jsonl").repeated == 0
    (tmp_path / "empty.jsonl").write_text("\n")
    assert (survey(tmp_path / "empty.jsonl").lines, survey(tmp_path / "empty.jsonl").example) == (0, None)


# -- the plan -------------------------------------------------------------------------------------------------------


class LengthEngine:
    """A prompt has a token for each character; a reply is one token. Notes what ran together."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, list[int]]] = []

    def measure(self, prompt: Prompt, steering: SteeringSet, sampling: Sampling, max_tokens: int) -> int:
        assert prompt.text is not None
        if len(prompt.text) > 9000:
            raise ValueError("too long")
        return len(prompt.text)

    def stream(self, prompts: Any, steering: Any, *, places: int, **options: Any) -> Iterator[Event]:
        self.runs.append((places, [len(prompt.text) for prompt in prompts]))
        for row, seed in reversed(list(enumerate(options["seeds"]))):
            yield TokenEvent(row, 0, seed, "a")
            yield Finished(row, "cancelled" if options["stop"].is_set() else "length", seed, Report())


def rows_of(engine: LengthEngine, sizes: list[int], baseline: bool = False, edits: tuple[str, ...] = ()) -> list[Row]:
    lines = [
        (line, json.dumps({"id": line, "prompt": "x" * size, "seed": line, "max_tokens": 1, "edits": edits}).encode())
        for line, size in enumerate(sizes)
    ]
    return admit(engine, lines, PLAIN, baseline)[0]


def test_requests_of_like_length_go_together_and_long_ones_in_smaller_batches() -> None:
    import threading

    engine = LengthEngine()
    sizes = [5, ROOM + 5, 900, ROOM - 1, 4 * ROOM, 2 * ROOM, 7, ROOM]
    rows = rows_of(engine, sizes)
    replies = dict(write(engine, rows, 4, threading.Event()))
    assert engine.runs == [
        (1, [4 * ROOM]), (1, [2 * ROOM]), (2, [ROOM + 5, ROOM]), (4, [ROOM - 1, 900, 7, 5]),
    ]  # fmt: skip
    assert [replies[place].events[0].token for place in range(len(rows))] == list(range(len(sizes)))


def test_a_baseline_is_a_row_only_where_there_is_something_to_leave_out() -> None:
    engine = LengthEngine()
    assert [row.baseline for row in rows_of(engine, [3, 4], baseline=True)] == [False, False]
    rows = rows_of(engine, [3, 4], baseline=True, edits=("5 +1",))
    assert [row.baseline for row in rows] == [False, True, False, True]
    assert [bool(row.steering.edits) for row in rows] == [True, False, True, False]


def test_a_line_that_cannot_run_is_said_on_its_line() -> None:
    lines = [(4, b"{"), (6, b'{"id": "a", "prompt": "' + b"x" * 9001 + b'"}'), (7, b'{"id": "b", "prompt": "x"}')]
    rows, entries = admit(LengthEngine(), lines, PLAIN, True)
    assert [row.request.line for row in rows] == [7]
    assert list(entries) == [4, 6, 7]
    assert entries[4]["id"] is None and entries[4]["line"] == 4 and "not JSON" in entries[4]["error"]
    assert entries[6] == {"id": "a", "error": "too long"} and entries[7] == {"id": "b"}


# -- results --------------------------------------------------------------------------------------------------------

LINES = 10
OPTIONS = {"--max-tokens": 5, "--stop": ("a", "b")}


class KilledError(BaseException):
    """In place of a kill."""


def answer(folder: Path, options: dict[str, Any] = OPTIONS, size: int = 2, wide: int = 1) -> Results:
    """What the command does, with the line's number for a reply of `wide` characters."""
    source = folder / "in.jsonl"
    if not source.exists():
        source.write_text("".join(f'{{"id": {line}}}\n' for line in range(LINES)))
    with Results(folder / "out.jsonl", source, survey(source), options, size) as results:
        results.run_on("a model")
        for group in groups(list(read_lines(source))[results.state.lines :], 3):
            results.add([json.dumps({"id": line, "text": "x" * wide}) for line, _ in group], 0, len(group))
    return results


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    folder = tmp_path / "whole"
    folder.mkdir()
    answer(folder)
    return (folder / "out.jsonl").read_bytes()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("torn", [b"", b'{"id": 7', b'{"id": 99}\n{"id"'])
def test_a_kill_at_any_step_neither_loses_nor_repeats_a_line(
    call: str, torn: bytes, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert whole.count(b"\n") == LINES
    for moment in range(12):
        folder = tmp_path / f"{moment}"
        folder.mkdir()
        left, real = [moment], getattr(os, call)

        def killed(*given: Any, left: list[int] = left, real: Any = real) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(f"steer.batch.os.{call}", killed)
            try:
                answer(folder)
            except KilledError:
                if (folder / "out.jsonl.progress").exists():  # before that, nothing is written to OUT
                    with (folder / "out.jsonl").open("ab") as handle:
                        handle.write(torn)
        assert answer(folder).state.lines == LINES
        assert (folder / "out.jsonl").read_bytes() == whole


def test_a_finished_file_is_left_alone(whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "whole" / "out.jsonl"
    before = out.stat().st_mtime_ns
    state = answer(tmp_path / "whole").state
    assert (state.lines, state.tokens, state.bytes) == (LINES, LINES, len(whole))
    assert out.read_bytes() == whole and out.stat().st_mtime_ns == before


def test_a_full_disk_keeps_what_is_written_and_says_how_to_go_on(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        real, left = os.fsync, [3]

        def fsync(handle: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise full
            real(handle)

        patch.setattr("steer.batch.os.fsync", fsync)
        with pytest.raises(SteerError, match="cannot be added to: No space left on device") as raised:
            answer(tmp_path)
    assert raised.value.hint == "what is in it is safe: once that is put right, the same command goes on after 3 lines"
    answer(tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_file_that_may_not_grow_is_one_sentence_too(whole: bytes, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(SteerError, match="cannot be added to: File too large"):
            answer(tmp_path, wide=500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "out.jsonl").stat().st_size == 1024
    assert answer(tmp_path, wide=500).state.lines == LINES
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == list(
        range(1, LINES + 1)
    )


def test_another_input_option_or_model_is_refused_and_another_batch_size_is_not(whole: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    with pytest.raises(SteerError, match="was begun with --max-tokens 5, and now it is not given"):
        answer(folder, {"--stop": ("a", "b")})
    with pytest.raises(SteerError, match="was begun without --seed, and now it is 3"):
        answer(folder, OPTIONS | {"--seed": 3})
    assert answer(folder, size=4).resized == 2
    assert answer(folder, size=4).resized == 2  # nothing was left to write, so the progress stands as it was
    source = folder / "in.jsonl"
    with (
        Results(folder / "out.jsonl", source, survey(source), OPTIONS, 4) as results,
        pytest.raises(SteerError, match='was begun with the model "a model", and now it is "another"'),
    ):
        results.run_on("another")
    source.write_text(source.read_text() + '{"id": 11}\n')
    with pytest.raises(SteerError, match="the input has changed since"):
        answer(folder)
    assert (folder / "out.jsonl").read_bytes() == whole


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    with pytest.raises(SteerError, match=r"is not empty, and no out.jsonl.progress says what it holds"):
        answer(tmp_path)
    for text, why in (("{", "is damaged"), ("[]", "is damaged"), ("{}", "is damaged"), ("\xff", "is damaged")):
        (tmp_path / "out.jsonl.progress").write_text(text, encoding="latin-1")
        with pytest.raises(SteerError, match=why):
            answer(tmp_path)
    (tmp_path / "out.jsonl.progress").write_text('{"format": "steer-batch", "version": 2, "more": 1}')
    with pytest.raises(SteerError, match="of another version"):
        answer(tmp_path)
    assert out.read_text() == "precious\n"
    source = tmp_path / "in.jsonl"
    for path, why in ((source, "it is the input"), (tmp_path, "it is no file"), (tmp_path / "a.xz", "be packed")):
        with pytest.raises(SteerError, match=why):
            Results(path, source, survey(source), {}, 1)
    with pytest.raises(SteerError, match="cannot be written: No such file"):
        Results(tmp_path / "none" / "out.jsonl", source, survey(source), {}, 1)


def test_lost_lines_are_noticed_and_a_file_that_was_deleted_is_begun_anew(whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "whole" / "out.jsonl"
    out.write_bytes(whole[:-1])
    with pytest.raises(SteerError, match=f"has {len(whole) - 1} bytes, and {len(whole)} were written"):
        answer(tmp_path / "whole")
    out.unlink()
    answer(tmp_path / "whole")
    assert out.read_bytes() == whole


def test_one_process_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    answer(tmp_path)
    source = tmp_path / "in.jsonl"
    with (
        Results(tmp_path / "out.jsonl", source, survey(source), OPTIONS, 2),
        pytest.raises(SteerError, match="another process writes"),
    ):
        answer(tmp_path)
