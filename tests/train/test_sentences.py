"""Sentences join to their document, and split text comes back from its Parquet file as it was."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.cli import main
from train import sentences
from train.documents import read_documents
from train.errors import TrainError
from train.sentences import split_sentences, write_split

PIECES = [
    "A b",
    ". ",
    "! ",
    "Dr. ",
    "J. ",
    "\n\n",
    "\r\n",
    "\u2028",
    "\u00a0",
    "\u3000",
    "\x85",
    '"',
    "(",
    "...",
    "é",
    "😀",
    "1.",
]
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))


@given(texts, st.sampled_from(["en", "de", "ja", "hi", "ru", "nowhere"]))
@settings(max_examples=300, deadline=None)
def test_joined_sentences_are_the_document_and_none_is_blank(text: str, language: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    found = split_sentences(text, language)
    assert "".join(found) == text
    assert all(piece.strip() for piece in found) or (not text.strip() and len(found) == bool(text))


def test_a_long_document_loses_nothing_where_sentencex_cuts_it_for_itself() -> None:
    text = ("One sentence of a paragraph. And another, longer one, of Dr. Smith!\n\n" * 900).rstrip()
    found = split_sentences(text)
    assert "".join(found) == text
    assert len(found) == 1800


def test_sentences_end_where_a_reader_ends_them() -> None:
    assert split_sentences("Dr. Smith came. He left!  Why?\n\nNobody knows.\n") == [
        "Dr. Smith came. ",
        "He left!  ",
        "Why?\n\n",
        "Nobody knows.\n",
    ]
    assert split_sentences(" \n A.") == [" \n A."]
    assert split_sentences(" \n") == [" \n"]
    assert split_sentences("") == []


def test_what_was_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "GROUP_CHARACTERS", 10)
    documents = [[f"Sentence {i} of {n}. " for i in range(n % 5 + 1)] for n in range(600)]
    seen: list[tuple[int, int]] = []
    summary = write_split(documents, tmp_path / "new" / "a.parquet", lambda *done: seen.append(done))
    assert (summary.documents, summary.sentences) == seen[-1] == (600, sum(map(len, documents)))
    assert summary.bytes == (tmp_path / "new" / "a.parquet").stat().st_size
    assert list(read_documents(tmp_path / "new" / "a.parquet")) == [tuple(document) for document in documents]
    table = parquet.read_table(tmp_path / "new" / "a.parquet")
    assert table.column_names == ["document", "sentence", "text"]
    assert table.slice(3, 1).to_pylist() == [{"document": 2, "sentence": 0, "text": "Sentence 0 of 2. "}]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[list[str]]:
        yield ["A."]
        raise TrainError("line 2 is not usable")

    with pytest.raises(TrainError, match="line 2"):
        write_split(broken(), tmp_path / "a.parquet")
    with pytest.raises(TrainError, match="no text to split"):
        write_split([], tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []


def test_rows_out_of_order_are_named(tmp_path: Path) -> None:
    rows = [{"document": 0, "sentence": i, "text": "A."} for i in (0, 2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(TrainError, match=r"row 2 of .*a\.parquet is not usable: it is sentence 2 of document 0"):
        list(read_documents(tmp_path / "a.parquet"))


def test_steer_split_writes_once_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("One. Two.\n<|endoftext|>\nThree.")
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"text": "Four \ud83d! Five."}))
    out = tmp_path / "out.parquet"
    assert main(["split", str(tmp_path / "in"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"documents": 3, "sentences": 5, "bytes": out.stat().st_size}
    assert list(read_documents(out)) == [("One. ", "Two."), ("Four \ufffd! ", "Five."), ("Three.",)]
    again = tmp_path / "again.parquet"
    assert main(["split", str(out), "--out", str(again), "--max-documents", "1"]) == 0
    assert list(read_documents(again)) == [("One. ", "Two.")]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    for source, target, words in [
        (tmp_path / "in", out, "is there already"),
        (tmp_path / "in", tmp_path / "a.txt", "split text is Parquet"),
        (tmp_path / "nowhere", tmp_path / "x.parquet", "there is no text file"),
        (tmp_path / "c.jsonl", tmp_path / "x.parquet", "holds dialogs"),
    ]:
        capsys.readouterr()
        assert main(["split", str(source), "--out", str(target)]) == 1
        assert words in capsys.readouterr().err
    assert main(["split", str(out), "--out", str(tmp_path / "x.parquet"), "--max-documents", "0"]) == 1
