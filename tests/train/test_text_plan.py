"""A plan of text: units, parts, order, copies and shares, each counted and the same in every reading."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_3.chat_format import ChatFormat
from tests.tiny import byte_tokenizer
from train import text as text_module
from train.errors import TrainError
from train.sentences import split_sentences, write_split
from train.text import Row, Seen, TextCounts, TextPlan, interleave, is_held_out, read_rows, shuffled, text_key

TOKENIZER = byte_tokenizer()
BOS = TOKENIZER.bos_id


def rows(
    files: list[Path], counts: TextCounts | None = None, share: tuple[int, int] = (0, 1), **plan: Any
) -> list[Row]:
    return list(
        read_rows(files, TOKENIZER, ChatFormat(TOKENIZER), TextPlan(**plan), counts, rank=share[0], world=share[1])
    )


def said(row: Row) -> str:
    return TOKENIZER.decode(token for token in row.tokens if token != BOS)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """200 documents of one sentence each."""
    path = tmp_path / "many.txt"
    path.write_text("\n<|endoftext|>\n".join(f"document {i}" for i in range(200)))
    return path


def test_a_number_and_the_default_plan_are_contexts_as_ever(tmp_path: Path, many: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": text}) for text in ["x" * 1200, "", "y" * 9]))
    files = [many, other]
    assert TextPlan().context == 512 and TextPlan(unit="sentence").context == 192
    assert rows(files) == list(read_rows(files, TOKENIZER, None, 512))
    encoded = [[TOKENIZER.encode(f"document {i}") for i in range(200)], [[120] * 1200, [121] * 9]]
    expected = [
        Row(number, start, [BOS, *tokens[start : start + 511]])
        for number, tokens in enumerate(interleave(map(iter, encoded), len))
        for start in range(0, len(tokens), 511)
    ]
    assert rows(files) == expected
    assert rows(files, bos=False)[0].tokens == expected[0].tokens[1:]


@given(
    st.lists(st.text("abc.? ", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=12),
    st.integers(2, 20),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_packed_contexts_are_full_and_lose_nothing_but_the_end(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], context: int, bos: bool
) -> None:
    path = tmp_path_factory.mktemp("packed") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    counts = TextCounts()
    found = rows([path], counts, unit="packed", context=context, bos=bos)
    assert all(len(row.tokens) == context and (row.tokens[0] == BOS) == bos for row in found)
    given_text = "".join(map(said, found))
    whole = "".join(documents)
    assert whole.startswith(given_text) and len(whole) - len(given_text) <= context
    assert counts.rows == len(found) and counts.tokens == context * len(found)
    assert counts.dropped <= 1 and (counts.dropped or given_text == whole)
    for row in found:  # each token is where its document has it
        position = row.offset
        for (token, document), before in zip(
            zip(row.tokens, row.documents(), strict=True), [row.document, *row.documents()], strict=False
        ):
            position = 0 if document != before else position
            if token != BOS:
                assert documents[document].encode()[position] == token
                position += 1


def test_sentences_are_rows_cut_or_dropped_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Short one.  A sentence that is rather long!\n\nEnd.\n<|endoftext|>\nNext.")
    counts = TextCounts()
    found = rows([path], counts, unit="sentence", context=12)
    assert [said(row) for row in found] == ["Short one.", "A sentence ", "End.", "Next."]
    assert [(row.document, row.offset) for row in found] == [(0, 0), (0, 10), (0, 41), (1, 0)]
    assert counts == TextCounts(documents=2, rows=4, tokens=sum(len(row.tokens) for row in found), cut=1)
    counts = TextCounts()
    assert [said(row) for row in rows([path], counts, unit="sentence", context=12, long="drop")] == [
        "Short one.", "End.", "Next."
    ]  # fmt: skip
    assert (counts.cut, counts.dropped) == (0, 1)
    assert [row.tokens[0] for row in rows([path], unit="sentence", bos=False)] == list(b"SAEN")


def test_split_text_is_used_as_it_is_or_joined(tmp_path: Path) -> None:
    write_split([["One, ", "two. Three."], ["Four."]], tmp_path / "a.parquet")
    assert [said(row) for row in rows([tmp_path / "a.parquet"], unit="sentence")] == ["One,", "two. Three.", "Four."]
    assert [said(row) for row in rows([tmp_path / "a.parquet"])] == ["One, two. Three.", "Four."]


def test_the_rows_of_split_text_are_those_of_the_text(tmp_path: Path) -> None:
    text = "Dr. A came. He went!\n\nNobody knows why.  Or do they?"
    (tmp_path / "a.txt").write_text(text)
    write_split([split_sentences(text)], tmp_path / "a.parquet")
    for unit in ("context", "packed", "sentence"):
        plan = {"unit": unit, "context": 9}
        assert rows([tmp_path / "a.txt"], **plan) == rows([tmp_path / "a.parquet"], **plan)


def test_dialogs_by_sentences_are_what_was_said(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi. You?"}, {"role": "assistant", "content": "Fine."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    assert [said(row) for row in rows([tmp_path / "a.jsonl"], unit="sentence")] == ["Hi.", "You?", "Fine."]


def test_parts_divide_the_documents_and_numbers_stay(many: Path) -> None:
    whole = {row.document: row for row in rows([many])}
    counts = TextCounts()
    held_out = rows([many], counts, held_out=0.2, part="held-out")
    train = rows([many], held_out=0.2, part="train")
    assert {row.document for row in held_out} | {row.document for row in train} == set(whole)
    assert not {row.document for row in held_out} & {row.document for row in train}
    assert 20 <= len(held_out) <= 60
    assert all(whole[row.document] == row for row in held_out + train)
    assert counts.elsewhere == len(train) and counts.documents == 200
    assert rows([many], held_out=0.2) == list(whole.values())
    sentences = rows([many], unit="sentence", held_out=0.2, part="held-out")
    assert [row.document for row in sentences] == [row.document for row in held_out]
    other = rows([many], held_out=0.2, part="held-out", split_seed=1)
    assert {row.document for row in other} != {row.document for row in held_out}


def test_a_larger_share_holds_what_a_smaller_one_does() -> None:
    parts = [{i for i in range(3000) if is_held_out(i, share)} for share in (0.0, 0.05, 0.5, 1.0)]
    assert all(small <= large for small, large in pairwise(parts))
    assert not parts[0] and 100 < len(parts[1]) < 200 and len(parts[3]) == 3000
    assert [i for i in range(60) if is_held_out(i, 0.1)] == [3, 7, 18, 23, 24, 31, 37, 41, 52], "versions agree"


@pytest.mark.parametrize("two_files", [False, True])
def test_processes_share_the_documents(tmp_path: Path, many: Path, two_files: bool) -> None:
    files = [many]
    if two_files:
        (tmp_path / "b.txt").write_text("\n<|endoftext|>\n".join("b" * i for i in range(1, 40)))
        files.append(tmp_path / "b.txt")
    plan = {"held_out": 0.1, "part": "train"}
    shares = [rows(files, None, (rank, 3), **plan) for rank in range(3)]
    assert all(row.document % 3 == rank for rank in range(3) for row in shares[rank])
    assert sorted((row for share in shares for row in share), key=lambda row: row.document) == rows(files, **plan)


def test_a_shuffle_is_one_order_for_a_seed(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rows([many])
    mixed = rows([many], shuffle=0)
    assert mixed != plain and mixed == rows([many], shuffle=0) != rows([many], shuffle=1)
    assert sorted(mixed, key=lambda row: row.document) == plain
    monkeypatch.setattr(text_module, "SHUFFLED_DOCUMENTS", 10)
    early = [row.document for row in rows([many], shuffle=0)]
    assert early != sorted(early) and all(document <= place + 10 for place, document in enumerate(early))


def test_the_buffer_of_a_shuffle_is_bounded_in_size_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "SHUFFLED_CHARACTERS", 100)
    taken = 0

    def count() -> Any:
        nonlocal taken
        for i in range(50):
            taken += 1
            yield i

    given_out = 0
    for _ in shuffled(count(), 0, lambda item: 30):
        given_out += 1
        assert taken - given_out <= 3
    assert given_out == 50


def test_copies_are_left_out_whatever_their_white_space(tmp_path: Path) -> None:
    texts = ["caf\u00e9 au lait", "tea", " cafe\u0301  au\nlait ", "Tea", "tea"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    counts = TextCounts()
    assert [row.document for row in rows([tmp_path / "a.jsonl"], counts, dedupe=True)] == [0, 1, 3]
    assert counts.duplicates == 2 and counts.documents == 5
    shares = [rows([tmp_path / "a.jsonl"], None, (rank, 2), dedupe=True) for rank in range(2)]
    assert [[row.document for row in share] for share in shares] == [[0], [1, 3]]
    assert text_key(("one ", "two")) == text_key("one two") != text_key("onetwo")


@given(st.lists(st.integers(0, 300), max_size=400))
@settings(max_examples=40, deadline=None)
def test_what_was_seen_is_what_a_set_says(numbers: list[int]) -> None:
    seen, known = Seen(), set[int]()
    seen.RECENT = 8  # so that a few numbers fill many arrays
    for number in numbers:
        assert seen.add(number + (1 << 64) - 301) == (number not in known)
        known.add(number)
    assert len(seen._sorted) <= 8


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"unit": "page"}, "unit is 'page'"),
        ({"part": "test"}, "part is 'test'"),
        ({"long": "keep"}, "long is 'keep'"),
        ({"context": 1}, "rows of 1 tokens hold no text"),
        ({"held_out": 1.0}, "share is 1.0"),
        ({"held_out": -0.1}, "share is -0.1"),
        ({"part": "held-out"}, "the held-out part is empty"),
        ({"long": "drop"}, "only sentences|cut into rows"),
    ],
)
def test_a_plan_without_sense_is_refused(plan: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainError, match=words) as caught:
        TextPlan(**plan)
    assert caught.value.hint


def test_an_empty_file_gives_no_rows(tmp_path: Path, many: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    counts = TextCounts()
    assert rows([tmp_path / "a.txt"], counts) == [] and counts.documents == 0
    assert rows([tmp_path / "a.txt", many]) == rows([many])
